"""Latents as colours."""

from __future__ import annotations

import numpy as np
import pytest

from underpaint.report.pca import latent_pca


def test_colours_are_the_first_three_principal_components():
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((3, 9)) * np.array([[9.0], [4.0], [1.5]])
    tokens = rng.standard_normal((4 * 6 * 5, 3)) @ mixing + 0.05 * rng.standard_normal((120, 9)) + 7.0
    latents = tokens.reshape(4, 6, 5, 9).transpose(0, 3, 1, 2).astype(np.float32)
    colours = latent_pca(latents)
    assert colours.shape == (4, 6, 5, 3)
    assert colours.dtype == np.uint8
    # Reference: the singular value decomposition of the centred tokens.
    left, scale, _ = np.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    for index in range(3):
        component = left[:, index] * scale[index]
        inside = (component > np.percentile(component, 2)) & (component < np.percentile(component, 98))
        values = colours.reshape(-1, 3)[:, index].astype(float)
        assert abs(np.corrcoef(component[inside], values[inside])[0, 1]) > 0.999
        assert values.min() == 0
        assert values.max() == 255


def test_the_sign_does_not_depend_on_the_solver():
    ramp = np.zeros((1, 4, 1, 100))
    ramp[0, 2, 0] = np.arange(100)
    red = latent_pca(ramp)[0, 0, :, 0].astype(int)
    assert (np.diff(red) >= 0).all()
    assert (red[0], red[-1]) == (0, 255)
    assert (latent_pca(ramp)[..., 1:] == 128).all()  # no second and third direction: mid-grey


@pytest.mark.parametrize("channels", [1, 2, 3, 32])
def test_any_number_of_channels(channels):
    latents = np.random.default_rng(1).standard_normal((2, channels, 3, 4))
    colours = latent_pca(latents)
    assert colours.shape == (2, 3, 4, 3)
    assert (colours.reshape(-1, 3).std(0) > 0).sum() == min(channels, 3)


def test_tokens_that_are_not_finite_are_black_and_change_nothing_else():
    latents = np.random.default_rng(2).standard_normal((2, 8, 4, 4))
    latents[0, 3, 1, 2] = np.nan
    latents[1, 0, 0, 0] = np.inf
    colours = latent_pca(latents)
    assert (colours[0, 1, 2] == 0).all()
    assert (colours[1, 0, 0] == 0).all()
    assert colours[1, 2:].std() > 0
    assert (latent_pca(np.full((1, 4, 2, 2), np.nan)) == 0).all()


def test_constant_latents_are_grey():
    assert (latent_pca(np.full((2, 4, 3, 3), 5.0)) == 128).all()

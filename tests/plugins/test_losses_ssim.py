"""The loss ``ssim`` against torchmetrics and against a closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

import underpaint
from underpaint import DataError, Reconstruction, StepTensors


def pair(height: int = 32, width: int = 24, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two pictures that are alike, the second with some values beyond [-1, 1]."""
    noise = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, height, width, generator=noise, dtype=torch.float64) * 2 - 1
    decoded = images + 0.5 * torch.randn(images.shape, generator=noise, dtype=torch.float64)
    assert float(decoded.abs().max()) > 1
    return images.to(dtype), decoded.to(dtype)


def ssim(images: Tensor, decoded: Tensor) -> Tensor:
    loss = underpaint.create("loss", "ssim")
    terms = loss(StepTensors(step=0, images=images, reconstruction=Reconstruction(decoded)))
    assert list(terms) == ["ssim"]
    return terms["ssim"]


@pytest.mark.parametrize("size", [(32, 24), (11, 16), (7, 6)])
def test_agrees_with_torchmetrics_in_float64(size: tuple[int, int]) -> None:
    images, decoded = pair(*size)
    wanted = structural_similarity_index_measure(decoded.clamp(-1, 1), images, data_range=2.0)
    assert float(ssim(images, decoded)) == pytest.approx(1 - float(wanted), rel=1e-9)


def test_gradient_agrees_with_torchmetrics() -> None:
    images, decoded = pair()
    ours, theirs = decoded.clone().requires_grad_(), decoded.clone().requires_grad_()
    ssim(images, ours).backward()
    (1 - structural_similarity_index_measure(theirs.clamp(-1, 1), images, data_range=2.0)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    # Where a value is clamped, nothing pulls it further.
    assert ours.grad is not None
    assert float(ours.grad[decoded.abs() > 1].abs().max()) == 0


def test_flat_images_in_closed_form() -> None:
    # Without variance only the luminance is left: (2ab + c) / (a² + b² + c), c = (0.01 · 2)².
    a, b = 0.5, -0.25
    images, decoded = (torch.full((1, 3, 16, 16), v, dtype=torch.float64) for v in (a, b))
    wanted = 1 - (2 * a * b + 4e-4) / (a * a + b * b + 4e-4)
    assert float(ssim(images, decoded)) == pytest.approx(wanted, rel=1e-6)


def test_equal_images_and_range() -> None:
    images, _ = pair()
    assert float(ssim(images, images.clone())) == pytest.approx(0.0, abs=1e-12)
    # As bright, and moving the other way.
    assert 1.5 < float(ssim(0.5 + 0.3 * images, 0.5 - 0.3 * images)) <= 2.0


def test_float32_and_autocast_keep_four_digits() -> None:
    images, decoded = pair()
    # Nearly equal, and far from zero mean: here a rounded difference of squares would show.
    decoded = images * 0.02 + 0.9
    images = decoded + 0.002 * images
    wanted = float(ssim(images, decoded))
    single = ssim(images.float(), decoded.float())
    assert float(single) == pytest.approx(wanted, abs=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        again = ssim(images.float(), decoded.float())
    assert again.dtype == torch.float32
    assert torch.equal(again, single)


def test_images_smaller_than_the_window_reaches_are_refused() -> None:
    images, decoded = pair(5, 16)
    with pytest.raises(DataError, match="'ssim' needs images of 6 px or more, and they have 5×16 px"):
        ssim(images, decoded)

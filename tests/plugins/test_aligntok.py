"""AlignTok's adapter, its semantic preservation loss, and how its recipes are found."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import underpaint
from underpaint import Adapter, ConfigError, DataError, Features, Loss, Posterior, StepTensors
from underpaint.run.recipes import load_recipe
from underpaint_aligntok.adapter import Mlp


def adapter(in_channels: tuple[int, ...] = (6, 4), latent: int = 3, **options: Any) -> Adapter:
    torch.manual_seed(0)
    return underpaint.create("adapter", "aligntok/mlp", in_channels=in_channels, latent_channels=latent, **options)


def semantic(**options: Any) -> Loss:
    return underpaint.create("loss", "aligntok/semantic", **options)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- adapter


@pytest.mark.parametrize(("hidden", "millions"), [(None, 1.08), (2048, 2.16), (4096, 4.33)])
def test_parameters_at_vit_l(hidden: int | None, millions: float) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in adapter((1024,), 32, hidden=hidden).parameters())
    width = hidden or 1024
    assert count == 1024 * width + width + 32 * width + 32
    assert round(count / 1e6, 2) == millions


def test_every_cell_is_a_two_layer_perceptron_of_its_own_features() -> None:
    mlp = adapter().double()
    maps = (random(2, 6, 3, 5), random(2, 4, 3, 5, seed=1))
    posterior = mlp(Features(maps))
    assert posterior.logvar is None
    w = {name: p.detach().numpy() for name, p in mlp.named_parameters()}
    cells = np.concatenate([m.numpy() for m in maps], axis=1).transpose(0, 2, 3, 1)
    inner = cells @ w["inner.weight"].T + w["inner.bias"]
    gelu = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
    expected = (gelu @ w["outer.weight"].T + w["outer.bias"]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(posterior.mean.detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    assert mlp.latent_channels == 3
    assert mlp.stride == 1


def test_latent_is_a_point() -> None:
    posterior = adapter()(Features((random(1, 6, 2, 2).float(), random(1, 4, 2, 2).float())))
    assert torch.equal(posterior.sample(), posterior.mode())


def test_gaussian_has_the_means_and_limited_variances_of_one_layer() -> None:
    mlp = adapter(gaussian=True)
    assert isinstance(mlp, Mlp)
    maps = (random(2, 6, 3, 5).float(), random(2, 4, 3, 5, seed=1).float())
    with torch.no_grad():
        mlp.outer.bias[3:] = torch.tensor([100.0, -100.0, 0.0])
        posterior = mlp(Features(maps))
        tokens = torch.cat(maps, dim=1).permute(0, 2, 3, 1)
        moments = mlp.outer(torch.nn.functional.gelu(mlp.inner(tokens))).permute(0, 3, 1, 2)
    assert posterior.logvar is not None
    torch.testing.assert_close(posterior.mean, moments[:, :3])
    assert bool((posterior.logvar[:, 0] == 20.0).all())
    assert bool((posterior.logvar[:, 1] == -30.0).all())
    torch.testing.assert_close(posterior.logvar[:, 2], moments[:, 5])
    assert mlp.last_layer().shape == (6, 10)


def test_maps_of_different_grids_are_refused() -> None:
    with pytest.raises(DataError, match="gives 4×4, 2×2"):
        adapter()(Features((torch.zeros(1, 6, 4, 4), torch.zeros(1, 4, 2, 2))))


# -------------------------------------------------------------------------------------------- semantic loss


def test_zero_at_the_start_of_the_stage() -> None:
    latents = random(2, 3, 4, 4)
    step = StepTensors(step=0, posterior=Posterior(latents), reference_posterior=Posterior(latents.clone()))
    for scale_free in (False, True):
        assert float(semantic(scale_free=scale_free)(step)["semantic"]) == 0.0


def test_l2_is_the_mean_over_all_elements() -> None:
    a, b = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    value = semantic()(StepTensors(step=0, posterior=Posterior(a), reference_posterior=Posterior(b)))["semantic"]
    assert float(value) == pytest.approx(float(((a.numpy() - b.numpy()) ** 2).mean()), rel=1e-6)


def test_cosine_is_over_channels() -> None:
    a, b = random(2, 3, 4, 5).numpy(), random(2, 3, 4, 5, seed=1).numpy()
    cosine = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    step = StepTensors(
        step=0,
        posterior=Posterior(torch.from_numpy(a)),
        reference_posterior=Posterior(torch.from_numpy(b)),
    )
    assert float(semantic(distance="cosine")(step)["semantic"]) == pytest.approx(1 - cosine.mean(), rel=1e-5)


def test_scale_free_divides_by_the_teachers_variance_per_channel() -> None:
    a, b = random(3, 2, 4, 5).numpy(), random(3, 2, 4, 5, seed=1).numpy()
    expected = np.mean([((a[:, c] - b[:, c]) ** 2).mean() / b[:, c].var() for c in range(2)])

    def value(scale: np.ndarray) -> float:
        current, frozen = torch.from_numpy(a * scale), torch.from_numpy(b * scale)
        step = StepTensors(step=0, posterior=Posterior(current), reference_posterior=Posterior(frozen))
        return float(semantic(scale_free=True)(step)["semantic"])

    assert value(np.ones((1, 2, 1, 1))) == pytest.approx(expected, rel=1e-5)
    assert value(np.array([0.2, 30.0]).reshape(1, 2, 1, 1)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"scale_free": True}, {"distance": "cosine"}, {"space": "features"}])
def test_gradient_flows_through_the_current_one_only(options: dict[str, Any]) -> None:
    current, frozen = random(2, 3, 4, 4).requires_grad_(), random(2, 3, 4, 4, seed=1).requires_grad_()
    step = StepTensors(
        step=0,
        posterior=Posterior(current),
        reference_posterior=Posterior(frozen),
        features=Features((current,)),
        reference_features=Features((frozen,)),
    )
    semantic(**options)(step)["semantic"].backward()
    assert current.grad is not None
    assert float(current.grad.abs().sum()) > 0
    assert frozen.grad is None


def test_feature_space_averages_the_maps_and_reads_features_only() -> None:
    loss = semantic(space="features")
    assert loss.needs == {"features", "reference_features"}
    assert semantic().needs == {"posterior", "reference_posterior"}
    zero = torch.zeros(1, 2, 2, 2)
    step = StepTensors(step=0, features=Features((zero + 1, zero + 3)), reference_features=Features((zero, zero)))
    assert float(loss(step)["semantic"]) == (1 + 9) / 2


def test_scale_free_cosine_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no scale"):
        semantic(distance="cosine", scale_free=True)


def test_latent_scale_is_the_standard_deviation_of_the_channels() -> None:
    latents = random(3, 4, 5, 6) * torch.tensor([0.1, 1.0, 3.0, 0.0], dtype=torch.float64).view(1, 4, 1, 1)
    latents.requires_grad_()
    terms = underpaint.create("loss", "aligntok/latent-scale")(StepTensors(step=0, posterior=Posterior(latents)))
    std = latents.detach().numpy().std(axis=(0, 2, 3))
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(
        {"latent_std": std.mean(), "latent_std_min": 0.0, "latent_std_max": std.max()}, rel=1e-5
    )
    assert not any(value.requires_grad for value in terms.values())


# -------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("name", "lr", "of_encoder"),
    [("aligntok", 1e-4, 2e-5), ("aligntok-laion", 1e-4, 2e-5), ("aligntok-d64", 2e-4, 4e-5)],
)
def test_the_encoder_has_the_settings_of_a_vit_in_stage_2(name, lr, of_encoder) -> None:
    """aligntok.md §4.2; for d = 64, twice the rates."""
    optimizer = load_recipe(f"recipe:{name}").stages[1].optimizer
    encoder, rest = optimizer.of("encoder"), optimizer.of("decoder")
    assert (encoder.lr, encoder.betas, encoder.warmup) == (of_encoder, (0.9, 0.95), 2000)
    assert (rest.lr, rest.betas, rest.warmup, rest.schedule) == (lr, (0.5, 0.9), 0, "constant")


@pytest.mark.parametrize("name", ["aligntok", "aligntok-d64"])
def test_stage_2_ends_when_probe_and_rfid_stay_within_a_hundredth_for_20_000_steps(name) -> None:
    """aligntok.md §4.2."""
    stop = load_recipe(f"recipe:{name}").stages[1].stop
    assert stop is not None
    assert [metric.name for metric in stop.metrics] == ["fid"]
    assert stop.probe is not None
    assert (stop.patience, stop.tolerance) == (20_000, 0.01)

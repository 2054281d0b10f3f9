"""The loss ``vf`` against numpy, and what it trains and leaves alone."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import underpaint
from underpaint import ConfigError, DataError, Encoder, EncoderInfo, Features, Loss, StepSizes, StepTensors


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Outside(Encoder):
    """An encoder of its own: one map, linear in the image, 4 px a cell."""

    info = EncoderInfo(
        channels=(9,),
        stride=4,
        patch=4,
        native_size=(16, 16),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        layers=(0,),
        licence="none",
        source="this test",
    )

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(3, 9, 4, 4)
        self.drop = nn.Dropout(0.9)

    def forward(self, images: Tensor) -> Features:
        return Features((self.drop(self.map(images)),))


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    create = underpaint.create

    def fake(kind: Any, name: str, **options: Any) -> Any:
        if (kind, name) == ("encoder", "outside"):
            made.append((Outside(), options))
            return made[-1][0]
        return create(kind, name, **options)

    monkeypatch.setattr(underpaint, "create", fake)
    return made


def make(grid: tuple[int, int] = (4, 6), image: tuple[int, int] = (16, 24), **options: Any) -> Loss:
    torch.manual_seed(0)
    loss: Loss = underpaint.create("loss", "vf", **options)
    loss.prepare(StepSizes(image=image, latent_channels=5, grid=grid, feature_channels=(7, 12)))
    return loss


def step(
    latent: tuple[int, int] = (4, 6), cells: tuple[int, int] = (4, 6), image: tuple[int, int] = (16, 24)
) -> StepTensors:
    return StepTensors(
        step=0,
        inputs=random(2, 3, *image, seed=3),
        latents=random(2, 5, *latent),
        features=Features((random(2, 7, *cells, seed=1), random(2, 12, *cells, seed=2))),
    )


def in_numpy(weight: Tensor, z: Tensor, features: Tensor, distance: float, cosine: float) -> tuple[float, float]:
    p = np.einsum("oc,bcn->bon", weight.detach().double().numpy()[:, :, 0, 0], z.double().flatten(2).numpy())
    f = features.detach().double().flatten(2).numpy()
    p, f = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (p, f))
    total, alike = [], []
    for b in range(len(p)):
        for i in range(p.shape[2]):
            alike.append(max(0.0, 1 - cosine - p[b, :, i] @ f[b, :, i]))
            for j in range(p.shape[2]):
                gap = abs(p[b, :, i] @ p[b, :, j] - f[b, :, i] @ f[b, :, j])
                total.append(max(0.0, gap - distance))
    return float(np.mean(total)), float(np.mean(alike))


@torch.no_grad()
def values(loss: Loss, tensors: StepTensors) -> dict[str, float]:
    return {name: float(value) for name, value in loss(tensors).items()}


@pytest.mark.parametrize(("distance", "cosine"), [(0.0, 0.0), (0.25, 0.5)])
def test_agrees_with_float64_numpy(distance: float, cosine: float) -> None:
    loss = make(distance_margin=distance, cosine_margin=cosine, distance_weight=2.0, cosine_weight=3.0)
    tensors = step()
    assert tensors.latents is not None
    assert tensors.features is not None
    wanted = in_numpy(loss.project.weight, tensors.latents, tensors.features.maps[-1], distance, cosine)
    found = values(loss, tensors)
    assert list(found) == ["vf_distance", "vf_cosine"]
    assert found["vf_distance"] == pytest.approx(2 * wanted[0], rel=1e-5)
    assert found["vf_cosine"] == pytest.approx(3 * wanted[1], rel=1e-5)


def test_known_values_by_construction() -> None:
    # Projected latents equal to the features cost nothing; opposite ones 2 in the cosine, and nothing in distances.
    loss, tensors = make(), step()
    assert tensors.latents is not None
    tensors.features = Features((loss.project(tensors.latents).detach(),))
    same = values(loss, tensors)
    assert same["vf_distance"] == pytest.approx(0.0, abs=1e-6)
    assert same["vf_cosine"] == pytest.approx(0.0, abs=1e-6)
    tensors.features = Features((-tensors.features.maps[0],))
    opposite = values(loss, tensors)
    assert opposite["vf_distance"] == pytest.approx(0.0, abs=1e-6)
    assert opposite["vf_cosine"] == pytest.approx(2.0, rel=1e-6)


def test_published_shape_of_the_projection() -> None:
    loss: Loss = underpaint.create("loss", "vf")
    loss.prepare(StepSizes(image=(256, 256), latent_channels=32, grid=(16, 16), feature_channels=(1024, 1024, 1024)))
    assert {name: tuple(p.shape) for name, p in loss.named_parameters()} == {"project.weight": (1024, 32, 1, 1)}
    assert type(loss).trains


@pytest.mark.parametrize(
    ("cells", "resize"),
    [
        ((8, 12), lambda f: F.avg_pool2d(f, 2)),
        ((4, 12), lambda f: F.avg_pool2d(f, (1, 2))),
        ((6, 9), lambda f: F.interpolate(f, size=(4, 6), mode="bilinear", antialias=True)),
        ((2, 3), lambda f: F.interpolate(f, size=(4, 6), mode="bilinear")),
    ],
)
def test_features_come_to_the_grid_of_the_latents(cells: tuple[int, int], resize: Any) -> None:
    loss, tensors = make(), step(cells=cells)
    assert tensors.latents is not None
    assert tensors.features is not None
    wanted = in_numpy(loss.project.weight, tensors.latents, resize(tensors.features.maps[-1]), 0.0, 0.0)
    assert list(values(loss, tensors).values()) == pytest.approx(wanted, rel=1e-5)


def test_an_encoder_of_its_own(outside: Any) -> None:
    loss, tensors = make(encoder="outside", options={"layers": [3]}), step()
    encoder, options = outside[0]
    assert options == {"layers": [3]}
    assert loss.project.weight.shape == (9, 5, 1, 1)
    loss.train().requires_grad_(True)
    assert tensors.latents is not None
    assert tensors.inputs is not None
    wanted = in_numpy(loss.project.weight, tensors.latents, encoder.map(tensors.inputs), 0.0, 0.0)
    assert list(values(loss, tensors).values()) == pytest.approx(wanted, rel=1e-5)
    # Neither trained nor saved; but it moves.
    assert [name for name, _ in loss.named_parameters()] == list(loss.state_dict()) == ["project.weight"]
    assert not any(p.requires_grad for p in encoder.parameters())
    assert pickle.loads(pickle.dumps(loss))(tensors).keys() == {"vf_distance", "vf_cosine"}
    loss.to("meta")
    assert encoder.map.weight.device.type == "meta"


def test_images_that_do_not_fit_the_encoder_are_refused_before_training() -> None:
    with pytest.raises(DataError, match="18×24 px do not divide"):
        make(encoder="outside", image=(18, 24))


def test_gradients_reach_latents_and_projection_only() -> None:
    loss, tensors = make(), step()
    assert tensors.latents is not None
    assert tensors.features is not None
    tensors.latents.requires_grad_()
    for value in tensors.features.maps:
        value.requires_grad_()
    sum(loss(tensors).values()).backward()
    assert tensors.latents.grad is not None
    assert float(tensors.latents.grad.abs().sum()) > 0
    assert float(loss.project.weight.grad.abs().sum()) > 0
    assert all(value.grad is None for value in tensors.features.maps)


def test_a_training_step_brings_them_together() -> None:
    loss, tensors = make(), step()
    optimizer = torch.optim.Adam(loss.parameters(), 0.05)
    before = values(loss, tensors)
    for _ in range(50):
        optimizer.zero_grad()
        sum(loss(tensors).values()).backward()
        optimizer.step()
    assert sum(values(loss, tensors).values()) < 0.9 * sum(before.values())


def test_similarities_are_float32_under_autocast() -> None:
    loss, tensors = make(), step()
    with torch.autocast("cpu", torch.bfloat16):
        terms = loss(tensors)
    exact = values(loss, tensors)
    for name, value in terms.items():
        assert value.dtype == torch.float32
        # The projection alone is rounded.
        assert float(value.detach()) == pytest.approx(exact[name], rel=3e-3)


def test_options_that_mean_nothing_are_refused() -> None:
    assert list(values(make(cosine_weight=0.0), step())) == ["vf_distance"]
    assert list(values(make(distance_weight=0.0), step())) == ["vf_cosine"]
    with pytest.raises(ConfigError, match="are both 0; leave one above 0"):
        make(distance_weight=0.0, cosine_weight=0.0)
    with pytest.raises(ConfigError, match="encoder is null; name one"):
        make(options={"layers": [1]})

"""The loss of representation alignment: closed forms, grids, the companion token, what learns and what is saved."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import underpaint
from underpaint import ConfigError, DataError, Features, Prediction, StepSizes, StepTensors

ENCODER = {"width": 16, "depth": 2, "heads": 2}
SIZES = StepSizes(image=(32, 48), latent_channels=4, grid=(8, 12), hidden_width=20)


def make(sizes: StepSizes = SIZES, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"encoder": "tiny/vit@random", "options": ENCODER, "projector": 12, "layer": 3, **options}
    loss: Any = underpaint.create("loss", "repa", **options)
    loss.prepare(sizes)
    return loss


def step(tokens: int = 24, grid: tuple[int, int] = (8, 12), batch: int = 2, companion: bool = False) -> StepTensors:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(batch, tokens + companion, 20, generator=generator)
    velocity = torch.zeros(batch, 4, *grid)
    vector = torch.zeros(batch, 16) if companion else None
    return StepTensors(
        step=0,
        inputs=torch.rand(batch, 3, 32, 48, generator=generator) * 2 - 1,
        prediction=Prediction(velocity, {3: hidden}, vector),
    )


def hidden(given: StepTensors) -> Tensor:
    assert given.prediction is not None
    return given.prediction.hidden[3]


def targets(loss: Any, given: StepTensors) -> Features:
    """Features of an encoder made apart from the loss; its random weights are the same everywhere."""
    with torch.no_grad():
        return underpaint.create("encoder", "tiny/vit@random", **ENCODER)(given.inputs)


def minus_cosine(loss: Any, tokens: Tensor, wanted: np.ndarray) -> float:
    """In float64 numpy: three layers with x·sigmoid(x) between them, then the cosine of each token."""
    x = tokens.detach().double().numpy()
    for index in (0, 2, 4):
        layer = loss.projector[index]
        x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        x = x if index == 4 else x / (1 + np.exp(-x))
    cosine = (x * wanted).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(wanted, axis=-1)
    return float(-cosine.mean())


def rows(cells: Tensor) -> np.ndarray:
    """B×C×h×w cells as B×N×C tokens, row by row."""
    return np.stack(
        [[c[:, i, j] for i in range(c.shape[1]) for j in range(c.shape[2])] for c in cells.double().numpy()]
    )


# --------------------------------------------------------------------------------------------------- the value


def test_equal_grids_in_closed_form() -> None:
    loss, given = make(), step()
    (cells,) = targets(loss, given).maps
    assert cells.shape == (2, 16, 4, 6)
    terms = loss(given)
    assert list(terms) == ["repa"]
    assert terms["repa"].item() == pytest.approx(minus_cosine(loss, hidden(given), rows(cells)), abs=1e-6)


def test_bounds_are_reached() -> None:
    loss, given = make(), step()
    tokens = torch.from_numpy(rows(targets(loss, given).maps[0])).float()
    loss.projector = nn.Sequential(nn.Linear(16, 16, bias=False))
    for sign in (1.0, -1.0):
        with torch.no_grad():
            loss.projector[0].weight.copy_(sign * torch.eye(16))
        prediction = Prediction(torch.zeros(2, 4, 8, 12), {3: tokens * 7})
        assert loss(attrs.evolve(given, prediction=prediction))["repa"].item() == pytest.approx(-sign, abs=1e-5)


@pytest.mark.parametrize(("tokens", "grid", "size"), [(96, (8, 12), (8, 12)), (6, (8, 12), (2, 3))])
def test_other_grids_are_resized_bilinearly(tokens: int, grid: tuple[int, int], size: tuple[int, int]) -> None:
    loss, given = make(), step(tokens, grid)
    cells = F.interpolate(targets(loss, given).maps[0].double(), size=size, mode="bilinear", antialias=True)
    assert loss(given)["repa"].item() == pytest.approx(minus_cosine(loss, hidden(given), rows(cells)), abs=1e-6)


def test_a_companion_goes_with_the_pooled_output() -> None:
    loss, given = make(), step(companion=True)
    features = targets(loss, given)
    assert features.pooled is not None
    wanted = np.concatenate((features.pooled.double().numpy()[:, None], rows(features.maps[0])), axis=1)
    assert loss(given)["repa"].item() == pytest.approx(minus_cosine(loss, hidden(given), wanted), abs=1e-6)


def test_the_last_map_is_the_target() -> None:
    several = make(options={**ENCODER, "layers": (0, 1)})
    assert several(step())["repa"].item() == pytest.approx(make()(step())["repa"].item(), abs=1e-6)


def test_bfloat16_hidden_states() -> None:
    loss, given = make(), step()
    exact = loss(given)["repa"]
    prediction = Prediction(torch.zeros(2, 4, 8, 12).bfloat16(), {3: hidden(given).bfloat16()})
    for projector in (loss, copy.deepcopy(loss).bfloat16()):
        got = projector(attrs.evolve(given, prediction=prediction))["repa"]
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(exact.item(), abs=0.02)


# ------------------------------------------------------------------------------------------------------- iREPA


def convolved(loss: Any, tokens: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """In float64 numpy: each cell's 3×3 neighbours times the kernel, with zeros outside of the grid."""
    kernel = loss.projector.weight.detach().double().numpy()
    x = tokens.detach().double().numpy().reshape(len(tokens), *grid, -1)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((len(x), *grid, len(kernel))) + loss.projector.bias.detach().double().numpy()
    for i, j in np.ndindex(3, 3):
        out += padded[:, i : i + grid[0], j : j + grid[1]] @ kernel[:, :, i, j].T
    return out.reshape(len(x), grid[0] * grid[1], -1)


def minus_mean_cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(-((x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)).mean())


def normalised(tokens: np.ndarray, share: float) -> np.ndarray:
    """B×N×C targets as iREPA's formula has them."""
    mean = tokens.mean(axis=1, keepdims=True)
    return (tokens - share * mean) / (tokens.std(axis=1, ddof=1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("companion", [False, True])
def test_a_convolution_projects_the_map_of_tokens(companion: bool) -> None:
    loss, given = make(projection="conv"), step(companion=companion)
    features = targets(loss, given)
    wanted, tokens = rows(features.maps[0]), hidden(given)
    x = convolved(loss, tokens[:, companion:], (4, 6))
    if companion:
        assert features.pooled is not None
        wanted = np.concatenate((features.pooled.double().numpy()[:, None], wanted), axis=1)
        x = np.concatenate((convolved(loss, tokens[:, :1], (1, 1)), x), axis=1)
    assert loss(given)["repa"].item() == pytest.approx(minus_mean_cosine(x, wanted), abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_targets_are_normalised_over_the_cells_in_closed_form(share: float) -> None:
    loss, given = make(spatial=share), step(companion=True)
    features = targets(loss, given)
    assert features.pooled is not None
    cells = normalised(rows(features.maps[0]), share)
    wanted = np.concatenate((features.pooled.double().numpy()[:, None], cells), axis=1)
    assert loss(given)["repa"].item() == pytest.approx(minus_cosine(loss, hidden(given), wanted), abs=1e-5)


def test_targets_are_normalised_on_the_encoders_grid() -> None:
    loss, given = make(spatial=0.5, projection="conv"), step(6, (8, 12))
    cells = torch.from_numpy(normalised(rows(targets(loss, given).maps[0]), 0.5)).transpose(1, 2).unflatten(2, (4, 6))
    wanted = rows(F.interpolate(cells, size=(2, 3), mode="bilinear", antialias=True))
    x = convolved(loss, hidden(given), (2, 3))
    assert loss(given)["repa"].item() == pytest.approx(minus_mean_cosine(x, wanted), abs=1e-5)


def test_what_every_cell_shares_is_no_target_of_irepa() -> None:
    loss, given = make(spatial=1.0), step()
    before = loss(given)["repa"]
    (encoder,) = loss.held
    plain = encoder.forward
    encoder.forward = lambda images: Features(tuple(3.0 * m + 5.0 for m in plain(images).maps), None)
    assert loss(given)["repa"].item() == pytest.approx(before.item(), abs=1e-5)


def test_the_convolution_learns_in_bfloat16_and_is_saved() -> None:
    loss, given = make(projection="conv", spatial=0.8).bfloat16(), step()
    loss(given)["repa"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    assert {name: tuple(p.shape) for name, p in loss.state_dict().items()} == {
        "projector.weight": (16, 20, 3, 3),
        "projector.bias": (16,),
    }


def test_targets_of_one_cell_have_no_deviation() -> None:
    with pytest.raises(ConfigError, match="over the cells of an image, and the encoder .* gives one cell"):
        make(attrs.evolve(SIZES, image=(8, 8)), spatial=1.0)
    make(attrs.evolve(SIZES, image=(8, 8)))


# ------------------------------------------------------------------------------------------------ what learns


def test_the_projector_is_that_of_the_published_models() -> None:
    # REPA's SiT-B/2 has 137,845,008 parameters, and 130,500,112 without it.
    loss = make(attrs.evolve(SIZES, hidden_width=768), options={"width": 768, "depth": 1, "heads": 2}, projector=2048)
    assert sum(p.numel() for p in loss.parameters()) == 137_845_008 - 130_500_112


def test_only_the_projector_learns_and_is_saved() -> None:
    loss, given = make(), step()
    assert loss.trains is True
    assert loss.layers == (3,)
    assert loss.needs == {"inputs", "prediction"}
    assert {name.partition(".")[0] for name in loss.state_dict()} == {"projector"}
    hidden(given).requires_grad_(True)
    loss(given)["repa"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    assert float(hidden(given).grad.abs().sum()) > 0


def test_it_learns() -> None:
    loss, given = make(), step()
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    first = loss(given)["repa"].item()
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(given)["repa"]
        value.backward()
        optimizer.step()
    assert value.item() < min(-0.8, first - 0.2)


def test_it_can_be_pickled_and_loaded() -> None:
    loss, given = make(), step()
    again = pickle.loads(pickle.dumps(loss))
    assert torch.equal(again(given)["repa"], loss(given)["repa"])
    other = make()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(given)["repa"], loss(given)["repa"])


# --------------------------------------------------------------------------------------------------- refusals


def test_a_stage_without_a_backbone_is_refused() -> None:
    with pytest.raises(ConfigError, match="aligns hidden states of a backbone, and this stage trains none"):
        make(attrs.evolve(SIZES, hidden_width=0))


def test_images_of_another_shape_are_refused() -> None:
    # 4×6 cells of the encoder, 6×6 tokens.
    with pytest.raises(DataError, match="gives 4×6 cells and the backbone has 6×6 tokens"):
        make()(step(tokens=36, grid=(6, 6)))


def test_images_that_do_not_divide_are_refused() -> None:
    given = attrs.evolve(step(), inputs=torch.zeros(2, 3, 30, 48))
    with pytest.raises(DataError, match="30×48 px do not divide"):
        make()(given)


@pytest.mark.parametrize(("pooled", "found"), [(None, "has none"), (torch.zeros(2, 5), "has one of 5 channels")])
def test_a_companion_without_a_fitting_target_is_refused(pooled: Tensor | None, found: str) -> None:
    loss, given = make(), step(companion=True)
    (encoder,) = loss.held
    encoder.forward = lambda images: Features((torch.zeros(2, 16, 4, 6),), pooled)
    with pytest.raises(DataError, match=found):
        loss(given)

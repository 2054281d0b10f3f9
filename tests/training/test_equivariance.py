"""Equivariance regularisation: which views are drawn, and what is compared with what."""

from __future__ import annotations

from collections import Counter

import pytest
import stage_cases as cases
import torch
from torch import Tensor

from underpaint.config.stages import EquivarianceConfig
from underpaint.data.transforms import to_tensor
from underpaint.errors import ConfigError
from underpaint.interfaces.loss import Loss, StepTensors
from underpaint.training import tokenizer_stage
from underpaint.training.equivariance import View, draw_view, resized, turned_latents

PAPER = EquivarianceConfig()


def drawn(config: EquivarianceConfig, *, square: bool, count: int = 20_000) -> Counter[View]:
    torch.manual_seed(0)
    return Counter(draw_view(config, square=square) for _ in range(count))


def test_the_probabilities_are_those_of_the_paper() -> None:
    # vfm_vae.md §4.5: latents in half of the steps, 16 views evenly, of which one is no change; inputs in a quarter of
    # the others, three sizes evenly; 40.6 % of the steps as they are.
    shares = {view: count / 20_000 for view, count in drawn(PAPER, square=True).items()}
    expected = {View(latent_scale=s, turns=k): 0.5 / 16 for s in (0.25, 0.5, 0.75, 1.0) for k in range(4)}
    expected |= {View(input_scale=s): 0.5 * 0.25 / 3 for s in (0.25, 0.5, 0.75)}
    expected[View()] = 0.5 / 16 + 0.5 * 0.75
    assert expected[View()] == pytest.approx(0.406, abs=5e-4)
    assert shares.keys() == expected.keys()
    for view, share in expected.items():
        # Four standard deviations.
        assert shares[view] == pytest.approx(share, abs=4 * (share * (1 - share) / 20_000) ** 0.5)


def test_an_oblong_image_is_never_put_on_its_side() -> None:
    turns = Counter[int]()
    for view, count in drawn(PAPER, square=False, count=4000).items():
        if view.latent_scale != 1.0:
            turns[view.turns] += count
    assert turns.keys() == {0, 2}
    assert turns[2] / turns.total() == pytest.approx(0.5, abs=0.06)


def test_the_shares_can_be_all_or_nothing() -> None:
    assert drawn(EquivarianceConfig(latent=0.0, input=0.0), square=True, count=50).keys() == {View()}
    always = drawn(EquivarianceConfig(latent=1.0, scales=(1.0,), input=0.0), square=True, count=200)
    assert always.keys() == {View(turns=k) for k in range(4)}
    inputs = drawn(EquivarianceConfig(latent=0.0, input=1.0, scales=(0.5, 1.0)), square=True, count=50)
    assert inputs.keys() == {View(input_scale=0.5)}
    with pytest.raises(ConfigError, match="no scale is below 1; set input to 0"):
        EquivarianceConfig(scales=(1.0,))


def test_a_draw_is_the_seed_and_nothing_else() -> None:
    first = [draw_view(PAPER, square=True) for _ in range(20) if torch.manual_seed(7)]
    assert len(set(first)) == 1
    torch.manual_seed(7)
    assert len({draw_view(PAPER, square=True) for _ in range(20)}) > 1


def test_latents_are_turned_and_resized() -> None:
    latents = torch.arange(16.0).view(1, 1, 4, 4)
    turned = turned_latents(latents, View(turns=1))
    # Counter-clockwise: the right column becomes the upper row.
    assert turned[0, 0, 0].tolist() == [3.0, 7.0, 11.0, 15.0]
    # Bilinear without antialiasing, halfway between cells: means of 2×2.
    half = turned_latents(latents, View(latent_scale=0.5))
    assert half[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert turned_latents(latents, View(latent_scale=0.75)).shape == (1, 1, 3, 3)
    assert turned_latents(torch.zeros(1, 1, 2, 3), View(latent_scale=0.25)).shape == (1, 1, 1, 1)
    assert torch.equal(turned_latents(latents, View()), latents)


def test_resizing_keeps_what_has_the_size() -> None:
    images = torch.rand(1, 3, 8, 12)
    assert resized(images, 8, 12) is images
    # Antialiased: a checkerboard of single pixels becomes grey.
    board = (torch.arange(16)[:, None] + torch.arange(16)[None]).remainder(2).float().expand(1, 3, 16, 16)
    assert float((resized(board, 4, 4) - 0.5).abs().max()) < 0.05


class Recorder:
    """Keeps what the losses see."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loss: Loss) -> None:
        self.seen: list[StepTensors] = []
        real = loss.forward

        def forward(step: StepTensors) -> dict[str, Tensor]:
            self.seen.append(step)
            return real(step)

        monkeypatch.setattr(loss, "forward", forward)


def look(monkeypatch: pytest.MonkeyPatch, view: View, height: int, width: int) -> tuple[StepTensors, StepTensors]:
    """Return what the loss and the critic see of a step with this view."""
    monkeypatch.setattr(tokenizer_stage, "draw_view", lambda config, *, square: view)
    module, losses = cases.make_module(["l1"], size=(height, width), equivariance=PAPER)
    recorder = Recorder(monkeypatch, losses.items[0].loss)
    _, _, shown = module(cases.pixels(2, height, width), 0)
    return recorder.seen[0], shown


@pytest.mark.parametrize("turns", range(4))
def test_a_turned_latent_is_compared_with_the_turned_image(monkeypatch: pytest.MonkeyPatch, turns: int) -> None:
    step, shown = look(monkeypatch, View(turns=turns), 16, 16)
    images = to_tensor(cases.pixels(2, 16, 16))
    assert step.images is not None
    assert step.inputs is not None
    assert shown.images is not None
    assert torch.equal(step.images, torch.rot90(images, turns, (-2, -1)))
    assert torch.equal(step.inputs, images)
    assert torch.equal(shown.images, step.images)


@pytest.mark.parametrize(
    ("view", "size", "expected"),
    [
        (View(latent_scale=0.5), (32, 32), (16, 16)),
        (View(latent_scale=0.75, turns=3), (32, 32), (24, 24)),
        (View(latent_scale=0.25), (32, 32), (8, 8)),
        (View(latent_scale=0.5, turns=2), (32, 48), (16, 24)),
        (View(turns=2), (16, 32), (16, 32)),
        # Whole cells of 8 px: 0.75 of three is two and a quarter.
        (View(latent_scale=0.75), (16, 24), (16, 16)),
    ],
)
def test_target_and_reconstruction_have_the_size_of_the_view(
    monkeypatch: pytest.MonkeyPatch, view: View, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    step, shown = look(monkeypatch, view, *size)
    assert step.images is not None
    assert step.inputs is not None
    assert step.reconstruction is not None
    assert shown.reconstruction is not None
    assert step.inputs.shape[-2:] == size
    assert step.images.shape[-2:] == step.reconstruction.image.shape[-2:] == expected
    assert shown.reconstruction.image.shape[-2:] == expected
    assert not shown.reconstruction.image.requires_grad
    turned = torch.rot90(resized(to_tensor(cases.pixels(2, *size)), *expected), view.turns, (-2, -1))
    assert torch.equal(step.images, turned)


@pytest.mark.parametrize(
    ("scale", "size", "expected"),
    [
        (0.5, (32, 32), (16, 16)),
        # Cells of 8 px: of seven, five and a quarter are five.
        (0.75, (32, 56), (24, 40)),
        (0.25, (16, 32), (8, 8)),
        (0.25, (8, 8), (8, 8)),
    ],
)
def test_inputs_shrink_to_whole_cells(
    monkeypatch: pytest.MonkeyPatch, scale: float, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    step, _ = look(monkeypatch, View(input_scale=scale), *size)
    assert step.inputs is not None
    assert step.images is not None
    assert step.reconstruction is not None
    assert step.inputs.shape[-2:] == step.reconstruction.image.shape[-2:] == expected
    assert torch.equal(step.images, step.inputs)


def run(mode: bool, seed: int) -> tuple[tuple[int, ...], float]:
    module, _ = cases.make_module(["l1"], size=(32, 32), equivariance=PAPER)
    module.train(mode)
    torch.manual_seed(seed)
    with torch.no_grad():
        total, _, shown = module(cases.pixels(2, 32, 32), 0)
    assert shown.images is not None
    return tuple(shown.images.shape), float(total)


def test_the_view_follows_the_seed_of_the_step() -> None:
    found = [run(True, seed) for seed in range(12)]
    assert found == [run(True, seed) for seed in range(12)]
    assert len(set(found)) > 3


def test_it_is_off_in_evaluation() -> None:
    assert len({run(False, seed) for seed in range(12)}) == 1
    assert run(False, 0)[0] == (2, 3, 32, 32)

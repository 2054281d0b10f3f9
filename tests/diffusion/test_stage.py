"""What diffusion training computes: the target of each path, and the loss by time."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from tests.diffusion.networks import Nothing
from torch import Tensor, nn

from underpaint import Backbone, Condition, Prediction, StepSizes
from underpaint.config.component import ComponentConfig
from underpaint.config.diffusion import DiffusionConfig, TimeConfig
from underpaint.diffusion.paths import PATHS
from underpaint.training.diffusion_stage import DiffusionModule, StepNoise, diffusion_losses

SHAPE = (4, 3, 5)
SIZES = StepSizes(image=(24, 40), latent_channels=4, grid=(3, 5), hidden_width=1)
CPU = torch.device("cpu")


class Scaled(Backbone):
    """Predicts a multiple of its input."""

    width = patch = 1

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.7))
        self.seen: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, layers: Collection[int] = ()) -> Prediction:
        self.seen = [x_t.detach(), t]
        return Prediction(self.factor * x_t)


def config(**changes: object) -> DiffusionConfig:
    parts = {"backbone": ComponentConfig(name="sit"), "conditioner": ComponentConfig(name="labels")}
    return DiffusionConfig(**parts, steps=1, **changes)  # type: ignore[arg-type]


def run(t: Tensor, **how: object) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor, list[Tensor]]:
    batch = len(t)
    x0, noise = (torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    backbone = Scaled()
    module = DiffusionModule(backbone, Nothing(), diffusion_losses(config(), CPU, SIZES), **how)  # type: ignore[arg-type]
    drop = torch.zeros(batch, dtype=torch.bool)
    loss, terms = module(x0, torch.zeros(batch, dtype=torch.long), noise, t, drop, 0)
    return loss, terms, x0, noise, backbone.seen


@pytest.mark.parametrize("path", ["linear", "cosine", "vp"])
@pytest.mark.parametrize("predicts", ["velocity", "noise", "data"])
def test_the_loss_is_that_of_the_path(path: str, predicts: str) -> None:
    t = torch.linspace(0.05, 0.95, 8)
    loss, terms, x0, noise, (x_t, seen) = run(t, path=path, predicts=predicts)
    c = PATHS[path].coefficients(t).for_latents(x0)
    targets = {"velocity": c.d_alpha * x0 + c.d_sigma * noise, "noise": noise, "data": x0}
    state = c.alpha * x0 + c.sigma * noise
    torch.testing.assert_close(x_t, state)
    assert torch.equal(seen, t)
    torch.testing.assert_close(loss, (0.7 * state - targets[predicts]).square().mean())
    torch.testing.assert_close(terms["velocity"], loss.detach())


def test_by_default_it_is_flow_matching() -> None:
    t = torch.tensor([0.25, 0.5])
    loss, _, x0, noise, _ = run(t)
    wide = t.view(-1, 1, 1, 1)
    torch.testing.assert_close(loss, (0.7 * ((1 - wide) * x0 + wide * noise) - (noise - x0)).square().mean())


def test_losses_by_time_are_sums_with_counts() -> None:
    t = torch.tensor([0.01, 0.35, 0.31, 0.999, 1.0])
    _, terms, x0, noise, (x_t, _) = run(t)
    errors = (0.7 * x_t - (noise - x0)).square().flatten(1).mean(1)
    by_time = {name: value for name, value in terms.items() if name.startswith("loss_t/")}
    assert list(by_time) == [f"loss_t/{0.05 + i / 10:.2f}" for i in range(10)]
    expected = {
        "loss_t/0.05": (errors[0], 1),
        "loss_t/0.35": (errors[1:3].sum(), 2),
        "loss_t/0.95": (errors[3:].sum(), 2),
    }
    for name, pair in by_time.items():
        total, count = expected.get(name, (torch.tensor(0.0), 0))
        torch.testing.assert_close(pair, torch.stack([total, torch.tensor(float(count))]))
        assert not pair.requires_grad
    # Over all of them: the mean loss.
    whole = torch.stack(list(by_time.values())).sum(0)
    torch.testing.assert_close(whole[0] / whole[1], terms["velocity"])


def test_one_bad_sample_spoils_its_own_tenth_only() -> None:
    t = torch.tensor([0.05, 0.55])
    module = DiffusionModule(Scaled(), Nothing(), diffusion_losses(config(), CPU, SIZES))
    x0 = torch.zeros(2, *SHAPE)
    x0[0] = torch.nan
    _, terms = module(x0, torch.zeros(2, dtype=torch.long), torch.ones_like(x0), t, torch.zeros(2, dtype=torch.bool), 0)
    assert [name for name, value in terms.items() if value.isnan().any()] == ["velocity", "loss_t/0.05"]


def test_times_follow_step_and_shape() -> None:
    time = TimeConfig(std=0.01, mean=-3.0, uniform_from=10, shift="latent")
    noise = StepNoise(config(batch=64, time=time), (64, 16, 16), 0, CPU)
    early, late = (noise.rows(step, slice(0, 64))[1] for step in (9, 10))
    # √(64·16·16/4096) = 2, and the sigmoid of −3 is 0.0474.
    assert float(early.mean()) == pytest.approx(2 * 0.0474 / 1.0474, abs=1e-3)
    assert float(late.std()) > 0.15

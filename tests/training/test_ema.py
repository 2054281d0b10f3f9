"""The ramp of the moving average: its closed form, in the engine, and when resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import stage_cases as cases
import torch
from torch import Tensor

from underpaint.training.engine import Engine
from underpaint.training.ranks import Ranks
from underpaint.training.schedule import ema_decay


def test_without_a_ramp_it_decays_evenly() -> None:
    assert [ema_decay(0.9, None, step) for step in (1, 2, 1000)] == [0.9] * 3


@pytest.mark.parametrize("step", [1, 10, 1000, 6249, 6250, 6251, 85_900])
def test_the_ramp_of_the_paper(step: int) -> None:
    # vfm_vae.md §4.4: β = 0.5^(batch / min(160,000, 0.05·images seen)) at batch 512, 0.99778 in the end.
    steady = 0.5 ** (512 / 160_000)
    assert steady == pytest.approx(0.99778, abs=5e-5)
    expected = 0.5 ** (512 / min(160_000, 0.05 * 512 * step))
    assert ema_decay(steady, 0.05, step) == pytest.approx(expected, rel=1e-12)


def test_the_half_life_is_a_share_of_the_steps() -> None:
    # 20 steps at the decay of step 100 with a ramp of 0.2 halve what was there.
    assert ema_decay(0.999999, 0.2, 100) ** 20 == pytest.approx(0.5)
    assert ema_decay(0.99, 1e-9, 1) == 0.0


def weights(engine: Engine, kind: str = "raw") -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in engine.state(kind).items() if "conv_out" in name}


def train(engine: Engine, first: int, last: int, average: dict[str, Tensor]) -> dict[str, Tensor]:
    """Train, and follow the average in float64."""
    for step in range(first, last):
        loss, _, _ = engine(cases.pixels(2, seed=step), step)
        engine.backward(loss)
        engine.step()
        decay = min(0.75, 0.5 ** (1 / (0.5 * (step + 1))))
        average = {name: decay * average[name] + (1 - decay) * w for name, w in weights(engine).items()}
    return average


def make(ranks: Ranks) -> Engine:
    module, _ = cases.make_module(["l1"], ("decoder.conv_out",))
    return cases.make_engine(module, ranks, batch=2, ema=0.75, ema_ramp=0.5)


def test_the_engine_follows_it_and_goes_on_with_it(alone: Ranks, tmp_path: Path) -> None:
    # Decays 1/4, 1/2, 0.63, 0.71, then 0.75.
    engine = make(alone)
    average = train(engine, 0, 3, weights(engine))
    engine.save(tmp_path)
    average = train(engine, 3, 7, average)
    for name, tensor in weights(engine, "ema").items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-7)
    resumed = make(alone)
    resumed.load(tmp_path)
    train(resumed, 3, 7, weights(resumed))
    for kind in ("raw", "ema"):
        ours, theirs = engine.state(kind), resumed.state(kind)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    engine.close()
    resumed.close()

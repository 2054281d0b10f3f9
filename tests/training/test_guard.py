"""The guard against losses that jump: what it drops, on one rank and two, after a resume, and in critics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import stage_cases as cases
import torch
from processes import on_ranks
from torch import Tensor

from underpaint.config.stages import GuardConfig
from underpaint.errors import UnderpaintError
from underpaint.training.guard import Guard
from underpaint.training.ranks import Ranks


def verdicts(values: Sequence[float | None], **config: Any) -> list[bool]:
    guard = Guard(GuardConfig(**config), ["a"], lambda tensor: tensor)
    given = [{} if value is None else {"a": torch.tensor(value)} for value in values]
    return [bool(guard(value, step)) for step, value in enumerate(given)]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([5.0, 0.5, 5.0, 5.1], [True, True, True, True]),
        ([0.5, 5.1], [True, False]),
        # The step before is the measure, also where it was dropped: what stays high is dropped once.
        ([0.5, 50.0, 50.0, 0.5, 50.0], [True, False, True, True, False]),
        # A value that is not finite is no measure, and dropping it is the engine's.
        ([0.5, math.nan, 5.1, 50.0], [True, True, False, True]),
        ([0.5, math.inf, 5.1], [True, False, False]),
        # Outside of the window of a loss its last value stays.
        ([None, 0.5, None, 5.1], [True, True, True, False]),
    ],
)
def test_what_exceeds_ten_times_the_value_before_is_dropped(values: list[float | None], wanted: list[bool]) -> None:
    assert verdicts(values) == wanted


def test_factor_and_first_step_are_settings() -> None:
    assert verdicts([1.0, 2.9, 9.0, 9.0], factor=3.0) == [True, True, False, True]
    assert verdicts([1.0, 20.0, 400.0, 8000.0], after=2) == [True, True, False, False]


def test_losses_are_watched_one_by_one() -> None:
    guard = Guard(GuardConfig(), ["a", "b"], lambda tensor: tensor)
    rows = [(100.0, 0.1), (100.0, 1.1), (1.0, 1.1)]
    found = [bool(guard({"a": torch.tensor(a), "b": torch.tensor(b)}, i)) for i, (a, b) in enumerate(rows)]
    assert found == [True, False, True]


def test_reconstruction_losses_of_fixed_weight_are_watched() -> None:
    configs = [
        "l1",
        {"name": "ssim", "weight": 0.5},
        {"name": "mse", "adaptive": "decoder"},
        {"name": "vf", "weight": 0.1},
        cases.PATCHGAN,
    ]
    module, losses = cases.make_module(configs)
    assert module.add_guard(GuardConfig(), lambda tensor: tensor) is not None
    assert module.guard.previous.shape == (2,)
    terms = module(cases.pixels(), 0)[1]
    assert losses.reconstruction.keys() == {"l1", "ssim"}
    assert all(torch.equal(losses.reconstruction[key], terms[key]) for key in ("l1", "ssim"))
    alone, _ = cases.make_module([cases.PATCHGAN])
    assert alone.add_guard(GuardConfig(), lambda tensor: tensor) is None


def check(found: dict[int, Any]) -> None:
    for zero in range(4):
        dropped, nothing, guarded, left_out = found[zero]
        assert dropped == [step in (2, 7) for step in range(9)]
        assert nothing == [None] * 7
        # A dropped step is as if it had not been: weights, average and count.
        assert guarded[2] == left_out[2] == 7
        for first, second in zip(guarded[:2], left_out[:2], strict=True):
            names = [name for name in first if not name.startswith("guard.")]
            assert all(torch.equal(first[name], second[name]) for name in names)


def test_a_dropped_step_changes_nothing(alone: Ranks) -> None:
    check(cases.guarded_stages(alone))


@pytest.mark.slow
def test_a_jump_on_one_rank_is_dropped_on_both(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, 2, cases.guarded_stages)
    check(first)
    assert all(second[zero][0] == first[zero][0] for zero in range(4))


@pytest.mark.parametrize("zero", [0, 2])
def test_a_loaded_guard_knows_the_value_before(alone: Ranks, tmp_path: Path, zero: int) -> None:
    engine, keep = cases.guarded_engine(alone, zero)
    cases.guarded_steps(engine, keep, range(2))
    engine.save(tmp_path)
    engine.close()
    again, keep = cases.guarded_engine(alone, zero)
    again.load(tmp_path)
    assert cases.guarded_steps(again, keep, [2, 3]) == [True, False]
    again.close()


def test_micro_batches_are_dropped_together(alone: Ranks) -> None:
    module, losses = cases.make_module(["l1"])
    cases.jumping(losses, alone)
    keep = module.add_guard(GuardConfig(), alone.average)
    assert keep is not None
    engine = cases.make_engine(module, alone, accumulation=2)
    results = []
    for step in (0, 2, 3, 3):
        loss, _, _ = engine(cases.pixels(seed=step), step)
        engine.backward(loss, keep(step))
        result = engine.step()
        results.append((result.applied, result.dropped))
    assert results == [(False, None), (False, True), (False, None), (True, False)]
    engine.close()


def test_training_that_is_dropped_for_good_ends(alone: Ranks) -> None:
    engine, _ = cases.guarded_engine(alone, 0)
    drop = torch.tensor(False)
    with pytest.raises(UnderpaintError, match="beyond the stage's guard in 10 optimizer steps in a row, after 0 good"):
        cases.guarded_steps(engine, lambda step: drop, range(10))
    engine.close()


# ------------------------------------------------------------------------------------------------ critics


def judged(ranks: Ranks, sizes: Sequence[float], **config: Any) -> tuple[list[bool | None], list[dict[str, Tensor]]]:
    """Train a critic whose loss is multiplied; return what was dropped, and its weights after each step."""
    module, losses = cases.make_module(["l1", cases.PATCHGAN])
    loss: Any = losses.adversaries[0].loss
    real = loss.criticise
    critic = cases.make_critic(losses, ranks, guard=GuardConfig(**config))
    dropped, states = [], []
    for step, size in enumerate(sizes):
        loss.criticise = lambda shown, size=size: {name: value * size for name, value in real(shown).items()}
        shown = module(cases.share(cases.pixels(seed=step), ranks), step)[2]
        critic.step(shown)
        dropped.append(critic.dropped)
        states.append({name: p.detach().clone() for name, p in loss.critic.named_parameters()})
    critic.close()
    return dropped, states


def test_a_critic_of_a_huge_loss_does_not_learn(alone: Ranks) -> None:
    # The hinge of a new critic is about 1 + 1 halved.
    dropped, states = judged(alone, [1.0, 1e5, -1e5, 1.0, 50.0])
    assert dropped == [False, True, True, False, False]
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(states)]
    assert same == [True, True, False, False]
    assert judged(alone, [1e5, 1e5, 50.0], after=1)[0] == [None, True, False]
    assert judged(alone, [1.0, 50.0], critic=10.0)[0] == [False, True]

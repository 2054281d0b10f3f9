"""Critics: they learn, leave the model's step alone, are resumed, exported and carried over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stage_cases as cases
import torch
from processes import on_ranks
from safetensors.torch import load_file
from torch import Tensor

from underpaint.errors import ConfigError, DataError
from underpaint.interfaces.decoder import Reconstruction
from underpaint.interfaces.loss import AdversarialLoss, StepTensors
from underpaint.training.critics import carry_critic
from underpaint.training.ranks import Ranks
from underpaint.training.terms import LossItem, WeightedLosses


def losses_of(**settings: Any) -> WeightedLosses:
    _, losses = cases.make_module(["l1", {**cases.PATCHGAN, **settings}])
    return losses


def critic_of(item: LossItem) -> dict[str, Tensor]:
    assert isinstance(item.loss, AdversarialLoss)
    return {name: tensor.detach().clone() for name, tensor in item.loss.critic.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def toy(step: int) -> StepTensors:
    """Smooth images, and reconstructions that are noise."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(4, 3, 1, 1, generator=generator).expand(4, 3, 16, 16).contiguous()
    noise = torch.rand(4, 3, 16, 16, generator=generator)
    return StepTensors(step=step, images=images, reconstruction=Reconstruction(noise))


def test_a_critic_learns_to_tell_noise_from_images(alone: Ranks) -> None:
    critic = cases.make_critic(losses_of(), alone, lr=2e-3)
    values = [sum(float(value) for value in critic.step(toy(step)).values()) for step in range(25)]
    # Hinge: 1 for a critic that says nothing, 0 for one that is always right by the margin.
    assert values[0] == pytest.approx(1.0, abs=0.2)
    assert sum(values[-5:]) / 5 < 0.7
    critic.close()


def test_the_model_step_leaves_the_critic_alone(alone: Ranks) -> None:
    module, losses = cases.make_module(["l1", cases.PATCHGAN])
    critic, engine = cases.make_critic(losses, alone), cases.make_engine(module, alone)
    before = critic_of(losses.adversaries[0])
    loss, _, shown = engine(cases.pixels(), 0)
    engine.backward(loss)
    engine.step()
    assert equal(before, critic_of(losses.adversaries[0]))
    held = losses.adversaries[0].loss.critic
    assert all(p.grad is None for p in held.parameters())
    trained = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert set(critic.step(shown)) == {"critic_real", "critic_fake"}
    assert not equal(before, critic_of(losses.adversaries[0]))
    assert equal(trained, {name: p.detach() for name, p in module.named_parameters()})
    assert all(p.grad is None for p in module.parameters())
    critic.close()
    engine.close()


def test_the_critic_is_no_part_of_the_model() -> None:
    module, losses = cases.make_module(["l1", cases.PATCHGAN])
    held = {id(p) for p in losses.adversaries[0].loss.critic.parameters()}
    assert not held & {id(p) for p in module.parameters()}
    assert set(module.learning) == {"encoder", "adapter", "decoder"}


def test_a_critic_may_start_later_than_its_verdict_and_earlier(alone: Ranks) -> None:
    losses = losses_of(start=2, critic={"start": 1})
    critic = cases.make_critic(losses, alone)
    before = critic_of(losses.adversaries[0])
    assert critic.step(toy(0)) == {}
    assert equal(before, critic_of(losses.adversaries[0]))
    assert set(critic.step(toy(1))) == {"critic_real", "critic_fake"}
    assert not equal(before, critic_of(losses.adversaries[0]))
    critic.close()
    module, _ = cases.make_module(["l1", {**cases.PATCHGAN, "start": 2, "critic": {"start": 1}}])
    assert [set(module(cases.pixels(), step)[1]) for step in (1, 2)] == [{"l1"}, {"l1", "adversarial"}]


def test_its_own_optimizer_and_that_of_the_stage(alone: Ranks) -> None:
    rates = []
    for settings in ({}, {"critic": {"optimizer": {"lr": 0.25}}}):
        critic = cases.make_critic(losses_of(**settings), alone, lr=0.5)
        rates.append(critic._engine.rates())
        critic.close()
    assert rates == [{"critic": 0.5}, {"critic": 0.25}]


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_loaded_critic_goes_on_bit_by_bit(alone: Ranks, tmp_path: Path, zero: int) -> None:
    straight = losses_of(r1=1.0)
    critic = cases.make_critic(straight, alone, zero=zero)
    for step in range(2):
        critic.step(toy(step))
    critic.save(tmp_path)
    torch.manual_seed(3)
    wanted = [float(v) for step in (2, 3) for v in critic.step(toy(step)).values()]
    critic.close()
    assert (tmp_path / "critics_patchgan").is_dir()
    resumed = losses_of(r1=1.0)
    critic = cases.make_critic(resumed, alone, zero=zero)
    critic.load(tmp_path)
    torch.manual_seed(3)
    assert [float(v) for step in (2, 3) for v in critic.step(toy(step)).values()] == wanted
    assert equal(critic_of(straight.adversaries[0]), critic_of(resumed.adversaries[0]))
    critic.close()


def test_zero_3_is_refused(alone: Ranks) -> None:
    with pytest.raises(ConfigError, match="'critics/patchgan' has a critic, and engine.zero is 3.* 2 or less"):
        cases.make_critic(losses_of(), alone, zero=3)


def exported(alone: Ranks, folder: Path) -> LossItem:
    losses = losses_of()
    critic = cases.make_critic(losses, alone)
    critic.step(toy(0))
    critic.export(folder, alone)
    critic.close()
    return losses.adversaries[0]


def test_an_exported_critic_is_carried_over(alone: Ranks, tmp_path: Path) -> None:
    item = exported(alone, tmp_path / "critics")
    assert [path.name for path in (tmp_path / "critics").iterdir()] == ["critics_patchgan.safetensors"]
    assert equal(load_file(tmp_path / "critics" / "critics_patchgan.safetensors"), critic_of(item))
    (new,) = losses_of(critic={"carry": "first"}).adversaries
    assert not equal(critic_of(new), critic_of(item))
    carry_critic(new, tmp_path / "critics", "first")
    assert equal(critic_of(new), critic_of(item))


def test_a_critic_that_is_not_there_or_another_cannot_be_carried_over(alone: Ranks, tmp_path: Path) -> None:
    (item,) = losses_of().adversaries
    with pytest.raises(DataError, match="from stage 'first', which has no critic; remove 'carry'"):
        carry_critic(item, tmp_path / "critics", "first")
    exported(alone, tmp_path / "critics")
    (wider,) = losses_of(channels=8).adversaries
    before = critic_of(wider)
    with pytest.raises(DataError, match=r"stage 'first' differs from this stage's 'critics/patchgan' in \d+ tensors"):
        carry_critic(wider, tmp_path / "critics", "first")
    assert equal(before, critic_of(wider))
    _, others = cases.make_module(["l1", cases.ALONE])
    with pytest.raises(DataError, match="none of that loss: critics_patchgan"):
        carry_critic(others.adversaries[0], tmp_path / "critics", "first")
    (tmp_path / "critics" / "critics_patchgan.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="damaged"):
        carry_critic(item, tmp_path / "critics", "first")


def test_a_loss_without_a_critic_has_none_to_train() -> None:
    with pytest.raises(ConfigError, match="'l1' has no critic to train; remove its key 'critic'"):
        cases.make_module([{"name": "l1", "critic": {"start": 1}}])


@pytest.mark.slow
def test_two_ranks_train_one_critic(alone: Ranks, tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, 2, cases.critic_steps)
    joint = cases.critic_steps(alone)
    for zero in (0, 1, 2):
        assert equal(first[zero][1], second[zero][1])
        for step, rows in enumerate(zip(first[zero][0], second[zero][0], joint[zero][0], strict=True)):
            halves = [(a + b) / 2 for a, b in zip(*rows[:2], strict=True)]
            # Adam's first steps turn a gradient near zero, and its rounding, into a whole step of the learning rate.
            assert halves == pytest.approx(rows[2], rel=1e-5 if step == 0 else 2e-3)

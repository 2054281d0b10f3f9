"""Adaptive weights against a closed form, and against differentiating every loss at the last layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import stage_cases as cases
import torch
from processes import on_ranks
from torch import nn

from underpaint.config.losses import AdaptiveConfig
from underpaint.errors import ConfigError
from underpaint.interfaces.decoder import Reconstruction
from underpaint.training.balance import Share, balanced, detached
from underpaint.training.flops import count_flops
from underpaint.training.ranks import Ranks

GAN = {**cases.PATCHGAN, "weight": 0.8}
TERMS = {"name": "critics/multiscale", "channels": 4, "layers": 1, "scales": 2, "virtual_batch": 2}
VFMVAE = {"name": "vfmvae/decoder", "width": 32, "base": 16, "depths": [2, 1], "heads": 4}


def closed_form(second: AdaptiveConfig, third: AdaptiveConfig | None = None) -> tuple[float, float, dict[str, float]]:
    """One weight w = 1 makes an image of 12 ones.

    The loss 3·Σ image of weight 2 has the gradient 72 at w, −1.5·Σ image has −18, and 5·w past the image has 5.
    """
    w = nn.Parameter(torch.ones(1))
    live = Reconstruction(w * torch.ones(1, 3, 2, 2))
    leaves = detached(live)
    shares = [
        Share("first", 3.0 * leaves.image.sum(), 2.0, None, True, True),
        Share("second", -1.5 * leaves.image.sum(), 0.5, second, True, False),
    ]
    if third is not None:
        shares.append(Share("third", 5.0 * w.sum(), 0.1, third, False, False))
    total, factors = balanced(shares, live, leaves, {"decoder": w}, lambda tensor: tensor)
    total.backward()
    assert w.grad is not None
    return total.item(), w.grad.item(), {key: float(value) for key, value in factors.items()}


def test_a_closed_form() -> None:
    total, gradient, factors = closed_form(AdaptiveConfig(at="decoder", eps=0.0))
    assert factors == {"second": 4.0}
    # 2·36 + 0.5·4·(−18), of the value as of the gradient.
    assert (total, gradient) == (36.0, 36.0)


def test_a_loss_that_is_no_judge_of_images() -> None:
    exact = AdaptiveConfig(at="decoder", eps=0.0)
    _, gradient, factors = closed_form(exact, exact)
    assert factors["third"] == pytest.approx(72.0 / 5.0)
    assert gradient == pytest.approx(36.0 + 0.1 * 14.4 * 5.0)


def test_eps_limit_and_apply() -> None:
    assert closed_form(AdaptiveConfig(at="decoder", eps=6.0))[2] == {"second": 3.0}
    total, gradient, factors = closed_form(AdaptiveConfig(at="decoder", eps=0.0, limit=1.5))
    assert factors == {"second": 1.5}
    assert total == gradient == 72.0 - 0.5 * 1.5 * 18.0
    total, gradient, factors = closed_form(AdaptiveConfig(at="decoder", eps=0.0, apply=False))
    assert factors == {"second": 4.0}
    assert total == gradient == 72.0 - 0.5 * 18.0


CASES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "critic": (["l1", {**GAN, "adaptive": "decoder"}], {}),
    "two references": ([{"name": "l1", "weight": 2.0}, "mse", {**GAN, "adaptive": "decoder"}], {}),
    "alignment": (["mse", {"name": "vf", "weight": 0.3, "adaptive": "adapter"}], {}),
    "both": (["l1", {**GAN, "adaptive": "decoder"}, {"name": "vf", "adaptive": "adapter"}], {}),
    "both and fixed ones": (
        ["l1", {**GAN, "adaptive": "adapter"}, {"name": "vf", "weight": 0.2}, {"name": "kl", "weight": 1e-3}],
        {"adapter": "ldm/gaussian"},
    ),
    "two terms": (["l1", {**TERMS, "weight": 0.3, "adaptive": "decoder"}], {}),
    "logged only": (["l1", {**GAN, "adaptive": {"at": "decoder", "apply": False}}], {}),
    "limited": (["l1", {**GAN, "adaptive": {"at": "decoder", "limit": 1e-3}}], {}),
    "large eps": (["l1", {**GAN, "adaptive": {"at": "decoder", "eps": 1.0}}], {}),
}


def compare(losses: list[Any], options: dict[str, Any], dtype: torch.dtype, size: int = cases.SIZE) -> None:
    tokenizer = cases.make_tokenizer(**options)
    module, made = cases.make_module(losses, tokenizer=tokenizer, size=(size, size))
    module.to(dtype)
    shown = cases.pixels(2, size, size)
    torch.manual_seed(5)
    expected, factors = cases.plainly(module, made, shown)
    expected.backward()
    wanted = cases.gradients(module)
    module.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    total, terms, _ = module(shown, 0)
    torch.autograd.backward(total)
    got = cases.gradients(module)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert factors
    assert {key for key in terms if key.startswith("factor_")} == {f"factor_{key}" for key in factors}
    for key, factor in factors.items():
        assert float(terms[f"factor_{key}"]) == pytest.approx(float(factor), rel=1e-5)
    assert got.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert float((got[name] - gradient).abs().max()) <= 1e-6 * largest, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_weighted_losses(case: str, dtype: torch.dtype) -> None:
    compare(*CASES[case], dtype)


@pytest.mark.parametrize("adaptive", ["decoder", "adapter"])
def test_images_of_several_sizes(adaptive: str) -> None:
    losses = ["l1", {"name": "vfmvae/pyramid", "weight": 0.1}, {**GAN, "adaptive": adaptive}]
    compare(losses, {"decoder": VFMVAE, "adapter": {"name": "vfmvae/adapter", "width": 16}}, torch.float64, size=64)


def test_an_adaptive_pyramid() -> None:
    losses = ["l1", {"name": "vfmvae/pyramid", "weight": 0.1, "adaptive": "adapter"}]
    compare(losses, {"decoder": VFMVAE, "adapter": {"name": "vfmvae/adapter", "width": 16}}, torch.float64, size=64)


def test_a_loss_outside_its_window_is_not_measured() -> None:
    module, _ = cases.make_module(["l1", {**GAN, "adaptive": "decoder", "start": 3}])
    total, terms, _ = module(cases.pixels(), 2)
    assert set(terms) == {"l1"}
    assert total.item() == float(terms["l1"])
    _, terms, _ = module(cases.pixels(), 3)
    assert set(terms) == {"l1", "adversarial", "factor_critics_patchgan"}


def test_nothing_is_balanced_without_gradients() -> None:
    module, _ = cases.make_module(["l1", {**GAN, "adaptive": "decoder"}])
    with torch.no_grad():
        total, terms, _ = module.eval()(cases.pixels(), 0)
    assert set(terms) == {"l1", "adversarial"}
    assert total.item() == pytest.approx(float(terms["l1"] + 0.8 * terms["adversarial"]))


@pytest.mark.parametrize("losses", [CASES["both"][0], CASES["two terms"][0]])
def test_its_arithmetic_can_be_counted(losses: list[Any]) -> None:
    module, _ = cases.make_module(losses)
    assert count_flops(module, lambda: module(cases.pixels(1), 0)[0]) > 0


def test_the_critic_gets_no_gradient() -> None:
    module, losses = cases.make_module(["l1", {**GAN, "adaptive": "decoder"}])
    torch.autograd.backward(module(cases.pixels(), 0)[0])
    assert all(p.grad is None for p in losses.adversaries[0].loss.critic.parameters())  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------ refusals


def test_there_must_be_something_to_compare_with() -> None:
    with pytest.raises(ConfigError, match="add one such as 'l1'"):
        cases.make_module([{**GAN, "adaptive": "decoder"}])
    with pytest.raises(ConfigError, match="add one such as 'l1'"):
        cases.make_module([{"name": "l1", "weight": 0.0}, {**GAN, "adaptive": "decoder"}])
    module, _ = cases.make_module([{"name": "l1", "end": 2}, {**GAN, "adaptive": "decoder"}])
    module(cases.pixels(), 1)
    with pytest.raises(ConfigError, match="none of fixed weight counts at step 2; extend"):
        module(cases.pixels(), 2)


def test_a_frozen_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="last layer of the adapter, which this stage does not train"):
        cases.make_module(["l1", {"name": "vf", "adaptive": "adapter"}], ("decoder",))
    with pytest.raises(ConfigError, match="last layer of the decoder, which this stage does not train"):
        cases.make_module(["l1", {**GAN, "adaptive": "decoder"}], ("decoder.middle",))


def test_a_part_without_a_last_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = cases.make_tokenizer()
    monkeypatch.setattr(type(tokenizer.decoder), "last_layer", lambda self: None)
    with pytest.raises(ConfigError, match="last layer of the decoder, and 'ldm/decoder' declares none"):
        cases.make_module(["l1", {**GAN, "adaptive": "decoder"}], tokenizer=tokenizer)


def test_a_loss_that_does_not_reach_the_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="gradient of the loss 'vf' does not reach the decoder"):
        cases.make_module(["l1", {"name": "vf", "adaptive": "decoder"}])


# --------------------------------------------------------------------------------------------- the engine


def plain_steps() -> list[tuple[float, ...]]:
    """Train three steps with torch alone, balanced the plain way."""
    module, losses = cases.make_module(cases.BALANCED)
    params = [p for p in module.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    rows = []
    for step in range(3):
        adam.zero_grad(set_to_none=True)
        total, factors = cases.plainly(module, losses, cases.pixels(seed=step), step)
        torch.autograd.backward(total)
        norm = nn.utils.clip_grad_norm_(params, 1.0)
        adam.step()
        rows.append((total.item(), float(norm), float(factors["mse"]), float(factors["vf"])))
    return rows


def check_steps(found: dict[int, Any]) -> None:
    expected = plain_steps()
    for rows, _ in found.values():
        # Adam's first steps turn a gradient near zero, and its rounding, into a whole step of the learning rate.
        for step, (row, wanted) in enumerate(zip(rows, expected, strict=True)):
            assert row == pytest.approx(wanted, rel=1e-5 if step == 0 else 1e-3)


def test_the_engine_trains_with_adaptive_weights(alone: Ranks) -> None:
    check_steps(cases.balanced_steps(alone))


@pytest.mark.slow
def test_two_ranks_use_the_factors_of_the_whole_batch(tmp_path: Any) -> None:
    first, second = on_ranks(tmp_path, 2, cases.balanced_steps)
    for zero in (0, 1, 2):
        for ours, theirs in zip(first[zero][0], second[zero][0], strict=True):
            # Bit by bit: ranks of another factor would drift apart.
            assert ours[1:] == theirs[1:]
    expected = plain_steps()
    for zero in (0, 1, 2):
        for step, (ours, theirs, wanted) in enumerate(zip(first[zero][0], second[zero][0], expected, strict=True)):
            joint = ((ours[0] + theirs[0]) / 2, *ours[1:])
            assert joint == pytest.approx(wanted, rel=1e-5 if step == 0 else 1e-3)


def test_balancing_leaves_no_trace() -> None:
    # Micro-batches of one step go through it one after another.
    module, _ = cases.make_module(["l1", {**GAN, "adaptive": "decoder"}])
    before = copy.deepcopy(module.state_dict())
    first = module(cases.pixels(), 0)[1]
    second = module(cases.pixels(), 0)[1]
    assert {k: float(v) for k, v in first.items()} == {k: float(v) for k, v in second.items()}
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())

"""Tokenizer and diffusion model in one step: where gradients go, how latents are standardised, several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import joint_cases as cases
import pytest
import torch
from processes import on_ranks
from stage_cases import gradients, pixels
from torch import Tensor, nn

from underpaint.training.joint_stage import LatentNorm, running_statistics


def of(found: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in found.items() if name.startswith(f"{side}.")}


def backward(**settings: Any) -> dict[str, Tensor]:
    module = cases.make_joint(**settings)
    total, _, _ = module(pixels(), 0, None, *cases.given())
    total.backward()
    return gradients(module)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------- gradients


def test_the_diffusion_loss_stops_at_the_latent() -> None:
    once, often = backward(), backward(losses=[{"name": "velocity", "weight": 50.0}, cases.REPA])
    assert equal(of(once, "tokenizer"), of(often, "tokenizer"))
    assert not equal(of(once, "denoiser"), of(often, "denoiser"))


def test_the_weight_of_repa_for_the_diffusion_model_says_nothing_to_the_tokenizer() -> None:
    once, often = backward(), backward(losses=["velocity", {**cases.REPA, "weight": 50.0}])
    assert equal(of(once, "tokenizer"), of(often, "tokenizer"))


def test_the_alignment_reaches_encoder_and_adapter_and_nothing_else() -> None:
    little, much = backward(alignment=1.5), backward(alignment=100.0)
    assert equal(of(little, "denoiser"), of(much, "denoiser"))
    changed = {name for name in little if not torch.equal(little[name], much[name])}
    assert changed
    assert all(name.startswith(("tokenizer.encoder.", "tokenizer.adapter.")) for name in changed)
    assert {name.split(".")[1] for name in changed} == {"encoder", "adapter"}


def test_every_part_is_what_it_is_when_computed_alone() -> None:
    """One backward pass gives the three gradients of three graphs, each of them built plainly and in full."""
    found = backward(alignment=1.5)
    module = cases.make_joint(alignment=1.5)
    images, (inputs, noise, t, drop) = pixels(), cases.given()

    total, _, tensors = module.tokenizer.judge(images, 0)
    assert tensors.latents is not None
    assert tensors.inputs is not None
    total.backward(retain_graph=True)
    x0 = module.norm(tensors.latents.detach())
    # The same as the module does with functions, done by switches.
    module.denoiser.requires_grad_(False)
    mean, variance = module.norm.mean, module.norm.variance
    live = (tensors.latents - mean.view(1, -1, 1, 1)) / (variance.view(1, -1, 1, 1) + 1e-4).sqrt()
    value = module.denoiser.alignment(live, inputs, noise, t, 0, tensors.inputs)
    assert value is not None
    (1.5 * value).backward()
    module.denoiser.requires_grad_(True)
    expected = of(gradients(module), "tokenizer")
    module.zero_grad()
    module.denoiser(x0, inputs, noise, t, drop, 0, images=tensors.inputs)[0].backward()
    expected |= of(gradients(module), "denoiser")

    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_loss_is_the_sum_of_what_is_logged() -> None:
    module = cases.make_joint(alignment=1.5)
    total, terms, shown = module(pixels(), 0, None, *cases.given())
    parts = terms["l1"] + terms["velocity"] + 0.5 * terms["repa"] + 1.5 * terms["alignment"]
    assert total.item() == pytest.approx(parts.item(), rel=1e-5)
    assert shown.reconstruction is not None
    assert not shown.reconstruction.image.requires_grad
    assert shown.latents is None


def test_an_alignment_outside_its_window_is_left_out() -> None:
    module = cases.make_joint(losses=["velocity", {**cases.REPA, "end": 1}])
    assert "alignment" in module(pixels(), 0, None, *cases.given())[1]
    assert not {"alignment", "repa"} & module(pixels(), 1, None, *cases.given())[1].keys()


def test_recomputed_activations_give_the_same_gradients() -> None:
    first, second = backward(), backward(recompute=True)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-7)


# --------------------------------------------------------------------------------------------- normalisation


def draws(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (4, 3, 5, 6)
    scale, shift = torch.tensor([0.1, 1.0, 20.0]), torch.tensor([5.0, 0.0, -3.0])
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) * scale.view(1, 3, 1, 1) + shift.view(1, 3, 1, 1)
        for _ in range(count)
    ]


def test_it_is_batch_normalisation() -> None:
    ours = LatentNorm(3, momentum=0.3).double()
    ours.mean, ours.variance = ours.mean.double(), ours.variance.double()
    theirs = nn.BatchNorm2d(3, eps=1e-4, momentum=0.3, affine=False).double()
    first, *others = draws(4)
    # torch starts from 0 and 1; given the first batch to start from, both go the same way.
    assert theirs.running_mean is not None
    assert theirs.running_var is not None
    theirs.running_mean.copy_(first.mean((0, 2, 3)))
    theirs.running_var.copy_(first.var((0, 2, 3)))
    torch.testing.assert_close(ours(first), nn.BatchNorm2d(3, eps=1e-4, affine=False).double()(first))
    for batch in others:
        torch.testing.assert_close(ours(batch), theirs(batch))
    torch.testing.assert_close(ours.mean, theirs.running_mean)
    # torch keeps the variance with n − 1.
    torch.testing.assert_close(ours.variance, theirs.running_var * (4 * 30 - 1) / (4 * 30))
    expected = (first - ours.mean.view(1, 3, 1, 1)) / (ours.variance + 1e-4).sqrt().view(1, 3, 1, 1)
    torch.testing.assert_close(ours.running(first), expected)
    torch.testing.assert_close(ours.eval()(first), expected)
    assert ours.batches == 4


def test_evaluation_moves_no_moment() -> None:
    norm = LatentNorm(3)
    norm(draws(1)[0].float())
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    norm.eval()(draws(2)[1].float())
    norm.train().running(draws(2)[1].float())
    assert equal(before, dict(norm.state_dict()))


def test_a_batch_that_is_not_finite_leaves_the_moments_alone() -> None:
    norm = LatentNorm(3)
    norm(draws(1)[0].float())
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    bad = draws(2)[1].float()
    bad[0, 1, 0, 0] = torch.inf
    assert not norm(bad).isfinite().all()
    assert equal(before, dict(norm.state_dict()))


def test_a_module_in_bf16_keeps_its_moments_in_fp32() -> None:
    net = nn.Sequential(LatentNorm(3), nn.Linear(2, 2))
    net[0].mean.fill_(0.123456789)
    net.to(torch.bfloat16)
    assert net[1].weight.dtype == torch.bfloat16
    assert net[0].mean.dtype == net[0].variance.dtype == torch.float32
    assert net[0].mean[0].item() == pytest.approx(0.123456789, rel=1e-7)


def test_the_statistics_standardise_as_the_norm_does() -> None:
    norm = LatentNorm(3)
    batch = draws(1)[0].float()
    norm(batch)
    mean, std = running_statistics(norm.mean, norm.variance).tensors(batch)
    torch.testing.assert_close((batch - mean) / std, norm.running(batch))


# ------------------------------------------------------------------------------------------- several ranks


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    (one,) = on_ranks(tmp_path / "one", 1, cases.joint_steps)
    two, _ = on_ranks(tmp_path / "two", 2, cases.joint_steps)
    for zero in (0, 1, 2):
        (rows, state), (other_rows, other_state) = one[zero], two[zero]
        assert state.keys() == other_state.keys()
        # The two ranks' losses are halves of the batch's; the norm of the gradient is that of the whole.
        for row, other in zip(rows, other_rows, strict=True):
            assert other == pytest.approx(row, rel=1e-3)
        for name in ("norm.mean", "norm.variance"):
            torch.testing.assert_close(other_state[name], state[name], rtol=1e-4, atol=1e-5)
        assert other_state["norm.batches"] == state["norm.batches"] == 3


def test_the_parts_that_the_optimizer_can_name() -> None:
    module = cases.make_joint()
    assert module.learning.keys() == {"encoder", "adapter", "decoder", "backbone", "conditioner", "losses"}
    owned = {id(p) for part in module.learning.values() for p in part.parameters() if p.requires_grad}
    assert owned == {id(p) for p in module.parameters() if p.requires_grad}

"""The kernel of AdamW, average and rounding, run by Triton's interpreter; test_one_pass starts this."""

from __future__ import annotations

import math

import pytest
import torch

from underpaint.training.one_pass import update_in_one_pass

GROUP = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
DECAY = 0.9999


class State:
    """What a step changes."""

    def __init__(self, n: int, rounded: torch.dtype | None, averaged: bool) -> None:
        self.weights = torch.randn(n, generator=torch.Generator().manual_seed(0))
        self.moments = torch.zeros(n), torch.zeros(n)
        self.average = self.weights.clone() if averaged else None
        self.rounded = None if rounded is None else torch.zeros(n, dtype=rounded)

    def update(self, gradients: torch.Tensor, step: int, norm: float, clip: float | None) -> None:
        update_in_one_pass(
            self.weights,
            gradients,
            self.moments,
            GROUP,
            step=step,
            norm=torch.tensor(norm),
            clip=clip,
            average=self.average,
            decay=DECAY,
            rounded=self.rounded,
        )

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.weights, *self.moments, self.average, self.rounded) if t is not None]


def gradients_of(step: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(n, generator=generator) * torch.logspace(-6, 3, n)).to(dtype)


@pytest.mark.parametrize("averaged", [True, False], ids=["average", "no-average"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("rounded", [torch.bfloat16, None], ids=["bf16", "fp32"])
@pytest.mark.parametrize("n", [1, 2048, 4999])
def test_it_does_what_torch_does(n: int, rounded: torch.dtype | None, clip: float | None, averaged: bool) -> None:
    state = State(n, rounded, averaged)
    exact = torch.nn.Parameter(state.weights.double())
    average = exact.detach().clone()
    adam = torch.optim.AdamW([exact], **GROUP)
    added = torch.zeros(n, dtype=torch.float64)
    for step in range(1, 6):
        gradients = gradients_of(step, n, rounded or torch.float32)
        exact.grad = gradients.double()
        norm = float(exact.grad.norm())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([exact], clip)
        added += exact.grad.abs()
        adam.step()
        average += (1 - DECAY) * (exact.detach() - average)
        state.update(gradients, step, norm, clip)
    found = adam.state[exact]
    # A few roundings of fp32 a step; the average moves by 1e-4 of what the weights do.
    torch.testing.assert_close(state.weights.double(), exact.detach(), rtol=2e-6, atol=1e-7)
    assert bool(((state.moments[0] - found["exp_avg"]).abs() <= 1e-6 * added).all())
    torch.testing.assert_close(state.moments[1].double(), found["exp_avg_sq"], rtol=1e-5, atol=1e-20)
    if state.average is not None:
        torch.testing.assert_close(state.average.double(), average, rtol=5e-7, atol=1e-9)
    if state.rounded is not None:
        # The interpreter cuts bf16 off; the hardware rounds to the nearest, see test_one_pass.
        assert torch.equal(state.rounded, (state.weights.view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16())


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_it_changes_nothing_where_the_norm_is_not_finite(norm: float) -> None:
    state = State(5000, torch.bfloat16, True)
    before = [t.clone() for t in state.tensors()]
    state.update(torch.full((5000,), math.nan), 1, norm, 1.0)
    for found, kept in zip(state.tensors(), before, strict=True):
        assert torch.equal(found, kept)

"""AdamW, the moving average of the weights and their rounding, in one pass over memory.

After the gradients are there, a step is bound by memory: what it reads and writes of each weight decides how long it
takes. One after the other, AdamW, the average and the rounding read the weights three times.
"""

# What Triton compiles has no types that mypy knows.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # There is none for some systems; torch then comes without it.
    triton = None

__all__ = ["one_pass_available", "update_in_one_pass"]

_BLOCK = 2048


def one_pass_available(device: torch.device) -> bool:
    """Whether there is a kernel for what lies on this device."""
    return triton is not None and device.type == "cuda"


def update_in_one_pass(
    weights: Tensor,
    gradients: Tensor,
    moments: tuple[Tensor, Tensor],
    group: Mapping[str, Any],
    *,
    step: int,
    norm: Tensor,
    clip: float | None,
    average: Tensor | None,
    decay: float,
    rounded: Tensor | None,
) -> None:
    """Take one step of AdamW (Loshchilov & Hutter 2019, algorithm 2) as torch's does, and what follows it.

    Nothing changes where `norm` is not finite, which the host need not know for that.

    Args:
        weights: N numbers in fp32, changed in place as all that follows but the gradients.
        gradients: N numbers of any type.
        moments: First and second, N numbers each in fp32.
        group: ``lr``, ``betas``, ``eps`` and ``weight_decay``, from the optimizer.
        step: Number of this step, from 1.
        norm: Norm of all gradients, a number on the device.
        clip: Norm that larger gradients are brought down to, as `torch.nn.utils.clip_grad_norm_` does.
        average: Becomes decay·average + (1 - decay)·weights; N numbers in fp32.
        decay: Its decay.
        rounded: Becomes the weights; N numbers of any type.
    """
    first, second = moments
    beta1, beta2 = group["betas"]
    # What is nearly one is made in float64: a float32 of 0.9999 is one of 0.0001 to four digits only.
    numbers = (
        1.0 - group["lr"] * group["weight_decay"],
        group["lr"] / (1.0 - beta1**step),
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        math.sqrt(1.0 - beta2**step),
        group["eps"],
        math.inf if clip is None else clip,
        1.0 - decay,
    )
    # Triton launches on the device that is current, wherever the tensors are.
    with torch.cuda.device_of(weights):  # type: ignore[no-untyped-call]
        _update_kernel[(triton.cdiv(weights.numel(), _BLOCK),)](
            weights, gradients, first, second, average, rounded, norm, weights.numel(), *numbers,
            average is not None, rounded is not None, _BLOCK, num_warps=8,
        )  # fmt: skip


if triton is not None:

    @triton.jit
    def _update_kernel(
        weights, gradients, first, second, average, rounded, norm, count,
        kept, rate, take1, beta2, take2, correction2, eps, clip, share,
        AVERAGE: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        total = tl.load(norm)
        if total < float("inf"):
            at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = at < count
            g = tl.load(gradients + at, mask).to(tl.float32) * tl.minimum(clip / (total + 1e-6), 1.0)
            w = tl.load(weights + at, mask) * kept
            m = tl.load(first + at, mask)
            v = tl.load(second + at, mask) * beta2
            m += (g - m) * take1
            v += g * g * take2
            w -= rate * m / (tl.sqrt(v) / correction2 + eps)
            tl.store(first + at, m, mask)
            tl.store(second + at, v, mask)
            tl.store(weights + at, w, mask)
            if AVERAGE:
                a = tl.load(average + at, mask)
                tl.store(average + at, a + (w - a) * share, mask)
            if ROUNDED:
                tl.store(rounded + at, w.to(rounded.dtype.element_ty), mask)

"""What tests of backbones share: tiny ones, their inputs, and counts of large ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import underpaint
from underpaint import Condition

_TRANSFORMER: dict[str, Any] = {"depth": 2, "width": 32, "heads": 4}
TINY: dict[str, dict[str, Any]] = {
    "sit/S-2": _TRANSFORMER,
    "dit/S-2": _TRANSFORMER,
    "lightningdit/S-2": _TRANSFORMER,
    "ditdh/S": {**_TRANSFORMER, "head_width": 48, "head_heads": 2},
    "reg/S-2": {**_TRANSFORMER, "companion": 24},
    "mmdit/d6-2": {"depth": 3, "width": 32, "heads": 4, "table": 12},
    "flux/schnell": {"double": 1, "single": 2, "width": 32, "heads": 2, "axes": [4, 4, 8]},
}
"""Options by name."""
TEXT: dict[str, Any] = {"pooled": 12, "tokens": 10}
"""Widths of a condition with tokens, for `make` and `inputs`."""


def make(
    name: str, *, d: int = 4, grid: tuple[int, int] = (4, 4), pooled: int = 32, tokens: int = 0, **options: Any
) -> Any:
    torch.manual_seed(0)
    context = {"latent_channels": d, "grid": grid, "pooled_dim": pooled, "token_dim": tokens}
    return underpaint.create("backbone", name, **context, **options)


def disturbed(model: nn.Module) -> Any:
    """Move every parameter off its initial value, so that zero gates and unit scales hide nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return model


def inputs(
    b: int = 2,
    *,
    d: int = 4,
    grid: tuple[int, int] = (4, 4),
    pooled: int = 32,
    tokens: int = 0,
    length: int = 5,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """Return latents, times and a condition."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(b, d, *grid, generator=generator).to(dtype)
    t = torch.rand(b, generator=generator).to(dtype)
    text = torch.randn(b, length, tokens, generator=generator).to(dtype) if tokens else None
    vector = torch.randn(b, pooled, generator=generator).to(dtype) if pooled else None
    return x, t, Condition(tokens=text, pooled=vector)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def large(name: str, **given: Any) -> Any:
    """Return a backbone of its full size, without memory; `given` as for `make`."""
    with torch.device("meta"):
        return make(name, **given)


def flops(model: Any, *, grid: tuple[int, int], d: int = 4, length: int = 5, pooled: int = 0, tokens: int = 0) -> int:
    """Count the operations of one sample, without memory; a multiply-add counts two."""
    with torch.device("meta"):
        condition = Condition(
            tokens=torch.empty(1, length, tokens) if tokens else None, pooled=torch.empty(1, pooled) if pooled else None
        )
        arguments = (torch.empty(1, d, *grid), torch.empty(1), condition)
        companion = {"companion": torch.empty(1, model.companion)} if model.companion else {}
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(*arguments, **companion)
    return int(counter.get_total_flops())

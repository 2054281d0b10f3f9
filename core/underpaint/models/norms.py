"""Normalisation of maps in the type that they have."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GroupNorm"]


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu and He 2018, section 3.1) whose output has the type of its input, under autocast too.

    Means and variances are summed in fp32 all the same. CUDA's autocast would turn bf16 maps to fp32 first and hand
    fp32 to the activation that follows: both are written, and kept for the backward pass, at twice the size.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return B×C×…, of x of the same shape."""
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        kind = x.device.type
        # Tensors without data, which shapes are worked out with, have no autocast.
        plain = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
        with plain:
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)

"""The transformer block with adaptive RMS normalisation, rotary positions and a gated MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import swiglu_linear
from underpaint_lightningdit.kernels import EPS, fused_available, gated_sum, modulated_norm, rotated_heads, swiglu
from underpaint_lightningdit.positions import rotate

__all__ = ["Block", "GatedLinear", "ModulatedNorm", "attend"]


class ModulatedNorm(nn.Module):
    """RMS normalisation with a learned scale, then scaled and shifted by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return B×N×C tokens, and `x` to add to (see `modulated_norm`); `scale` and `shift` are B×1×C or B×N×C."""
        # The two scales meet before the tokens do: the gradients of both then need one sum over the tokens, not two.
        normed, kept = modulated_norm(x, self.weight * (1.0 + scale), shift)
        return normed, kept


class HeadNorm(nn.Module):
    """RMS normalisation of queries or keys, with a learned scale for the channels of a head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return B×N×heads×channels."""
        # torch's own layer warns of, and is slow with, bf16 activations and fp32 scales, which autocast makes.
        return F.rms_norm(x, (x.shape[-1],), eps=EPS) * self.weight


class GatedLinear(nn.Module):
    """A linear layer whose gated output is added to the residual stream: x + gate·(W·h + bias)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
        """Return B×N×outputs, in the type of `x`; `gate` is B×1×outputs or B×N×outputs."""
        result: Tensor = gated_sum(x, self.linear(h), gate, self.bias)
        return result


class GatedUnits(GatedLinear):
    """The second layer of a SwiGLU, which makes the units of the first one's output, and adds what it gives."""

    def forward(self, x: Tensor, h: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:  # type: ignore[override]
        """Return B×N×outputs; `h` and `bias` are those of `swiglu`."""
        out = self.linear(swiglu(h, bias)) if torch.is_grad_enabled() else swiglu_linear(self.linear, h)
        result: Tensor = gated_sum(x, out, gate, self.bias)
        return result


class Block(nn.Module):
    """Attention and SwiGLU, each normalised, modulated and gated by the condition (LightningDiT).

    The gates start at zero, so that a new block passes its input on unchanged.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, qk_norm: bool, shift: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self._shift = shift
        hidden = int(2 / 3 * int(width * mlp_ratio))
        self.norm1 = ModulatedNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.norm_k = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.out = GatedLinear(width, width)
        self.norm2 = ModulatedNorm(width)
        self.up = nn.Linear(width, 2 * hidden)
        self.down = GatedUnits(hidden, width)
        self.modulation = nn.Linear(width, (6 if shift else 4) * width)

    def forward(self, x: Tensor, condition: Tensor, rotation: Tensor) -> Tensor:
        """Return B×N×C tokens.

        Args:
            x: B×N×C tokens.
            condition: B×1×C or B×N×C vectors, already passed through SiLU.
            rotation: Rotary positions of the tokens, from `grid_rotations`.
        """
        vectors: Tensor = self.modulation(condition)
        shift1: Tensor | None = None
        shift2: Tensor | None = None
        if self._shift:
            shift1, scale1, gate1, shift2, scale2, gate2 = vectors.chunk(6, dim=-1)
        else:
            scale1, gate1, scale2, gate2 = vectors.chunk(4, dim=-1)
        normed, x = self.norm1(x, scale1, shift1)
        x = self.out(x, self._mix(normed, rotation), gate1)
        normed, x = self.norm2(x, scale2, shift2)
        result: Tensor = self.down(x, *_product(self.up, normed), gate2)
        return result

    def _mix(self, x: Tensor, rotation: Tensor) -> Tensor:
        if isinstance(self.norm_q, nn.Identity):
            return attend(*rotated_heads(*_product(self.qkv, x), rotation))
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).unbind(2)
        q, k = rotate(self.norm_q(q), rotation), rotate(self.norm_k(k), rotation)
        return attend(q.to(v.dtype), k.to(v.dtype), v)


def _product(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a linear layer's output, and its bias if that one's gradient is left to what follows.

    It is not where the layer is more than it seems: multiplies in 8 bits, has adapters, or has hooks, by which ZeRO 3
    brings its weights.
    """
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    if type(layer) is not nn.Linear or any(hooks) or not fused_available(x):
        return layer(x), None
    return F.linear(x, layer.weight, layer.bias.detach()), layer.bias


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the attention's output, B×N×C, of queries, keys and values of B×N×heads×channels."""
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return mixed.transpose(1, 2).flatten(2)

"""The transformer block with adaptive layer normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Block", "modulate"]

# timm's layer norm of queries and keys keeps torch's default ε, unlike the norms of the block.
_QK_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rms": lambda width: nn.RMSNorm(width, eps=1e-6),
    "layer": lambda width: nn.LayerNorm(width, eps=1e-5),
}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x·(1 + scale) + shift, with B×N×C tokens and B×C vectors."""
    return x * (1.0 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """Attention and MLP, each normalised, modulated and gated by the condition (DiT, adaLN-Zero).

    The gates start at zero, so that a new block passes its input on unchanged.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, qk_norm_type: Literal["rms", "layer"] = "rms"
    ) -> None:
        super().__init__()
        norm = _QK_NORMS[qk_norm_type] if qk_norm else nn.Identity
        self.heads = heads
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = norm(width // heads)
        self.norm_k = norm(width // heads)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return B×N×C tokens from such tokens and B×C condition vectors, already passed through SiLU."""
        vectors: Tensor = self.modulation(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors.chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self._attend(modulate(self.norm1(x), shift1, scale1))
        mixed: Tensor = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x + gate2.unsqueeze(1) * mixed

    def _attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(b, n, c))
        return result

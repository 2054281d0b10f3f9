"""The joint block: two streams of tokens with weights of their own, and one attention over both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Heads", "JointBlock", "Rotation", "attend", "key_mask", "modulate", "rotate"]

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, each N×(channels of a head / 2)."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x·(1 + scale) + shift, with B×N×C tokens and B×C vectors."""
    return x * (1.0 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn neighbouring pairs of channels of B×heads×N×c queries or keys."""
    cos, sin = rotation
    # Pairs are turned in float32 at least: products in bf16 would shift far positions by a whole cell.
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mix B×heads×N×c values to B×N×(heads·c); `mask` is B×1×1×N, True where a token counts."""
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(2)


def key_mask(mask: Tensor | None, images: int) -> Tensor | None:
    """Extend a B×L mask of text tokens by image tokens, which all count, to B×1×1×(L + images)."""
    if mask is None:
        return None
    return torch.cat((mask, mask.new_ones(len(mask), images)), dim=1)[:, None, None]


def _head_norm(kind: str, channels: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    return nn.RMSNorm(channels, eps=1e-6) if kind == "rms" else nn.LayerNorm(channels, eps=1e-6)


class Heads(nn.Module):
    """Normalises the queries and keys of each head, after they were split off a projection."""

    def __init__(self, width: int, heads: int, qk_norm: str) -> None:
        super().__init__()
        self.heads = heads
        self.query = _head_norm(qk_norm, width // heads)
        self.key = _head_norm(qk_norm, width // heads)

    def forward(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split B×N×3C into queries, keys and values of B×heads×N×(C/heads)."""
        b, n, c = projected.shape
        q, k, v = projected.view(b, n, 3, self.heads, c // (3 * self.heads)).permute(2, 0, 3, 1, 4).unbind(0)
        # Under autocast the norms give float32, and attention wants one type.
        return self.query(q).to(v.dtype), self.key(k).to(v.dtype), v


class _Attention(nn.Module):
    """Projections of one stream to and from an attention; `out` is left out where nothing reads the result."""

    def __init__(self, width: int, heads: int, qk_norm: str, out: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.heads = Heads(width, heads, qk_norm)
        self.out = nn.Linear(width, width) if out else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of B×N×C tokens."""
        result: tuple[Tensor, Tensor, Tensor] = self.heads(self.qkv(x))
        return result


class Stream(nn.Module):
    """What one kind of token has for itself in a joint block: modulation, projections, MLP.

    Args:
        width: Channels.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLP as a multiple of `width`.
        qk_norm: ``none``, ``ln`` or ``rms``.
        ends: The tokens are read by this block's attention and go no further (the text of the last block).
        dual: The tokens also attend to themselves alone.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, qk_norm: str, *, ends: bool = False, dual: bool = False
    ) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.attention = _Attention(width, heads, qk_norm, out=not ends)
        self.second = _Attention(width, heads, qk_norm) if dual else None
        self.vectors = 2 if ends else 9 if dual else 6
        self.modulation = nn.Linear(width, self.vectors * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = (
            None
            if ends
            else nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        )

    def vectors_of(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Return shift and scale; gate; shift, scale and gate of the MLP; the same three of the second attention."""
        return tuple(self.modulation(condition).chunk(self.vectors, dim=1))

    def project(self, x: Tensor, vectors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of the tokens."""
        result: tuple[Tensor, Tensor, Tensor] = self.attention(modulate(self.norm(x), vectors[0], vectors[1]))
        return result

    def update(self, x: Tensor, mixed: Tensor, vectors: tuple[Tensor, ...]) -> Tensor:
        """Add to B×N×C tokens what attention gave them, then the MLP."""
        if self.mlp is None or self.attention.out is None:
            return x
        before = x
        x = x + vectors[2].unsqueeze(1) * self.attention.out(mixed)
        if self.second is not None and self.second.out is not None:
            alone = attend(*self.second(modulate(self.norm(before), vectors[6], vectors[7])))
            x = x + vectors[8].unsqueeze(1) * self.second.out(alone)
        mixed = self.mlp(modulate(self.norm(x), vectors[3], vectors[4]))
        return x + vectors[5].unsqueeze(1) * mixed


class JointBlock(nn.Module):
    """A text stream and an image stream that attend to each other (Esser et al. 2024, figure 2b).

    Args:
        width: Channels.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs as a multiple of `width`.
        qk_norm: ``none``, ``ln`` or ``rms``.
        last: The text is not needed after this block.
        dual: The image tokens also attend to themselves alone.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, qk_norm: str, *, last: bool = False, dual: bool = False
    ) -> None:
        super().__init__()
        self.text = Stream(width, heads, mlp_ratio, qk_norm, ends=last)
        self.image = Stream(width, heads, mlp_ratio, qk_norm, dual=dual)

    def forward(
        self, text: Tensor, image: Tensor, condition: Tensor, mask: Tensor | None, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor]:
        """Return text and image tokens.

        Args:
            text: B×L×C.
            image: B×N×C.
            condition: B×C, already passed through SiLU.
            mask: B×1×1×(L + N), True where a token counts, or None.
            rotation: Rotary positions of the L + N tokens, or None.
        """
        texts, images = self.text.vectors_of(condition), self.image.vectors_of(condition)
        pairs = zip(self.text.project(text, texts), self.image.project(image, images), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in pairs)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = attend(q, k, v, mask)
        count = text.shape[1]
        return self.text.update(text, mixed[:, :count], texts), self.image.update(image, mixed[:, count:], images)

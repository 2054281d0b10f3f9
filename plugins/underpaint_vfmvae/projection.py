"""The attention projection: a transformer block whose output is narrower or wider than its input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import ConfigError

__all__ = ["AttentionProjection"]


class AttentionProjection(nn.Module):
    """B×N×inputs tokens to B×N×outputs (VFM-VAE's compression and expansion).

    y = Linear(LN(x)) + Attention(LN(x)), then y + GatedMlp(LN(y)). One of the two widths divides the other, and the
    ratio is the number of heads. To compress, the outputs of the heads, each as wide as the output, are averaged; to
    expand, they are put side by side. Linear layers start from a truncated normal of deviation 0.02 and bias 0.

    Raises:
        ConfigError: Neither width divides the other.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        if max(inputs, outputs) % min(inputs, outputs):
            raise ConfigError(
                f"VFM-VAE's attention projection cannot lead from {inputs} to {outputs} channels, because neither "
                "divides the other; change the option 'width', or the number of latent channels."
            )
        self.attention_norm = nn.LayerNorm(inputs, eps=1e-5)
        self.attention = _Attention(inputs, outputs)
        self.skip_norm = nn.LayerNorm(inputs, eps=1e-5)
        self.skip = nn.Linear(inputs, outputs)
        self.mlp_norm = nn.LayerNorm(outputs, eps=1e-5)
        self.mlp = _GatedMlp(outputs)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens."""
        x = self.skip(self.skip_norm(tokens)) + self.attention(self.attention_norm(tokens))
        projected: Tensor = x + self.mlp(self.mlp_norm(x))
        return projected


class _Attention(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.heads = max(inputs, outputs) // min(inputs, outputs)
        self.averages = inputs > outputs
        inner = max(inputs, outputs)
        self.qkv = nn.Linear(inputs, 3 * inner, bias=False)
        # Keys have no bias: it would add the same number to every score of a query, which softmax ignores.
        self.query_bias = nn.Parameter(torch.zeros(inner))
        self.value_bias = nn.Parameter(torch.zeros(inner))
        self.out = nn.Linear(outputs, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        bias = torch.cat((self.query_bias, torch.zeros_like(self.query_bias), self.value_bias))
        qkv = F.linear(tokens, self.qkv.weight, bias)
        q, k, v = qkv.reshape(*tokens.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        joined = mixed.mean(dim=1) if self.averages else mixed.transpose(1, 2).flatten(2)
        attended: Tensor = self.out(joined)
        return attended


class _GatedMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.gate = nn.Linear(width, 2 * width)
        self.value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        gated: Tensor = self.out(F.gelu(self.gate(x), approximate="tanh") * self.value(x))
        return gated

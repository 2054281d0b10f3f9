"""Several text encoders at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import underpaint
from underpaint import Condition, Conditioner, ConfigError
from underpaint_text.config import JointTextConfig, TextPart

__all__ = ["JointText"]


class JointText(Conditioner):
    """The conditions of several conditioners of texts, joined.

    Tokens of parts that stand ``beside`` each other are joined by channel, the results padded with zeros to the widest
    and joined along the sequence; pooled vectors are joined by channel (Esser et al. 2024, section 4).

    Raises:
        ConfigError: A part is no conditioner of texts, or does not give what is to be joined.
    """

    accepts = "text"

    def __init__(self, config: JointTextConfig, *, width: int, classes: int) -> None:
        super().__init__()
        self.config = config
        self.parts = nn.ModuleList()
        widths: list[int] = []
        self.pooled_dim = 0
        for part in config.parts:
            made = underpaint.create("conditioner", part.name, **part.options, width=width, classes=classes)
            assert isinstance(made, Conditioner)
            _check(part, made)
            self.parts.append(made)
            self.pooled_dim += made.pooled_dim if part.pooled else 0
            if part.tokens == "after":
                widths.append(made.token_dim)
            elif part.tokens == "beside":
                widths[-1] += made.token_dim
        self.token_dim = max(widths, default=0)
        if not self.token_dim and not self.pooled_dim:
            raise ConfigError("The parts leave out all tokens and pooled vectors; keep one of them.")

    def forward(self, inputs: Tensor | Sequence[str], drop: Tensor | None = None) -> Condition:
        """Return the condition of B texts; samples where `drop` (B, bool) is True get the null one."""
        return self._join([part(inputs, drop) for part in self.parts])

    def null(self, batch: int, device: torch.device) -> Condition:
        """Return the joined null conditions, for a batch of that size."""
        return self._join([part.null(batch, device) for part in self.parts if isinstance(part, Conditioner)])

    def _join(self, given: list[Condition]) -> Condition:
        groups: list[list[Condition]] = []
        for part, condition in zip(self.config.parts, given, strict=True):
            if part.tokens == "after":
                groups.append([condition])
            elif part.tokens == "beside":
                groups[-1].append(condition)
        pairs = zip(self.config.parts, given, strict=True)
        pooled = [condition.pooled for part, condition in pairs if part.pooled and condition.pooled is not None]
        sequences = [_beside(group) for group in groups]
        masks = [mask for _, mask in sequences]
        mask = None
        if any(one is not None for one in masks):
            mask = torch.cat([_ones(tokens) if one is None else one for tokens, one in sequences], dim=1)
        padded = [F.pad(tokens, (0, self.token_dim - tokens.shape[2])) for tokens, _ in sequences]
        return Condition(
            torch.cat(padded, dim=1) if padded else None, mask, torch.cat(pooled, dim=1) if pooled else None
        )


def _check(part: TextPart, made: Conditioner) -> None:
    if made.accepts != "text":
        raise ConfigError(f"'{part.name}' is no conditioner of texts; use one such as 'text/open_clip' or 'text/hf'.")
    for what, wanted, given, off in (
        ("tokens", part.tokens != "none", made.token_dim, "tokens: none"),
        ("pooled vector", part.pooled, made.pooled_dim, "pooled: false"),
    ):
        if wanted and not given:
            raise ConfigError(f"The part '{part.name}' gives no {what}; write '{off}' for it.")


def _beside(group: list[Condition]) -> tuple[Tensor, Tensor | None]:
    """Join tokens by channel; a place counts where one of its tokens does."""
    tokens = [condition.tokens for condition in group if condition.tokens is not None]
    lengths = [one.shape[1] for one in tokens]
    if len(set(lengths)) > 1:
        raise ConfigError(
            f"Parts with {lengths} tokens cannot stand beside each other; write 'tokens: after' for one of them."
        )
    masks = [condition.mask for condition in group if condition.mask is not None]
    if len(masks) < len(group):
        return torch.cat(tokens, dim=2), None
    return torch.cat(tokens, dim=2), torch.stack(masks).any(dim=0)


def _ones(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)

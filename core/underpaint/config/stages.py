"""Optional settings of a tokenizer stage: low-rank adaptation."""

from __future__ import annotations

import re
from typing import Any

import attrs
from attrs import validators as v

from underpaint.errors import ConfigError

__all__ = ["LoraConfig"]


@attrs.frozen(kw_only=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2022): of a part that trains only pairs of thin matrices learn.

    A weight W of d×k becomes W + (alpha/rank)·B·A, with B of d×rank, zero at the start, and A of rank×k. The stage
    exports a plain model with the sums as its weights.

    Attributes:
        rank: Rank of what is added to each weight.
        alpha: Numerator of the factor before the product.
        parts: Entries of `trains` that are adapted; everything else in them stays as it is.
        layers: Regular expression, searched in the names of the linear layers of a part; those that match are adapted.
            The default is all of them within transformer blocks.
    """

    rank: int = attrs.field(default=16, validator=v.gt(0))
    alpha: float = attrs.field(default=16.0, validator=v.gt(0.0))
    parts: tuple[str, ...] = attrs.field(default=("encoder",), validator=v.min_len(1))
    layers: str = attrs.field(default="blocks")

    @layers.validator
    def _compiles(self, _: Any, value: str) -> None:
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(f"lora.layers is '{value}', which is no regular expression: {error}.") from None

    def check(self, trains: tuple[str, ...], path: str) -> None:
        """Refuse parts that the stage does not train as a whole.

        Raises:
            ConfigError: A part is not in `trains`, or a submodule of it is too.
        """
        for part in self.parts:
            if part not in trains:
                raise ConfigError(
                    f"{path}.lora.parts names '{part}', which the stage does not train; add it to trains, which has "
                    f"{', '.join(trains)}."
                )
            inner = [name for name in trains if name.startswith(f"{part}.")]
            if inner:
                raise ConfigError(
                    f"{path}.trains names '{inner[0]}', and of '{part}' only the low-rank pairs learn; remove one of "
                    "the two."
                )

"""Optional settings of a tokenizer stage: the guard against losses that jump, and low-rank adaptation."""

from __future__ import annotations

import re
from typing import Any

import attrs
from attrs import validators as v

from underpaint.errors import ConfigError

__all__ = ["GuardConfig", "LoraConfig"]


@attrs.frozen(kw_only=True)
class GuardConfig:
    """Which optimizer steps are dropped although everything is finite (vfm_vae.md §4.4).

    The model's step is dropped where a reconstruction loss exceeds `factor` times its value in the step before; a
    critic's where the size of its loss exceeds `critic`. Means over all ranks are compared, so that all decide alike.
    Like a step that is not finite, a dropped one changes nothing, and `engine.max_bad_steps` in a row end the training.

    Attributes:
        factor: Largest growth of a reconstruction loss from one step to the next.
        after: First step that may be dropped.
        critic: Largest size of a critic's loss.
    """

    factor: float = attrs.field(default=10.0, validator=v.gt(1.0))
    after: int = attrs.field(default=0, validator=v.ge(0))
    critic: float = attrs.field(default=1e4, validator=v.gt(0.0))


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

"""Ranges that the numbers of a recipe are kept to."""

from __future__ import annotations

import math
from typing import Any

from attrs import validators as v

__all__ = ["betas", "decay", "finite", "fraction", "not_negative", "optional_positive", "positive"]

positive: Any = v.gt(0)
not_negative: Any = v.ge(0)
optional_positive: Any = v.optional(positive)
fraction: Any = v.and_(v.ge(0.0), v.le(1.0))
decay: Any = v.optional(v.and_(v.ge(0.0), v.lt(1.0)))
"""Of a moving average; None for no average."""
betas: Any = v.deep_iterable(v.and_(v.ge(0.0), v.lt(1.0)))


def finite(_: Any, attribute: Any, value: float) -> None:
    """Refuse infinities and NaN."""
    if not math.isfinite(value):
        raise ValueError(f"'{attribute.name}' is {value}; give a finite number.")

"""Options of the solvers."""

from __future__ import annotations

import attrs
from attrs import validators as v

__all__ = ["EulerConfig"]


@attrs.frozen(kw_only=True)
class EulerConfig:
    """Options of ``euler``.

    Attributes:
        steps: Evaluations of the field, which are Euler steps. The grid has one point more: what LightningDiT,
            SiT and RAE call "250 steps" is 250 grid points, hence ``steps: 249`` here.
        shift: α of t' = αt / (1 + (α−1)t), which moves the grid points towards noise when above 1. LightningDiT's
            ``timestep_shift`` of 0.3, in time that runs the other way, is α = 1/0.3.
    """

    steps: int = attrs.field(default=50, validator=v.gt(0))
    shift: float = attrs.field(default=1.0, validator=v.gt(0))

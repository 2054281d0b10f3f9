"""Samplers: solvers that carry noise to data along a velocity field."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from torch import Tensor

from underpaint.interfaces.component import Component

__all__ = ["FreshNoise", "Sampler", "VarianceField", "VelocityField"]

VelocityField = Callable[[Tensor, Tensor], Tensor]
"""(x_t of B×d×h×w, t of B) to the velocity ε − x0 of B×d×h×w; guidance is already inside it."""


@attrs.frozen
class VarianceField:
    """The velocity field of a backbone that has learned the variance of DDPM's steps as well.

    Attributes:
        both: (x_t, t) to the velocity and `Prediction.variance`, each B×d×h×w.
    """

    both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the velocity alone."""
        return self.both(x_t, t)[0]


FreshNoise = Callable[[], Tensor]
"""Standard normal values of shape, type and device of the initial noise, new at each call.

Those of a sample follow from its own seed and the count of the calls, not from the batch around it.
"""


class Sampler(Component, ABC):
    """Integrates dx/dt = velocity from t = 1 (noise) to t = 0 (data).

    Attributes:
        needs_variance: Whether the field has to be a `VarianceField`.
    """

    needs_variance: bool = False

    @abstractmethod
    def sample(self, field: VelocityField, noise: Tensor, fresh: FreshNoise) -> Tensor:
        """Carry B×d×h×w noise to latents of the same type.

        A sample must not depend on the others of its batch: how many are drawn at once is in no protocol. `fresh` is
        therefore the only source of randomness for solvers that add noise on the way, and called equally often for
        every batch.
        """

    @abstractmethod
    def protocol(self) -> Mapping[str, Any]:
        """Return solver, grid points and evaluations, for the protocol of a number."""

"""Samplers: solvers that carry noise to data along a velocity field."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from underpaint.interfaces.component import Component

__all__ = ["Sampler", "VelocityField"]

VelocityField = Callable[[Tensor, Tensor], Tensor]
"""(x_t of B×d×h×w, t of B) to the velocity ε − x0 of B×d×h×w; guidance is already inside it."""


class Sampler(Component, ABC):
    """Integrates dx/dt = velocity from t = 1 (noise) to t = 0 (data)."""

    @abstractmethod
    def sample(self, field: VelocityField, noise: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Carry B×d×h×w noise to latents; `generator` serves stochastic solvers."""

    @abstractmethod
    def protocol(self) -> Mapping[str, Any]:
        """Return solver, grid points and evaluations, for the protocol of a number."""

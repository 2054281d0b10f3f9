"""Integration with error control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from underpaint import DataError, FreshNoise, Sampler, VelocityField
from underpaint_samplers.config import AdaptiveConfig
from underpaint_samplers.grid import times

__all__ = ["Adaptive"]

# Given rather than estimated: the estimate evaluates the field out of order.
_FIRST_STEP = 0.01


class Adaptive(Sampler):
    """Dormand and Prince's fifth-order method, with steps as short as the tolerance wants them (torchdiffeq).

    One error is taken over the batch, so that a latent depends on the others of its batch to within the tolerance.
    How often the field is evaluated depends on the field.
    """

    def __init__(self, config: AdaptiveConfig) -> None:
        self._config = config

    def sample(self, field: VelocityField, noise: Tensor, fresh: FreshNoise) -> Tensor:
        """Carry B×d×h×w noise to latents of the same type; `fresh` is not used.

        Raises:
            DataError: The tolerance cannot be kept: the velocity is not finite, or too rough for `max_steps`.
        """
        config = self._config

        def slope(t: Tensor, x: Tensor) -> Tensor:
            return field(x, times(float(t), x)).to(x.dtype)

        try:
            path = torchdiffeq.odeint(
                slope,
                noise,
                torch.tensor([1.0, 0.0], dtype=torch.float64, device=noise.device),
                rtol=config.rtol,
                atol=config.atol,
                method="dopri5",
                # The last step ends at 0: without `step_t` it goes beyond, and is interpolated.
                options={
                    "first_step": _FIRST_STEP,
                    "max_num_steps": config.max_steps,
                    "step_t": torch.zeros(1, dtype=torch.float64, device=noise.device),
                },
            )
        except AssertionError as error:
            # torchdiffeq's way to say that steps became too short or too many.
            raise DataError(
                f"The sampler 'adaptive' cannot keep rtol {config.rtol:g} and atol {config.atol:g} ({error}); raise "
                "the tolerances or max_steps, and look whether the model has diverged."
            ) from error
        latents: Tensor = path[-1]
        return latents

    def protocol(self) -> Mapping[str, Any]:
        """Return solver and tolerances; evaluations are None, because they depend on the field."""
        return {
            "solver": "dopri5",
            "evaluations": None,
            "grid_points": None,
            "rtol": self._config.rtol,
            "atol": self._config.atol,
        }

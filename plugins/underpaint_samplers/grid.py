"""The noise fractions that a solver steps through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from underpaint_samplers.config import GridConfig, StepsConfig

__all__ = ["protocol", "shift_factor", "shift_time", "times", "uniform_grid"]


def shift_factor(config: GridConfig, noise: Tensor) -> float:
    """Return α of a shift for B×d×h×w latents; the rules are those of `StepsConfig.shift`."""
    _, channels, height, width = noise.shape
    tokens = height * width / config.patch**2
    if config.shift == "latent":
        return math.sqrt(channels * height * width / 4096)
    if config.shift == "tokens":
        return math.sqrt(tokens / 256)
    if config.shift == "flux":
        return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    return config.shift


def shift_time(t: float, alpha: float) -> float:
    """Return α·t / (1 + (α − 1)·t); 1/α undoes it."""
    return alpha * t / (1.0 + (alpha - 1.0) * t)


def uniform_grid(config: StepsConfig, noise: Tensor) -> list[float]:
    """Return ``steps + 1`` noise fractions from 1 to `StepsConfig.end`, uniform before the shift."""
    alpha, length = shift_factor(config, noise), 1.0 - config.end
    return [shift_time(1.0 - length * i / config.steps, alpha) for i in range(config.steps + 1)]


def times(t: float, x: Tensor) -> Tensor:
    """Return a noise fraction for each sample of B×d×h×w latents."""
    return torch.full((x.shape[0],), t, device=x.device)


def protocol(solver: str, config: GridConfig, *, evaluations: int) -> Mapping[str, Any]:
    """Return solver, evaluations of the field, grid points, shift and, where they count, patch and end."""
    facts: dict[str, Any] = {
        "solver": solver,
        "evaluations": evaluations,
        "grid_points": config.steps + 1,
        "shift": config.shift,
    }
    if config.shift in ("tokens", "flux"):
        facts["patch"] = config.patch
    if isinstance(config, StepsConfig) and config.end > 0.0:
        facts["end"] = config.end
    return facts

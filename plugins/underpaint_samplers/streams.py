"""Noise of stochastic solvers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Streams"]


class Streams:
    """One source of randomness for each sample, so that its noise does not depend on the size of its batch.

    Args:
        generator: Their seeds are drawn from it; None takes the global one of the latents' device.
        noise: The B×d×h×w latents at the start.
    """

    def __init__(self, generator: torch.Generator | None, noise: Tensor) -> None:
        device = noise.device if generator is None else generator.device
        seeds = torch.randint(2**62, (noise.shape[0],), generator=generator, device=device).tolist()
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def normal(self, like: Tensor) -> Tensor:
        """Return standard normal values of shape, type and device of B×d×h×w latents."""
        values = [
            torch.randn(like.shape[1:], generator=generator, device=generator.device, dtype=like.dtype)
            for generator in self._generators
        ]
        return torch.stack(values).to(like.device)

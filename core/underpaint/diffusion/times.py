"""The times at which a model is trained. t is the noise fraction everywhere: 0 is data, 1 is noise."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from underpaint.config.diffusion import ShiftRule, TimeConfig

__all__ = ["ddpm_fractions", "sample_time", "shift_factor", "shift_time"]


def sample_time(
    config: TimeConfig,
    batch: int,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    *,
    step: int = 0,
    shape: tuple[int, int, int] = (1, 1, 1),
) -> Tensor:
    """Draw the noise fractions of a training batch: the quantiles of uniform variables, then the shift.

    Args:
        config: Distribution, range and shift.
        batch: B.
        generator: Source of randomness; None takes the global one of `device`. Draws happen on the generator's
            own device, so a CPU generator gives the same times on every machine.
        device: Where the times are wanted.
        step: Optimizer step, for a late switch to uniform times.
        shape: d, h, w of the latents, for shifts that follow from it.

    Returns:
        float32 of shape B, in [0, 1].
    """
    source = torch.device(device) if generator is None else generator.device
    uniform = config.uniform_from is not None and step >= config.uniform_from
    low, high = config.range if uniform else _ranks(config)
    # In float32 the tails of a normal variable would end at five standard deviations.
    rank = low + (high - low) * torch.rand(batch, generator=generator, device=source, dtype=torch.float64)
    t = rank if uniform else _quantile(config, rank)
    return shift_time(t, shift_factor(config.shift, shape, config.patch)).to(device, torch.float32)


def _quantile(config: TimeConfig, rank: Tensor) -> Tensor:
    """Return the time below which the share `rank` of the untruncated distribution lies."""
    if config.distribution == "uniform":
        return rank
    if config.distribution == "logit-normal":
        return torch.sigmoid(config.mean + config.std * torch.special.ndtri(rank))
    if config.distribution == "ddpm":
        table = ddpm_fractions(rank.device)
        return table[(rank * len(table)).long().clamp(max=len(table) - 1)]
    # f_mode of Esser et al. 2024, §3.1, with u = 1 − rank.
    return rank - config.mode * (torch.sin(math.pi / 2 * rank).square() - rank)


def ddpm_fractions(device: torch.device | str = "cpu") -> Tensor:
    """Return the noise fractions of DDPM's 1000 timesteps: those with the same signal-to-noise ratio.

    β grows linearly from 10⁻⁴ to 2·10⁻² (Ho et al. 2020, §4), ᾱ_i = Π_{j ≤ i} (1 − β_j), and
    (1 − t)²/t² = ᾱ/(1 − ᾱ).

    Returns:
        float64 of shape 1000, from 0.0099 to 0.9937.
    """
    kept = torch.cumprod(1.0 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64, device=device), dim=0)
    return torch.sigmoid(0.5 * (torch.log1p(-kept) - kept.log()))


@lru_cache
def _ranks(config: TimeConfig) -> tuple[float, float]:
    """Return the shares of the distribution below the ends of its range."""

    def share_below(t: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            below = float(_quantile(config, torch.tensor(middle, dtype=torch.float64))) < t
            low, high = (middle, high) if below else (low, middle)
        return low

    start, end = config.range
    return (share_below(start) if start > 0.0 else 0.0, share_below(end) if end < 1.0 else 1.0)


def shift_factor(shift: float | ShiftRule, shape: tuple[int, int, int], patch: int) -> float:
    """Return α of `shift_time` for latents of d×h×w cut into patches; the rules are those of `TimeConfig.shift`."""
    channels, height, width = shape
    tokens = height * width / patch**2
    if shift == "latent":
        return math.sqrt(channels * height * width / 4096)
    if shift == "tokens":
        return math.sqrt(tokens / 256)
    if shift == "flux":
        return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    return shift


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Return α·t / (1 + (α − 1)·t): noise fractions moved towards noise when α = `shift` is above 1.

    Esser et al. 2024, §5.3.2. It maps [0, 1] onto itself, keeps both ends, and 1/α undoes it.
    """
    return shift * t / (1.0 + (shift - 1.0) * t)

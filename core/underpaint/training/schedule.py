"""Learning rate and averaging as pure functions of the optimizer step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from underpaint.config.engine import OptimizerConfig

__all__ = ["ema_decay", "rate_factor"]


def rate_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of one optimizer step as a share of the peak.

    The warm-up rises linearly; its first step already moves, at 1/warmup of the peak, and its last is at
    the peak. A cosine or linear schedule goes from the peak right after the warm-up to `config.final` at the
    last step, and stays there if training goes on.

    Args:
        config: Warm-up, schedule and final share.
        step: Optimizer step, from 0.
        steps: Length of the training.

    Returns:
        A number in [0, 1].
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup) / max(1, steps - 1 - config.warmup))
    down = progress if config.schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))
    return 1.0 - (1.0 - config.final) * down


def ema_decay(decay: float, ramp: float | None, step: int) -> float:
    """Return the decay of the moving average after an optimizer step.

    With a ramp the half-life is `ramp` times the steps done, until that is longer than the half-life of `decay`:
    min(decay, ½^(1 / (ramp·step))), the ramp of StyleGAN in units of steps (vfm_vae.md §4.4). Without one the average
    starts at the weights themselves and decays evenly.

    Args:
        decay: β of ema ← β·ema + (1 − β)·weights.
        ramp: Half-life as a share of the steps done, or None.
        step: Optimizer steps done, from 1.
    """
    return decay if ramp is None else min(decay, 0.5 ** (1.0 / (ramp * step)))

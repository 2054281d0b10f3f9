"""The learning rate as a pure function of the optimizer step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from underpaint.config.schema import OptimizerConfig

__all__ = ["rate_factor"]


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

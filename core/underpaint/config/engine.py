"""How a run trains on the machine, and the optimizer of a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs

from underpaint.config.ranges import fraction, not_negative, optional_positive, positive

__all__ = ["EngineConfig", "OptimizerConfig"]


@attrs.frozen(kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
        lr: Peak learning rate.
        rates: Learning rate of single parts (``encoder``, ``adapter``, ``decoder``, …), instead of `lr`.
        betas: Adam's decay rates.
        weight_decay: Decoupled weight decay.
        warmup: Steps of linear warm-up from zero.
        schedule: After the warm-up.
        final: Learning rate at the end of a cosine or linear schedule, as a share of the peak.
        clip: Largest norm of the gradient of all parameters; None for no clipping.
    """

    lr: float = attrs.field(default=1e-4, validator=positive)
    rates: Mapping[str, float] = attrs.field(factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = attrs.field(default=0.0, validator=not_negative)
    warmup: int = attrs.field(default=0, validator=not_negative)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    final: float = attrs.field(default=0.1, validator=fraction)
    clip: float | None = attrs.field(default=1.0, validator=optional_positive)


@attrs.frozen(kw_only=True)
class EngineConfig:
    """How training runs on the machine.

    Attributes:
        device: ``auto`` takes the GPU when there is one.
        zero: DeepSpeed ZeRO stage.
        precision: ``bf16`` keeps fp32 master weights.
        accumulation: Micro-batches per optimizer step.
        compile: Compile the blocks with torch.compile.
        deterministic: Bit-repeatable kernels, at some cost.
        log_every: Steps between log lines.
        checkpoint_every: Steps between checkpoints.
        keep: Valid checkpoints kept per stage.
        max_bad_steps: Consecutive non-finite steps after which training stops.
        timeout: Seconds that ranks wait for one of them before training ends with an error that names it.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    zero: Literal[0, 1, 2, 3] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulation: int = attrs.field(default=1, validator=positive)
    compile: bool = False
    deterministic: bool = False
    log_every: int = attrs.field(default=20, validator=positive)
    checkpoint_every: int = attrs.field(default=1000, validator=positive)
    keep: int = attrs.field(default=2, validator=positive)
    max_bad_steps: int = attrs.field(default=10, validator=positive)
    timeout: float = attrs.field(default=1800.0, validator=positive)

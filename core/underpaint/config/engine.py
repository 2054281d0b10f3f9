"""How a run trains on the machine, and the optimizer of a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs
from attrs import validators as v

from underpaint.config.ranges import betas, fraction, not_negative, optional_positive, positive

__all__ = ["EngineConfig", "OptimizerConfig", "PartOptimizer", "Precision"]

Precision = Literal["fp32", "bf16", "fp8"]


@attrs.frozen(kw_only=True)
class PartOptimizer:
    """What a single part has of its own; None is as for the whole.

    Attributes:
        lr: Peak learning rate.
        betas: Adam's decay rates.
        warmup: Steps of linear warm-up from zero, 0 for none; a falling schedule begins after them.
    """

    lr: float | None = attrs.field(default=None, validator=optional_positive)
    betas: tuple[float, float] | None = attrs.field(default=None, validator=v.optional(betas))
    warmup: int | None = attrs.field(default=None, validator=v.optional(not_negative))


@attrs.frozen(kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
        lr: Peak learning rate.
        parts: Settings of single parts (``encoder``, ``adapter``, ``decoder``, …), instead of those of the whole.
        betas: Adam's decay rates.
        weight_decay: Decoupled weight decay.
        warmup: Steps of linear warm-up from zero.
        schedule: After the warm-up.
        final: Learning rate at the end of a cosine or linear schedule, as a share of the peak.
        clip: Largest norm of the gradient of all parameters together, whatever `parts` says: DeepSpeed clips by that
            one norm under ZeRO 1–3. None for no clipping.
    """

    lr: float = attrs.field(default=1e-4, validator=positive)
    parts: Mapping[str, PartOptimizer] = attrs.field(factory=dict)
    betas: tuple[float, float] = attrs.field(default=(0.9, 0.95), validator=betas)
    weight_decay: float = attrs.field(default=0.0, validator=not_negative)
    warmup: int = attrs.field(default=0, validator=not_negative)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    final: float = attrs.field(default=0.1, validator=fraction)
    clip: float | None = attrs.field(default=1.0, validator=optional_positive)

    def of(self, part: str) -> OptimizerConfig:
        """Return the settings that hold for one part."""
        own = attrs.asdict(self.parts.get(part, PartOptimizer()))
        return attrs.evolve(self, parts={}, **{name: value for name, value in own.items() if value is not None})


@attrs.frozen(kw_only=True)
class EngineConfig:
    """How training runs on the machine.

    Attributes:
        device: ``auto`` takes the GPU when there is one.
        zero: DeepSpeed ZeRO stage.
        precision: ``bf16`` keeps fp32 master weights; ``fp8`` is bf16 with the matrix products of the diffusion
            backbone's blocks in 8 bits, on GPUs that have them (extra ``fp8``).
        tf32: Whether GPUs may round the factors of fp32 products to TF32 (10 bits of mantissa), as most recipes of the
            field do; also what bf16 leaves in fp32.
        accumulation: Micro-batches per optimizer step.
        compile: Compile encoders, decoders, the blocks of backbones and what losses compute with, by torch.compile.
        deterministic: Bit-repeatable kernels, at some cost.
        log_every: Steps between log lines.
        checkpoint_every: Steps between checkpoints.
        keep: Valid checkpoints kept per stage.
        max_bad_steps: Consecutive non-finite steps after which training stops.
        timeout: Seconds that ranks wait for one of them before training ends with an error that names it.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    zero: Literal[0, 1, 2, 3] = 0
    precision: Precision = "fp32"
    tf32: bool = True
    accumulation: int = attrs.field(default=1, validator=positive)
    compile: bool = False
    deterministic: bool = False
    log_every: int = attrs.field(default=20, validator=positive)
    checkpoint_every: int = attrs.field(default=1000, validator=positive)
    keep: int = attrs.field(default=2, validator=positive)
    max_bad_steps: int = attrs.field(default=10, validator=positive)
    timeout: float = attrs.field(default=1800.0, validator=positive)

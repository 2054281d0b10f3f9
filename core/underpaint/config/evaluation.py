"""What a run is measured by."""

from __future__ import annotations

from typing import Literal

import attrs

from underpaint.config.component import ComponentConfig
from underpaint.config.diffusion import GuidanceConfig
from underpaint.config.engine import Precision
from underpaint.config.ranges import positive

__all__ = ["EvaluationConfig"]


@attrs.frozen(kw_only=True)
class EvaluationConfig:
    """What is measured, on how many images.

    Attributes:
        images: Images per number, at most what the validation set has.
        batch: Images at once, per rank.
        reconstruction: Metrics of reconstructions.
        generation: Metrics of samples.
        sampler: Solver.
        guidance: Guidance.
        precision: What the backbone computes in when samples are drawn; ``fp8`` is bf16 with the matrix products of its
            blocks in 8 bits, on GPUs that have them.
        labels: ``balanced`` gives every class equally often, ``random`` draws uniformly.
        seed: Seed of noise and labels.
        show: Images in the report's grids.
    """

    images: int = attrs.field(default=1000, validator=positive)
    batch: int = attrs.field(default=50, validator=positive)
    reconstruction: tuple[ComponentConfig, ...] = (ComponentConfig(name="psnr"), ComponentConfig(name="ssim"))
    generation: tuple[ComponentConfig, ...] = ()
    sampler: ComponentConfig = attrs.field(factory=lambda: ComponentConfig(name="euler"))
    guidance: GuidanceConfig = attrs.field(factory=GuidanceConfig)
    precision: Precision = "fp32"
    labels: Literal["balanced", "random"] = "balanced"
    seed: int = 0
    show: int = attrs.field(default=24, validator=positive)

"""A stage of tokenizer training, and its optional parts."""

from __future__ import annotations

import re
from typing import Any

import attrs
from attrs import validators as v

from underpaint.config.component import ComponentConfig
from underpaint.config.diffusion import DiffusionConfig, PathName, Predicts, TimeConfig
from underpaint.config.engine import OptimizerConfig
from underpaint.config.losses import LossConfig
from underpaint.config.ranges import decay, fraction, not_negative, optional_positive, positive
from underpaint.errors import ConfigError

__all__ = ["DenoiserConfig", "EquivarianceConfig", "GuardConfig", "LoraConfig", "StageConfig", "StopConfig"]


@attrs.frozen(kw_only=True)
class GuardConfig:
    """Which optimizer steps are dropped although everything is finite (vfm_vae.md §4.4).

    The model's step is dropped where a reconstruction loss exceeds `factor` times its value in the step before; a
    critic's where the size of its loss exceeds `critic`. Means over all ranks are compared, so that all decide alike.
    Like a step that is not finite, a dropped one changes nothing, and `engine.max_bad_steps` in a row end the training.

    Attributes:
        factor: Largest growth of a reconstruction loss from one step to the next.
        after: First step that may be dropped.
        critic: Largest size of a critic's loss.
    """

    factor: float = attrs.field(default=10.0, validator=v.gt(1.0))
    after: int = attrs.field(default=0, validator=not_negative)
    critic: float = attrs.field(default=1e4, validator=positive)


@attrs.frozen(kw_only=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2022): of a part that trains only pairs of thin matrices learn.

    A weight W of d×k becomes W + (alpha/rank)·B·A, with B of d×rank, zero at the start, and A of rank×k. The stage
    exports a plain model with the sums as its weights.

    Attributes:
        rank: Rank of what is added to each weight.
        alpha: Numerator of the factor before the product.
        parts: Entries of `trains` that are adapted; everything else in them stays as it is.
        layers: Regular expression, searched in the names of the linear layers of a part; those that match are adapted.
            The default is all of them within transformer blocks.
    """

    rank: int = attrs.field(default=16, validator=positive)
    alpha: float = attrs.field(default=16.0, validator=positive)
    parts: tuple[str, ...] = attrs.field(default=("encoder",), validator=v.min_len(1))
    layers: str = attrs.field(default="blocks")

    @layers.validator
    def _compiles(self, _: Any, value: str) -> None:
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(f"lora.layers is '{value}', which is no regular expression: {error}.") from None

    def check(self, trains: tuple[str, ...], path: str) -> None:
        """Refuse parts that the stage does not train as a whole.

        Raises:
            ConfigError: A part is not in `trains`, or a submodule of it is too.
        """
        for part in self.parts:
            if part not in trains:
                raise ConfigError(
                    f"{path}.lora.parts names '{part}', which the stage does not train; add it to trains, which has "
                    f"{', '.join(trains)}."
                )
            inner = [name for name in trains if name.startswith(f"{part}.")]
            if inner:
                raise ConfigError(
                    f"{path}.trains names '{inner[0]}', and of '{part}' only the low-rank pairs learn; remove one of "
                    "the two."
                )


@attrs.frozen(kw_only=True)
class EquivarianceConfig:
    """Equivariance regularisation (EQ-VAE; vfm_vae.md §4.5): one draw per rank and step.

    With probability `latent`, the latent is resized by one of `scales` and turned by a multiple of 90°, and the target
    image with it. Otherwise, with probability `input`, the image is shrunk by one of the scales below 1 before the
    encoder sees it. The rest of the steps are plain.

    Attributes:
        latent: Share of steps that transform the latent.
        input: Share of the other steps that shrink the image.
        scales: Sizes relative to the full one, drawn evenly.
    """

    latent: float = attrs.field(default=0.5, validator=fraction)
    input: float = attrs.field(default=0.25, validator=fraction)
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)

    def __attrs_post_init__(self) -> None:
        if not self.scales or not all(0.0 < scale <= 1.0 for scale in self.scales):
            raise ConfigError(f"equivariance.scales is {list(self.scales)}; name at least one number in (0, 1].")
        if self.input > 0.0 and min(self.scales) == 1.0:
            raise ConfigError("equivariance.input is above 0, but no scale is below 1; set input to 0.")


@attrs.frozen(kw_only=True)
class DenoiserConfig:
    """A diffusion model that trains with the tokenizer of a stage, in the stage's steps (Leng et al. 2025, REPA-E).

    The gradients of its losses stop at the latent. Those of its losses that read hidden states, such as ``repa``, are
    alignments: they are computed a second time, with the model's weights held, for the encoder and the adapter alone.

    Attributes:
        backbone: Network. It and the conditioner are parts that ``optimizer.parts`` can name.
        conditioner: Labels or texts to conditions.
        losses: What the diffusion model minimises, an alignment among it.
        alignment: Weight of the alignments for the tokenizer, in place of their own.
        momentum: Share of the newest batch in the running mean and variance that the latents are standardised with.
        time: Distribution of t.
        path: Path between data and noise, as in ``diffusion``.
        predicts: What the backbone's output is trained to be.
        dropout: Share of samples that train the null condition, for guidance.
    """

    backbone: ComponentConfig
    conditioner: ComponentConfig
    losses: tuple[LossConfig, ...]
    alignment: float = attrs.field(default=1.5, validator=positive)
    momentum: float = attrs.field(default=0.1, validator=v.and_(v.gt(0.0), v.le(1.0)))
    time: TimeConfig = attrs.field(factory=TimeConfig)
    path: PathName = "linear"
    predicts: Predicts = "velocity"
    dropout: float = attrs.field(default=0.1, validator=fraction)


@attrs.frozen(kw_only=True)
class StopConfig:
    """When a stage ends before its last step: no metric got better for long enough, and the probe stood still.

    Attributes:
        metrics: Measured on held-out images, on the weights that would be exported.
        every: Steps between measurements.
        patience: Steps without an improvement of any of them after which the stage ends.
        tolerance: Relative change that counts as an improvement.
        images: Held-out images of a measurement.
        probe: Training images that a linear probe of the latents learns from. Its top-1 accuracy on the held-out images
            is watched as well, and counts in both directions: an encoder that learns to reconstruct loses some of what
            it knew, and the stage goes on until neither changes (aligntok.md §4.2). None for no probe.
    """

    metrics: tuple[ComponentConfig, ...] = attrs.field(validator=v.min_len(1))
    every: int = attrs.field(default=1000, validator=positive)
    patience: int = attrs.field(default=5000, validator=positive)
    tolerance: float = attrs.field(default=0.01, validator=not_negative)
    images: int = attrs.field(default=500, validator=positive)
    probe: int | None = attrs.field(default=None, validator=optional_positive)


@attrs.frozen(kw_only=True)
class StageConfig:
    """One stage of tokenizer training.

    Attributes:
        name: Name of its folder and of ``--until``.
        trains: Parts that learn (``encoder``, ``adapter``, ``decoder``, or a submodule such as ``decoder.heads``); the
            others are frozen.
        losses: What is minimised.
        steps: Optimizer steps.
        batch: Images per optimizer step, over all ranks.
        optimizer: Optimizer and schedule.
        ema: Decay of the exponential moving average that is exported; None exports the raw weights.
        ema_ramp: Half-life of the average as a share of the steps done, while that is shorter than what `ema` means
            (StyleGAN's ramp; vfm_vae.md §4.4); None starts with `ema`.
        teacher: Earlier stage whose exported encoder and adapter, frozen, give the reference latents; ``start`` is the
            tokenizer that the recipe loads.
        lora: Low-rank adaptation of parts that it trains; None trains their weights themselves.
        equivariance: Equivariance regularisation; None for none.
        denoiser: Diffusion model that trains with the tokenizer and aligns its latents; None for none. Optimizer and
            averages are the stage's.
        guard: Which steps are dropped for a loss that jumped; None drops none but those that are not finite.
        stop: When to end early; None trains all steps.
    """

    name: str
    trains: tuple[str, ...]
    losses: tuple[LossConfig, ...]
    steps: int = attrs.field(validator=positive)
    batch: int = attrs.field(default=256, validator=positive)
    optimizer: OptimizerConfig = attrs.field(factory=OptimizerConfig)
    ema: float | None = attrs.field(default=0.999, validator=decay)
    ema_ramp: float | None = attrs.field(default=None, validator=optional_positive)
    teacher: str | None = None
    lora: LoraConfig | None = None
    equivariance: EquivarianceConfig | None = None
    denoiser: DenoiserConfig | None = None
    guard: GuardConfig | None = None
    stop: StopConfig | None = None

    def diffusion(self) -> DiffusionConfig:
        """Return the settings of the stage's diffusion model as those of a diffusion stage."""
        assert self.denoiser is not None
        shared = attrs.asdict(self.denoiser, recurse=False)
        del shared["alignment"], shared["momentum"]
        return DiffusionConfig(**shared, steps=self.steps, batch=self.batch, optimizer=self.optimizer, ema=self.ema)

"""The schema of a recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import attrs
from attrs import validators as v

from underpaint.config.diffusion import GuidanceConfig, PathName, Predicts, TimeConfig
from underpaint.config.joint import check_joint
from underpaint.config.stages import GuardConfig, LoraConfig
from underpaint.errors import ConfigError, suggest

__all__ = [
    "AdaptiveConfig",
    "ComponentConfig",
    "CriticConfig",
    "DataConfig",
    "DenoiserConfig",
    "DiffusionConfig",
    "EngineConfig",
    "EquivarianceConfig",
    "EvaluationConfig",
    "GuardConfig",
    "GuidanceConfig",
    "LatentsConfig",
    "LoraConfig",
    "LossConfig",
    "OptimizerConfig",
    "Recipe",
    "StageConfig",
    "StopConfig",
    "TimeConfig",
    "TokenizerConfig",
]

_positive: Any = v.gt(0)
_not_negative: Any = v.ge(0)
_fraction = v.and_(v.ge(0.0), v.le(1.0))
_optional_positive: Any = v.optional(_positive)
_decay: Any = v.optional(v.and_(v.ge(0.0), v.lt(1.0)))


def _finite(_: Any, attribute: Any, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"'{attribute.name}' is {value}; give a finite number.")


def _flat(value: Any, path: str, reserved: tuple[str, ...]) -> Any:
    """Split ``{name, reserved keys, options…}`` as it is written into the fields of the class."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path} must be a component name, or a mapping with 'name' and its options.")
    if "name" not in value:
        raise ConfigError(f"{path} lacks the key 'name', the registered name of the component.")
    options = {key: item for key, item in value.items() if key not in reserved}
    fixed = {key: item for key, item in value.items() if key in reserved}
    return {**fixed, "options": options}


@attrs.frozen(kw_only=True)
class ComponentConfig:
    """A component: its name alone, or ``{name: …, option: …}``."""

    name: str
    options: Mapping[str, Any] = attrs.field(factory=dict)

    @staticmethod
    def from_plain(value: Any, path: str) -> Any:
        """Accept the flat form that recipes are written in."""
        return _flat(value, path, ("name",))


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

    lr: float = attrs.field(default=1e-4, validator=_positive)
    rates: Mapping[str, float] = attrs.field(factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = attrs.field(default=0.0, validator=_not_negative)
    warmup: int = attrs.field(default=0, validator=_not_negative)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    final: float = attrs.field(default=0.1, validator=_fraction)
    clip: float | None = attrs.field(default=1.0, validator=_optional_positive)


@attrs.frozen(kw_only=True)
class AdaptiveConfig:
    """A weight that keeps the gradient of a loss in proportion to that of the reconstruction (VQGAN, eq. 7).

    The factor is the ratio of two gradient norms at one weight: that of all weighted reconstruction losses, over that
    of this loss. The loss's own weight multiplies it. Written as a word, it is `at`.

    Attributes:
        at: Part whose last layer is measured at.
        eps: Added to the denominator.
        limit: Largest factor.
        apply: Whether the factor multiplies the weight; false only logs it.
    """

    at: Literal["decoder", "adapter"]
    eps: float = attrs.field(default=1e-4, validator=_not_negative)
    limit: float = attrs.field(default=1e4, validator=_positive)
    apply: bool = True

    @staticmethod
    def from_plain(value: Any, path: str) -> Any:
        """Accept the part alone."""
        return {"at": value} if isinstance(value, str) else value


@attrs.frozen(kw_only=True)
class CriticConfig:
    """How the critic of an adversarial loss is trained.

    Attributes:
        optimizer: Optimizer and schedule; None takes the stage's.
        start: First step at which the critic learns; the loss's own `start` says when its verdict counts.
        carry: Earlier stage whose critic, of the same loss, is trained on; None starts a new one.
    """

    optimizer: OptimizerConfig | None = None
    start: int = attrs.field(default=0, validator=_not_negative)
    carry: str | None = None


@attrs.frozen(kw_only=True)
class LossConfig:
    """A loss with its weight and the steps at which it counts.

    Attributes:
        name: Registered name of the loss.
        weight: Factor of all its terms.
        start: First step at which it counts.
        end: First step at which it no longer counts; None for never.
        adaptive: Factor that follows the gradient of the reconstruction; None for none.
        critic: Training of its critic, for adversarial losses.
        options: Options of the loss.
    """

    name: str
    weight: float = attrs.field(default=1.0, validator=_finite)
    start: int = attrs.field(default=0, validator=_not_negative)
    end: int | None = None
    adaptive: AdaptiveConfig | None = None
    critic: CriticConfig | None = None
    options: Mapping[str, Any] = attrs.field(factory=dict)

    @staticmethod
    def from_plain(value: Any, path: str) -> Any:
        """Accept the flat form that recipes are written in."""
        return _flat(value, path, ("name", "weight", "start", "end", "adaptive", "critic"))


@attrs.frozen(kw_only=True)
class DataConfig:
    """What is trained on, and how an image becomes a training crop.

    Attributes:
        train: Data set to train on.
        validation: Data set to measure on; None holds out a share of the training set.
        holdout: That share: a fixed random draw from all classes.
        limit: Train on at most this many samples, a fixed random draw; None for all.
        size: Side of the square crop in pixels, or height and width.
        crop: Where the crop is taken after the short side was resized.
        resize: Pixels that the short side of a training image is resized to before the crop, at least those of `size`;
            None takes the smallest image that covers the crop, as measuring and encoding always do.
        enlarge: Train although most images are smaller than the crop. A few of them are always enlarged to cover it.
        flip: Flip half of the training images horizontally.
        workers: Loader processes per rank; 0 reads in the training process.
        memory: Decode the training images once and keep them on the training device of every rank: height·width·3
            bytes each. For small images and many epochs.
        max_broken: Share of broken images above which reading stops.
    """

    train: ComponentConfig
    validation: ComponentConfig | None = None
    holdout: float = attrs.field(default=0.05, validator=v.and_(v.gt(0.0), v.lt(1.0)))
    limit: int | None = attrs.field(default=None, validator=_optional_positive)
    size: int | tuple[int, int] = 256
    crop: Literal["center", "random"] = "center"
    resize: int | None = None
    enlarge: bool = False
    flip: bool = False
    workers: int = attrs.field(default=2, validator=_not_negative)
    memory: bool = False
    max_broken: float = attrs.field(default=0.01, validator=_fraction)

    def __attrs_post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ConfigError(f"data.size is {self.height}×{self.width}; give pixels above 0, such as 256.")
        if self.resize is not None and self.resize < max(self.height, self.width):
            raise ConfigError(
                f"data.resize is {self.resize}, and the crop is {self.height}×{self.width}; resize to at least its "
                "longer side, or leave it out."
            )
        if self.memory and self.crop == "random":
            raise ConfigError(
                "data.memory keeps every image as one crop, and data.crop is 'random'; set crop to 'center', or memory "
                "to false."
            )

    @property
    def height(self) -> int:
        """Pixels."""
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        """Pixels."""
        return self.size if isinstance(self.size, int) else self.size[1]


@attrs.frozen(kw_only=True)
class TokenizerConfig:
    """Encoder, adapter and decoder; or a folder of a finished tokenizer.

    Attributes:
        encoder: Encoder.
        adapter: Adapter.
        decoder: Decoder.
        latent_channels: d of the latent; None is 32, or that of the tokenizer that is loaded, which it must equal.
        stride: Pixels of the image that a latent cell covers, per side; an encoder with an option of that name is
            given images of the size that makes it so. None takes what encoder and adapter give.
        load: Folder or URL of an exported tokenizer to start from, instead of the three.
    """

    encoder: ComponentConfig | None = None
    adapter: ComponentConfig | None = None
    decoder: ComponentConfig | None = None
    latent_channels: int | None = attrs.field(default=None, validator=_optional_positive)
    stride: int | None = attrs.field(default=None, validator=_optional_positive)
    load: str | None = None

    def __attrs_post_init__(self) -> None:
        parts = [self.encoder, self.adapter, self.decoder]
        if self.load is None and None in parts:
            raise ConfigError("tokenizer needs 'encoder', 'adapter' and 'decoder', or 'load' with an exported folder.")
        if self.load is not None and parts != [None] * 3:
            raise ConfigError("tokenizer has 'load' beside 'encoder', 'adapter' or 'decoder'; keep one of the two.")


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

    latent: float = attrs.field(default=0.5, validator=_fraction)
    input: float = attrs.field(default=0.25, validator=_fraction)
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)

    def __attrs_post_init__(self) -> None:
        if not self.scales or not all(0.0 < scale <= 1.0 for scale in self.scales):
            raise ConfigError(f"equivariance.scales is {list(self.scales)}; name at least one number in (0, 1].")
        if self.input > 0.0 and min(self.scales) == 1.0:
            raise ConfigError("equivariance.input is above 0, but no scale is below 1; set input to 0.")


@attrs.frozen(kw_only=True)
class StopConfig:
    """When a stage ends before its last step: no metric got better for long enough.

    Attributes:
        metrics: Measured on held-out images, on the weights that would be exported.
        every: Steps between measurements.
        patience: Steps without an improvement of any of them after which the stage ends.
        tolerance: Relative change that counts as an improvement.
        images: Held-out images of a measurement.
    """

    metrics: tuple[ComponentConfig, ...] = attrs.field(validator=v.min_len(1))
    every: int = attrs.field(default=1000, validator=_positive)
    patience: int = attrs.field(default=5000, validator=_positive)
    tolerance: float = attrs.field(default=0.01, validator=_not_negative)
    images: int = attrs.field(default=500, validator=_positive)


@attrs.frozen(kw_only=True)
class DenoiserConfig:
    """A diffusion model that trains with the tokenizer of a stage, in the stage's steps (Leng et al. 2025, REPA-E).

    The gradients of its losses stop at the latent. Those of its losses that read hidden states, such as ``repa``, are
    alignments: they are computed a second time, with the model's weights held, for the encoder and the adapter alone.

    Attributes:
        backbone: Network. It and the conditioner are parts that ``optimizer.rates`` can name.
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
    alignment: float = attrs.field(default=1.5, validator=_positive)
    momentum: float = attrs.field(default=0.1, validator=v.and_(v.gt(0.0), v.le(1.0)))
    time: TimeConfig = attrs.field(factory=TimeConfig)
    path: PathName = "linear"
    predicts: Predicts = "velocity"
    dropout: float = attrs.field(default=0.1, validator=_fraction)


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
    steps: int = attrs.field(validator=_positive)
    batch: int = attrs.field(default=256, validator=_positive)
    optimizer: OptimizerConfig = attrs.field(factory=OptimizerConfig)
    ema: float | None = attrs.field(default=0.999, validator=_decay)
    ema_ramp: float | None = attrs.field(default=None, validator=_optional_positive)
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


@attrs.frozen(kw_only=True)
class LatentsConfig:
    """The latent cache.

    Attributes:
        flip: Also store the latents of the flipped images.
        dtype: Storage type.
        store: What is stored of the posterior of an image: its ``mode``; a ``sample``, drawn once and for all; or the
            ``posterior`` itself, which takes twice the space and from which every training step draws anew.
        statistics: What latents are standardised with: mean and standard deviation of each ``channel``, or of each
            ``position`` of each channel. The cache holds both.
        shard: Samples per shard file.
        batch: Images encoded at once, per rank.
        read: How training reads them. ``random`` shuffles all samples, and is for caches that fit into memory (the page
            cache). ``sequential`` shuffles blocks of consecutive samples, and the samples within a window of blocks;
            files are read in pieces of a block, by every machine all of them, a window ahead.
        block: Samples of a block, for ``sequential``.
        window: Blocks of a window, for ``sequential``; two windows should fit into memory.
    """

    flip: bool = False
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    store: Literal["mode", "posterior", "sample"] = "mode"
    statistics: Literal["channel", "position"] = "channel"
    shard: int = attrs.field(default=4096, validator=_positive)
    batch: int = attrs.field(default=64, validator=_positive)
    read: Literal["random", "sequential"] = "random"
    block: int = attrs.field(default=1024, validator=_positive)
    window: int = attrs.field(default=16, validator=_positive)


@attrs.frozen(kw_only=True)
class DiffusionConfig:
    """Training of the latent diffusion model.

    Attributes:
        backbone: Network.
        conditioner: Labels or texts to conditions.
        losses: What is minimised.
        steps: Optimizer steps.
        batch: Latents per optimizer step, over all ranks.
        optimizer: Optimizer and schedule.
        ema: Decay of the exponential moving average that is sampled from.
        time: Distribution of t.
        path: Path between data and noise: ``linear``; ``cosine`` (α = cos(πt/2), GVP); ``vp`` (the variance-preserving
            path of DDPM, in continuous time). Samplers follow the linear path whatever the training path.
        predicts: What the backbone's output is trained to be: velocity of that path, noise or data.
        dropout: Share of samples that train the null condition, for guidance.
        companion: Frozen encoder whose pooled features of the images are the companion, for backbones that have one;
            they are taken as the encoder gives them.
        start: Stage whose denoiser is trained on, weights alone; None starts a new one.
    """

    backbone: ComponentConfig
    conditioner: ComponentConfig
    losses: tuple[LossConfig, ...] = (LossConfig(name="velocity"),)
    steps: int = attrs.field(validator=_positive)
    batch: int = attrs.field(default=256, validator=_positive)
    optimizer: OptimizerConfig = attrs.field(factory=OptimizerConfig)
    ema: float | None = attrs.field(default=0.9999, validator=_decay)
    time: TimeConfig = attrs.field(factory=TimeConfig)
    path: PathName = "linear"
    predicts: Predicts = "velocity"
    dropout: float = attrs.field(default=0.1, validator=_fraction)
    companion: ComponentConfig | None = None
    start: str | None = None


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
        labels: ``balanced`` gives every class equally often, ``random`` draws uniformly.
        seed: Seed of noise and labels.
        show: Images in the report's grids.
    """

    images: int = attrs.field(default=1000, validator=_positive)
    batch: int = attrs.field(default=50, validator=_positive)
    reconstruction: tuple[ComponentConfig, ...] = (ComponentConfig(name="psnr"), ComponentConfig(name="ssim"))
    generation: tuple[ComponentConfig, ...] = ()
    sampler: ComponentConfig = attrs.field(factory=lambda: ComponentConfig(name="euler"))
    guidance: GuidanceConfig = attrs.field(factory=GuidanceConfig)
    labels: Literal["balanced", "random"] = "balanced"
    seed: int = 0
    show: int = attrs.field(default=24, validator=_positive)


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
    accumulation: int = attrs.field(default=1, validator=_positive)
    compile: bool = False
    deterministic: bool = False
    log_every: int = attrs.field(default=20, validator=_positive)
    checkpoint_every: int = attrs.field(default=1000, validator=_positive)
    keep: int = attrs.field(default=2, validator=_positive)
    max_bad_steps: int = attrs.field(default=10, validator=_positive)
    timeout: float = attrs.field(default=1800.0, validator=_positive)


_STAGE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
RESERVED_STAGES = ("start", "latents", "diffusion", "samples", "report")


@attrs.frozen(kw_only=True)
class Recipe:
    """Everything that a run is made from.

    Attributes:
        name: Name of the run's folder and report.
        about: What it is, for listings and the report.
        seed: Seed of initialisation, data order, noise.
        plugins: Plugins that it needs: names of installed ones, ``.py`` files or dotted modules.
        data: Images.
        tokenizer: Encoder, adapter, decoder.
        stages: Tokenizer training, in order.
        latents: Latent cache.
        diffusion: Diffusion training; None ends with the tokenizer.
        evaluation: What is measured.
        engine: How training runs.
        trackers: Where scalars go beside ``metrics.jsonl``.
    """

    name: str
    about: str = ""
    seed: int = 0
    plugins: tuple[str, ...] = ()
    data: DataConfig
    tokenizer: TokenizerConfig
    stages: tuple[StageConfig, ...] = ()
    latents: LatentsConfig = attrs.field(factory=LatentsConfig)
    diffusion: DiffusionConfig | None = None
    evaluation: EvaluationConfig = attrs.field(factory=EvaluationConfig)
    engine: EngineConfig = attrs.field(factory=EngineConfig)
    trackers: tuple[ComponentConfig, ...] = ()

    def __attrs_post_init__(self) -> None:
        seen: list[str] = []
        for index, stage in enumerate(self.stages):
            path = f"stages[{index}]"
            if not _STAGE_NAME.fullmatch(stage.name) or stage.name in RESERVED_STAGES:
                raise ConfigError(
                    f"{path}.name is '{stage.name}'; use lower-case letters, digits, '-' and '_', and none of "
                    f"{', '.join(RESERVED_STAGES)}."
                )
            if stage.name in seen:
                raise ConfigError(f"{path}.name '{stage.name}' is used twice; rename one.")
            if stage.teacher == "start" and self.tokenizer.load is None:
                raise ConfigError(
                    f"{path}.teacher is 'start', the tokenizer that the recipe loads, but tokenizer.load is not set; "
                    "set it, or name an earlier stage."
                )
            references = {"teacher": stage.teacher if stage.teacher != "start" else None}
            for number, loss in enumerate(stage.losses):
                if loss.critic is not None:
                    references[f"losses[{number}].critic.carry"] = loss.critic.carry
            for key, name in references.items():
                if name is not None and name not in seen:
                    raise ConfigError(
                        f"{path}.{key} is '{name}', which is not an earlier stage; "
                        f"earlier stages: {', '.join(seen) or 'none'}."
                    )
            parts = ("encoder", "adapter", "decoder")
            if not stage.trains:
                raise ConfigError(f"{path}.trains is empty; name at least one of encoder, adapter, decoder.")
            for part in stage.trains:
                if part.partition(".")[0] not in parts:
                    raise ConfigError(f"{path}.trains names '{part}'. {suggest(part, parts)}")
            if stage.lora is not None:
                stage.lora.check(stage.trains, path)
            if stage.ema_ramp is not None and stage.ema is None:
                raise ConfigError(f"{path}.ema_ramp is set, but ema is null; set ema to the decay it leads to.")
            if stage.denoiser is not None:
                check_joint(stage, path, self.engine)
            seen.append(stage.name)
        joint = [stage.name for stage in self.stages if stage.denoiser is not None]
        start = None if self.diffusion is None else self.diffusion.start
        if start is not None and start not in joint:
            raise ConfigError(
                f"diffusion.start is '{start}', which is no stage that trains a denoiser; those that do: "
                f"{', '.join(joint) or 'none'}."
            )
        guidance = self.evaluation.guidance
        if self.diffusion is not None and self.diffusion.dropout == 0.0 and guidance.scale != 1.0 and not guidance.weak:
            raise ConfigError(
                f"evaluation.guidance.scale is {guidance.scale}, and diffusion.dropout is 0, so the null condition "
                "that it needs is never trained; set dropout to 0.1, or the scale to 1."
            )

"""Training of the diffusion model: its parts, at which noise it is trained, and how its samples are guided."""

from __future__ import annotations

import math
from typing import Any, Literal

import attrs
from attrs import validators as v

from underpaint.config.component import ComponentConfig
from underpaint.config.engine import OptimizerConfig
from underpaint.config.losses import LossConfig
from underpaint.config.ranges import decay, finite, fraction, not_negative, optional_positive, positive
from underpaint.errors import ConfigError

__all__ = ["DiffusionConfig", "GuidanceConfig", "PathName", "Predicts", "ShiftRule", "TimeConfig"]

PathName = Literal["linear", "cosine", "vp"]
Predicts = Literal["velocity", "noise", "data"]
ShiftRule = Literal["latent", "tokens", "flux"]


def _positive_number(_: Any, field: attrs.Attribute[Any], value: float | str) -> None:
    if not isinstance(value, str) and not 0.0 < value < math.inf:
        raise ValueError(f"'{field.name}' must be a number above 0, not {value}.")


@attrs.frozen(kw_only=True)
class TimeConfig:
    """Distribution of the noise fraction t during training: drawn, kept to a range, then shifted.

    Attributes:
        distribution: On [0, 1]: ``uniform``; ``logit-normal``, the sigmoid of a normal variable; ``mode``, which
            favours the middle by a factor (both Esser et al. 2024, §3.1); ``ddpm``, any of the 1000 timesteps of DDPM's
            linear schedule, as `ddpm_fractions` has them.
        mean: Mean of that normal variable, in our time (0 data, 1 noise).
        std: Its standard deviation.
        mode: s of the mode distribution, from −1 to 2/(π−2); above 0 favours the middle, 0 is uniform.
        range: The distribution is truncated to this part of [0, 1].
        uniform_from: Optimizer step from which t is uniform instead (LightningDiT); None for never.
        shift: α of t' = αt / (1 + (α−1)t), above 1 towards noise; or the rule that gives α for B×d×h×w latents:
            ``latent`` is √(d·h·w / 4096) (RAE), ``tokens`` is √(tokens / 256) (Esser et al. 2024, §5.3.2), ``flux``
            is FLUX's exp(μ), with μ on a line from 0.5 at 256 tokens to 1.15 at 4096.
        patch: Latent cells of one token, per side, for the rules that count tokens.
    """

    distribution: Literal["uniform", "logit-normal", "mode", "ddpm"] = "logit-normal"
    mean: float = 0.0
    std: float = attrs.field(default=1.0, validator=v.and_(positive, finite))
    mode: float = attrs.field(default=1.29, validator=v.and_(v.ge(-1.0), v.le(2.0 / (math.pi - 2.0))))
    range: tuple[float, float] = (0.0, 1.0)
    uniform_from: int | None = attrs.field(default=None, validator=v.optional(not_negative))
    shift: float | ShiftRule = attrs.field(default=1.0, validator=_positive_number)
    patch: int = attrs.field(default=1, validator=positive)

    def __attrs_post_init__(self) -> None:
        if not 0.0 <= self.range[0] < self.range[1] <= 1.0:
            raise ConfigError(f"time.range is {list(self.range)}; it must be [low, high] with 0 ≤ low < high ≤ 1.")


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
    steps: int = attrs.field(validator=positive)
    batch: int = attrs.field(default=256, validator=positive)
    optimizer: OptimizerConfig = attrs.field(factory=OptimizerConfig)
    ema: float | None = attrs.field(default=0.9999, validator=decay)
    time: TimeConfig = attrs.field(factory=TimeConfig)
    path: PathName = "linear"
    predicts: Predicts = "velocity"
    dropout: float = attrs.field(default=0.1, validator=fraction)
    companion: ComponentConfig | None = None
    start: str | None = None


@attrs.frozen(kw_only=True)
class GuidanceConfig:
    """Guidance: away from the unconditional velocity, or away from that of a weaker model.

    Attributes:
        scale: w of v = v_other + w·(v_cond − v_other); 1 is no guidance.
        channels: How many of the first latent channels are guided; None guides all.
        interval: Noise fractions between which guidance is on, in the time that the field receives: after the
            sampler's shift.
        weak: Folder or URL of a generator over the same latents whose velocity, under the same condition, is guided
            away from (AutoGuidance, Karras et al. 2024); None takes the model's own with the null condition.
    """

    scale: float = attrs.field(default=1.0, validator=v.and_(not_negative, v.lt(math.inf)))
    channels: int | None = attrs.field(default=None, validator=optional_positive)
    interval: tuple[float, float] = (0.0, 1.0)
    weak: str | None = None

    def __attrs_post_init__(self) -> None:
        if not 0.0 <= self.interval[0] < self.interval[1] <= 1.0:
            raise ConfigError(
                f"guidance.interval is {list(self.interval)}; it must be [low, high] with 0 ≤ low < high ≤ 1."
            )

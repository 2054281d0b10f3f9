"""Options of the solvers."""

from __future__ import annotations

import math
from typing import Any, Literal

import attrs
from attrs import validators as v

from underpaint import ConfigError

__all__ = ["AdaptiveConfig", "DDIMConfig", "EulerMaruyamaConfig", "GridConfig", "ShiftRule", "StepsConfig"]

ShiftRule = Literal["latent", "tokens", "flux"]


def _positive_number(_: Any, field: attrs.Attribute[Any], value: float | str) -> None:
    if not isinstance(value, str) and not 0.0 < value < math.inf:
        raise ValueError(f"'{field.name}' must be a number above 0, not {value}.")


@attrs.frozen(kw_only=True)
class GridConfig:
    """What solvers on a grid have in common.

    Attributes:
        steps: Steps. The grid has one point more.
        shift: α of t' = αt / (1 + (α−1)t), which moves the grid points towards noise when above 1; or the rule that
            gives α for B×d×h×w latents: ``latent`` is √(d·h·w / 4096) (RAE), ``tokens`` is √(tokens / 256) (Esser et
            al. 2024, §5.3.2), ``flux`` is FLUX's exp(μ), with μ on a line from 0.5 at 256 tokens to 1.15 at 4096.
            LightningDiT's ``timestep_shift`` of 0.3, in time that runs the other way, is α = 1/0.3.
        patch: Latent cells of one token, per side, for the rules that count tokens.
    """

    steps: int = attrs.field(default=50, validator=v.gt(0))
    shift: float | ShiftRule = attrs.field(default=1.0, validator=_positive_number)
    patch: int = attrs.field(default=1, validator=v.gt(0))


@attrs.frozen(kw_only=True)
class StepsConfig(GridConfig):
    """Options of ``euler``, ``heun`` and ``ab2``.

    Attributes:
        steps: Steps. The grid has one point more: what LightningDiT, SiT and RAE call "250 steps" is 250 grid points,
            hence ``steps: 249`` here.
        shift: See `GridConfig`.
        patch: See `GridConfig`.
        end: Noise fraction before the shift at which the grid ends. What noise is left there stays in the latents. RAE
            ends at 0.001, which its shift makes 0.0069; the others at 0.
    """

    end: float = attrs.field(default=0.0, validator=v.and_(v.ge(0.0), v.lt(1.0)))


@attrs.frozen(kw_only=True)
class EulerMaruyamaConfig(GridConfig):
    """Options of ``euler-maruyama``.

    Attributes:
        steps: Steps, the last one among them: at least 2.
        shift: As for ``euler``.
        patch: As for ``euler``.
        last: Noise fraction, after the shift, from which the last step goes to 0 without noise.
        noise: Factor of the diffusion coefficient 2t; 0 is Euler's method on the same grid.
        float64: Keep the state in float64; the network is given the type of the noise.
    """

    steps: int = attrs.field(default=250, validator=v.gt(1))
    last: float = attrs.field(default=0.04, validator=v.and_(v.gt(0.0), v.lt(1.0)))
    noise: float = attrs.field(default=1.0, validator=v.ge(0.0))
    float64: bool = True


@attrs.frozen(kw_only=True)
class DDIMConfig(GridConfig):
    """Options of ``ddim`` and ``ddpm``.

    Attributes:
        steps: Steps; the grid has one point more.
        shift: As for ``euler``.
        patch: As for ``euler``.
        eta: η of the noise added at each step: 0 is deterministic, 1 is DDPM.
        schedule: ``continuous`` times, or ``discrete`` ones: as many of DDPM's 1000 timesteps, evenly spaced, as there
            are steps (2 to 1000; not shifted).
        variance: Variance of DDPM's steps (η = 1): that of the ``posterior``, or the ``learned`` one, which backbones
            of ``dit/*`` have from published weights; training here leaves it as it was.

    Raises:
        ConfigError: The options contradict each other.
    """

    eta: float = attrs.field(default=0.0, validator=v.and_(v.ge(0.0), v.le(1.0)))
    schedule: Literal["continuous", "discrete"] = "continuous"
    variance: Literal["posterior", "learned"] = "posterior"

    def __attrs_post_init__(self) -> None:
        if self.schedule == "discrete" and (not 2 <= self.steps <= 1000 or self.shift != 1.0):
            raise ConfigError(
                f"The discrete schedule has 1000 timesteps and is not shifted, and steps is {self.steps}, shift "
                f"{self.shift}; set steps to 2 up to 1000 and shift to 1."
            )
        if self.variance == "learned" and self.eta != 1.0:
            raise ConfigError(
                f"variance is 'learned', which is for steps of DDPM, and eta is {self.eta:g}; set it to 1."
            )


@attrs.frozen(kw_only=True)
class AdaptiveConfig:
    """Options of ``adaptive``.

    Attributes:
        rtol: Error allowed in a step, relative to the latents (root mean square over the batch).
        atol: Error allowed beside that.
        max_steps: Steps after which it gives up, rejected ones included.
    """

    rtol: float = attrs.field(default=1e-5, validator=v.gt(0.0))
    atol: float = attrs.field(default=1e-5, validator=v.gt(0.0))
    max_steps: int = attrs.field(default=1000, validator=v.gt(0))

"""Guidance of a velocity field: away from the unconditional one, or from that of a weaker model."""

from __future__ import annotations

import torch
from torch import Tensor

from underpaint.config.diffusion import GuidanceConfig
from underpaint.diffusion.paths import Velocity
from underpaint.errors import ConfigError
from underpaint.interfaces.conditioner import Condition, Conditioner
from underpaint.interfaces.sampler import VarianceField, VelocityField

__all__ = ["check_guidance", "guided_field", "null_condition"]


def check_guidance(guidance: GuidanceConfig, channels: int) -> None:
    """Refuse to guide more channels than the latents have.

    Raises:
        ConfigError: It does.
    """
    if guidance.channels is not None and guidance.channels > channels:
        raise ConfigError(
            f"guidance.channels is {guidance.channels}, and the latent has {channels} channels; "
            "give fewer, or null to guide all."
        )


def null_condition(conditioner: Conditioner, batch: int, device: torch.device) -> Condition:
    """Return the unconditional condition of B samples.

    Raises:
        ConfigError: The conditioner has none: its `null` raises NotImplementedError.
    """
    try:
        return conditioner.null(batch, device)
    except NotImplementedError:
        raise ConfigError(
            f"guidance.scale is set, and the conditioner '{conditioner.spec.name}' has no null condition to guide away "
            "from; set the scale to 1, or name a weaker generator as guidance.weak."
        ) from None


def guided_field(
    velocity: Velocity,
    condition: Condition,
    guidance: GuidanceConfig,
    *,
    null: Condition | None = None,
    weak: VelocityField | None = None,
    companion: int = 0,
    variance: bool = False,
) -> VelocityField:
    """Return the velocity field that a sampler follows.

    v = v_other + w·(v_cond − v_other) for the first `channels` latent channels and for t within `interval`, both ends
    included (Kynkäänniemi et al. 2024); v_cond elsewhere. A companion is guided as a whole, a variance not at all.
    v_other is the velocity under the null condition (Ho & Salimans 2022, eq. 6), or that of a weaker model
    (AutoGuidance, Karras et al. 2024). t is what the field receives: after any shift of the sampler's grid. With a null
    condition both velocities come from one pass over a doubled batch. Where guidance is off, and at scale 1, the model
    sees the plain batch and the weaker model nothing.

    Args:
        velocity: The model.
        condition: Condition of the B samples.
        guidance: Scale, channels, interval.
        null: Unconditional condition of the B samples, to guide away from.
        weak: Velocity of a weaker model, to guide away from instead.
        companion: Channels of the state, its last ones, that hold a companion.
        variance: The model gives a variance below the velocity, and the field shall be a `VarianceField`.
    """
    low, high = guidance.interval
    always = (low, high) == (0.0, 1.0)
    off = guidance.scale == 1.0
    assert off or (null is None) != (weak is None)
    both = None if null is None or off else Condition.join(condition, null)

    def pair(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if both is not None:
            first, second = velocity(torch.cat((x_t, x_t)), torch.cat((t, t)), both).chunk(2)
            return first, second
        assert weak is not None
        return velocity(x_t, t, condition), weak(x_t, t)

    def field(x_t: Tensor, t: Tensor) -> Tensor:
        inside = (t >= low) & (t <= high)
        # Reading the decision waits for the device, and saves half the work of the steps outside.
        if off or (not always and not bool(inside.any())):
            return velocity(x_t, t, condition)
        state = x_t.shape[1]
        given, other = pair(x_t, t)
        conditional, other = given[:, :state], other[:, :state]
        guided = other + guidance.scale * (conditional - other)
        guided = torch.where(inside.view(-1, 1, 1, 1), guided, conditional)
        end = state - companion
        count = end if guidance.channels is None else guidance.channels
        return torch.cat((guided[:, :count], conditional[:, count:end], guided[:, end:], given[:, state:]), dim=1)

    def halves(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        first, second = field(x_t, t).chunk(2, dim=1)
        return first, second

    return VarianceField(halves) if variance else field

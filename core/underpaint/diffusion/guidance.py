"""Classifier-free guidance of a velocity field."""

from __future__ import annotations

import torch
from torch import Tensor

from underpaint.config.schema import GuidanceConfig
from underpaint.errors import ConfigError
from underpaint.interfaces.backbone import Backbone
from underpaint.interfaces.conditioner import Condition
from underpaint.interfaces.sampler import VelocityField

__all__ = ["guided_field"]


def guided_field(backbone: Backbone, condition: Condition, null: Condition, guidance: GuidanceConfig) -> VelocityField:
    """Return the velocity field that a sampler follows.

    v = v_null + w·(v_cond − v_null) (Ho & Salimans 2022, eq. 6), for the first `channels` latent channels and for
    t within `interval`, both ends included (Kynkäänniemi et al. 2024); v_cond elsewhere. t is what the model
    receives: after any shift of the sampler's grid. Both velocities come from one pass over a doubled batch; where
    guidance is off, and at scale 1, the backbone sees the plain batch.

    Args:
        backbone: Network.
        condition: Condition of the B samples.
        null: Unconditional condition of the B samples.
        guidance: Scale, channels, interval.

    Raises:
        ConfigError: (by the field) More channels are to be guided than the latent has.
    """
    low, high = guidance.interval
    always = (low, high) == (0.0, 1.0)
    both = None if guidance.scale == 1.0 else Condition.join(condition, null)

    def predict(x_t: Tensor, t: Tensor, given: Condition) -> Tensor:
        velocity: Tensor = backbone(x_t, t, given).velocity
        return velocity

    def field(x_t: Tensor, t: Tensor) -> Tensor:
        if both is None:
            return predict(x_t, t, condition)
        count = x_t.shape[1] if guidance.channels is None else guidance.channels
        if count > x_t.shape[1]:
            raise ConfigError(
                f"guidance.channels is {count}, and the latent has {x_t.shape[1]} channels; "
                "give fewer, or null to guide all."
            )
        inside = (t >= low) & (t <= high)
        # Reading the decision waits for the device, and saves half the work of the steps outside.
        if not always and not bool(inside.any()):
            return predict(x_t, t, condition)
        conditional, unconditional = predict(torch.cat((x_t, x_t)), torch.cat((t, t)), both).chunk(2)
        guided = unconditional + guidance.scale * (conditional - unconditional)
        guided = torch.where(inside.view(-1, 1, 1, 1), guided, conditional)
        return torch.cat((guided[:, :count], conditional[:, count:]), dim=1)

    return field

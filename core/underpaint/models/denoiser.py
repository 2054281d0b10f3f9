"""A diffusion model without the tokenizer that its latents come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from underpaint.interfaces.backbone import Backbone
from underpaint.interfaces.conditioner import Conditioner

__all__ = ["Denoiser"]


class Denoiser(nn.Module):
    """A backbone, with the conditioner that it was trained with where that is known.

    Published diffusion models come so. With a tokenizer it becomes a `Generator`.

    Attributes:
        backbone: Predicts the velocity.
        conditioner: Makes conditions from labels or texts; None where the backbone reads those of text encoders that
            are published apart.
        about: Plain facts about where it comes from.
        guided_channels: How many of the first latent channels its authors' sampler guides; None where it guides all.
            A generator made of it does the same unless asked otherwise.
    """

    def __init__(
        self,
        backbone: Backbone,
        conditioner: Conditioner | None = None,
        about: Mapping[str, Any] | None = None,
        *,
        guided_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.conditioner = conditioner
        self.about: dict[str, Any] = dict(about or {})
        self.guided_channels = guided_channels

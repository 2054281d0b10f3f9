"""Options of the adapter and of the loss. All defaults are ours where the paper is silent."""

from __future__ import annotations

from typing import Literal

import attrs
from attrs import validators as v

from underpaint import ConfigError

__all__ = ["MlpConfig", "SemanticConfig"]


@attrs.frozen(kw_only=True)
class MlpConfig:
    """Options of ``aligntok/mlp``.

    Attributes:
        hidden: Width between the two layers; None takes the encoder's width. (Not stated in the paper.)
        activation: Between the two layers. (Not stated in the paper.)
        gaussian: Give mean and log-variance, for the loss ``kl``. (The paper tried it and reports no gain.)
    """

    hidden: int | None = attrs.field(default=None, validator=v.optional(v.gt(0)))
    activation: Literal["gelu", "silu", "relu"] = "gelu"
    gaussian: bool = False


@attrs.frozen(kw_only=True)
class SemanticConfig:
    """Options of ``aligntok/semantic``.

    Attributes:
        distance: ``l2`` is the mean squared difference; ``cosine`` is 1 − cosine similarity over channels.
        space: Where it is measured: on the ``latent`` (after the adapter, the paper's choice), or on the encoder's
            ``features`` (before it, the paper's ablation).
        scale_free: Divide the squared difference of each channel by the teacher's variance of that channel over the
            batch, so that the loss does not grow with the scale of the latent. (Ours; for ``l2`` only.)
    """

    distance: Literal["l2", "cosine"] = "l2"
    space: Literal["latent", "features"] = "latent"
    scale_free: bool = False

    def __attrs_post_init__(self) -> None:
        if self.scale_free and self.distance == "cosine":
            raise ConfigError(
                "aligntok/semantic has scale_free with distance 'cosine', which has no scale; "
                "set distance to 'l2' or leave scale_free out."
            )

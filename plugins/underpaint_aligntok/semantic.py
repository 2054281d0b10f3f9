"""The semantic preservation loss, and the scale of the latent that its weight is to be read by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from underpaint import Loss, StepTensors
from underpaint_aligntok.config import SemanticConfig

__all__ = ["LatentScale", "Semantic"]


class Semantic(Loss):
    """Keeps the latent, or the features, near those of the frozen teacher (AlignTok, L_sp).

    ``l2`` is the mean over all elements of (z − z*)², the reduction that we read into the paper, which states none.
    Several feature maps are averaged. The gradient flows through the current tensor only.
    """

    needs = frozenset({"posterior", "reference_posterior"})

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self._config = config
        if config.space == "features":
            # What is read depends on the option, so it is the instance that declares it.
            self.needs = frozenset({"features", "reference_features"})  # type: ignore[misc]

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``semantic``."""
        if self._config.space == "latent":
            assert step.posterior is not None
            assert step.reference_posterior is not None
            return {"semantic": self._distance(step.posterior.mean, step.reference_posterior.mean)}
        assert step.features is not None
        assert step.reference_features is not None
        pairs = list(zip(step.features.maps, step.reference_features.maps, strict=True))
        total = sum((self._distance(current, frozen) for current, frozen in pairs), start=pairs[0][0].new_zeros(()))
        return {"semantic": total / len(pairs)}

    def _distance(self, current: Tensor, frozen: Tensor) -> Tensor:
        current, frozen = current.float(), frozen.detach().float()
        if self._config.distance == "cosine":
            return 1.0 - F.cosine_similarity(current, frozen, dim=1).mean()
        squared = (current - frozen).square()
        if self._config.scale_free:
            # The floor keeps a dead channel, of no variance, from drowning the others.
            variance = frozen.var(dim=(0, 2, 3), correction=0, keepdim=True)
            squared = squared / variance.clamp_min(1e-6)
        return squared.mean()


class LatentScale(Loss):
    """Logs the standard deviation of the latent's channels over batch and cells: their mean, least and largest.

    The squared distance of `Semantic` grows with the square of it, so the same weight means less for a small latent.
    It has no gradient: give it the weight 0, or constants are added to the total.
    """

    needs = frozenset({"posterior"})

    @torch.no_grad()
    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``latent_std``, ``latent_std_min`` and ``latent_std_max``."""
        assert step.posterior is not None
        std = step.posterior.mean.float().var(dim=(0, 2, 3), correction=0).sqrt()
        return {"latent_std": std.mean(), "latent_std_min": std.min(), "latent_std_max": std.max()}

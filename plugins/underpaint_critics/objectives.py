"""What the two sides of an adversarial game minimise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from underpaint_critics.config import Objective

__all__ = ["critic_terms", "model_term"]

_Pointwise = Callable[[Tensor], Tensor]

# For each objective, of the logits: the model's on reconstructions, the critic's on images, on reconstructions.
_OBJECTIVES: Mapping[Objective, tuple[_Pointwise, _Pointwise, _Pointwise]] = {
    "hinge": (torch.neg, lambda real: F.relu(1.0 - real), lambda fake: F.relu(1.0 + fake)),
    "least-squares": (lambda fake: (fake - 1.0).square(), lambda real: (real - 1.0).square(), torch.square),
    "non-saturating": (lambda fake: F.softplus(-fake), lambda real: F.softplus(-real), F.softplus),
}


def _mean(logits: Sequence[Tensor], pointwise: _Pointwise) -> Tensor:
    """Average over the logits of each tensor, then over the tensors, so that every scale counts the same."""
    at_least = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in logits]
    return torch.stack([pointwise(value).mean() for value in at_least]).mean()


def model_term(objective: Objective, fake: Sequence[Tensor]) -> Tensor:
    """Return what the model minimises.

    With D the logits of reconstructions: hinge −D, least squares (D − 1)², non-saturating softplus(−D). VQGAN and
    latent diffusion call the hinge's −D together with a logistic critic "vanilla"; it is not offered.

    Args:
        objective: The game.
        fake: Logits of reconstructions, a tensor of any shape for each scale.
    """
    return _mean(fake, _OBJECTIVES[objective][0])


def critic_terms(objective: Objective, real: Sequence[Tensor], fake: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return what the critic minimises, for images and for reconstructions.

    Hinge relu(1 − D) and relu(1 + D), least squares (D − 1)² and D², non-saturating softplus(−D) and softplus(D).

    Args:
        objective: The game.
        real: Logits of images, a tensor for each scale.
        fake: Logits of reconstructions.
    """
    _, of_real, of_fake = _OBJECTIVES[objective]
    return _mean(real, of_real), _mean(fake, of_fake)

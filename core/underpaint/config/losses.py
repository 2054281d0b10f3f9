"""A loss with its weight, and the training of its critic."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import attrs

from underpaint.config.component import split_options
from underpaint.config.engine import OptimizerConfig
from underpaint.config.ranges import finite, not_negative, positive
from underpaint.errors import ConfigError

__all__ = ["AdaptiveConfig", "CriticConfig", "LossConfig", "check_windows"]


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
    eps: float = attrs.field(default=1e-4, validator=not_negative)
    limit: float = attrs.field(default=1e4, validator=positive)
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
    start: int = attrs.field(default=0, validator=not_negative)
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
    weight: float = attrs.field(default=1.0, validator=finite)
    start: int = attrs.field(default=0, validator=not_negative)
    end: int | None = None
    adaptive: AdaptiveConfig | None = None
    critic: CriticConfig | None = None
    options: Mapping[str, Any] = attrs.field(factory=dict)

    @staticmethod
    def from_plain(value: Any, path: str) -> Any:
        """Accept the flat form that recipes are written in."""
        return split_options(value, path, ("name", "weight", "start", "end", "adaptive", "critic"))


def check_windows(losses: Sequence[LossConfig], steps: int, path: str, carried: Collection[str] = ()) -> None:
    """Refuse losses that would never count, and critics that would never learn.

    Args:
        losses: Losses of a training.
        steps: Its optimizer steps.
        path: Where they stand in the recipe.
        carried: Names of losses whose critics a later stage trains on: this stage may be there for the critic alone.

    Raises:
        ConfigError: There is one.
    """
    for index, loss in enumerate(losses):
        place = f"{path}[{index}]"
        if loss.critic is not None and loss.critic.start >= steps:
            raise ConfigError(
                f"{place}.critic.start is {loss.critic.start}, and steps is {steps}, so the critic of "
                f"'{loss.name}' would never learn; set it below {steps}, train longer, or remove the loss."
            )
        if loss.name in carried:
            continue
        if loss.start >= steps:
            raise ConfigError(
                f"{place}.start is {loss.start}, and steps is {steps}, so the loss '{loss.name}' would never "
                f"count; set it below {steps}, train longer, or remove the loss."
            )
        if loss.end is not None and loss.end <= loss.start:
            raise ConfigError(
                f"{place}.end is {loss.end}, and start is {loss.start}, so the loss '{loss.name}' would never count; "
                "set end above start, or remove the loss."
            )

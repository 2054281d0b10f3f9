"""Weighted losses of a stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from underpaint.config.schema import LossConfig
from underpaint.errors import ConfigError
from underpaint.interfaces.loss import Loss, StepTensors
from underpaint.registration.manager import manager

__all__ = ["WeightedLosses"]


class WeightedLosses:
    """The losses of a stage with their weights and windows.

    It is not a module: what losses carry (a perceptual network, say) is neither trained nor saved.

    Args:
        configs: Losses of the stage.
        available: Fields of `StepTensors` that the stage fills.
        device: Where they compute.
        path: Where they stand in the recipe, for messages.

    Raises:
        ConfigError: A loss needs a tensor that the stage does not have.
    """

    def __init__(
        self, configs: Sequence[LossConfig], *, available: frozenset[str], device: torch.device, path: str
    ) -> None:
        self._items: list[tuple[LossConfig, Loss]] = []
        for index, config in enumerate(configs):
            loss = manager().create("loss", config.name, **config.options)
            assert isinstance(loss, Loss)
            lacking = sorted(loss.needs - available)
            if lacking:
                hint = " (a stage has references when it names a 'teacher')" if "reference" in lacking[0] else ""
                raise ConfigError(
                    f"{path}[{index}]: the loss '{config.name}' needs {', '.join(lacking)}, which this stage does not "
                    f"have{hint}; it has {', '.join(sorted(available - {'step'}))}."
                )
            self._items.append((config, loss.to(device).requires_grad_(False)))

    def __call__(self, tensors: StepTensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum and the unweighted terms by name.

        A term outside its window of steps is neither computed nor logged.
        """
        total: Tensor | None = None
        terms: dict[str, Tensor] = {}
        for config, loss in self._items:
            if tensors.step < config.start or (config.end is not None and tensors.step >= config.end):
                continue
            for name, value in loss(tensors).items():
                unique = name if name not in terms else f"{name}_{config.name.replace('/', '_')}"
                terms[unique] = value.detach()
                weighted = config.weight * value
                total = weighted if total is None else total + weighted
        if total is None:
            raise ConfigError(
                f"No loss counts at step {tensors.step}; extend the 'start' and 'end' of the stage's losses."
            )
        return total, terms

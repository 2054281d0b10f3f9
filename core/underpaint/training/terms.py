"""Weighted losses of a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from underpaint.config.losses import LossConfig
from underpaint.errors import ConfigError
from underpaint.interfaces.loss import AdversarialLoss, Loss, StepSizes, StepTensors
from underpaint.registration.manager import manager
from underpaint.training.balance import Share, balanced, detached
from underpaint.training.compilation import units_of
from underpaint.weights import tensor_hash

__all__ = ["LossItem", "WeightedLosses"]

_REACHES = {
    "decoder": frozenset({"reconstruction"}),
    "adapter": frozenset({"reconstruction", "latents", "posterior"}),
}
_GIVEN = frozenset({"step", "inputs", "images", "labels", "reconstruction"})


@attrs.frozen(eq=False)
class LossItem:
    """One loss of a stage.

    Attributes:
        key: Its name within the stage, unique, without dots.
        config: Weight, window, adaptive weight, critic.
        loss: The loss.
    """

    key: str
    config: LossConfig
    loss: Loss

    def counts(self, step: int) -> bool:
        """Whether it counts at an optimizer step."""
        return self.config.start <= step and (self.config.end is None or step < self.config.end)

    @property
    def judges_images(self) -> bool:
        """Whether its gradient reaches the model through the reconstruction alone."""
        return "reconstruction" in self.loss.needs and self.loss.needs <= _GIVEN and not self.loss.trains

    @property
    def is_reference(self) -> bool:
        """Whether adaptive weights compare with its gradient: reconstruction losses of a fixed weight above 0."""
        fixed = self.config.adaptive is None and self.config.weight > 0.0
        return fixed and self.judges_images and not isinstance(self.loss, AdversarialLoss)

    @property
    def aligns(self) -> bool:
        """Whether it compares hidden states of the backbone with something."""
        return bool(self.loss.layers)


class WeightedLosses:
    """The losses of a stage with their weights and windows.

    It is not a module: what most losses carry (a perceptual network, say) is neither trained nor saved. What trains is
    in `heads`, for the stage's module to hold, and in the critics of `adversaries`.

    Args:
        configs: Losses of the stage.
        available: Fields of `StepTensors` that the stage fills.
        sizes: What the losses' own layers are built for.
        device: Where they compute.
        path: Where they stand in the recipe, for messages.
        average: Averages a tensor over the ranks.

    Attributes:
        items: The losses.
        heads: Losses that train, by key.
        adversaries: Losses with a critic.
        needs: Fields of `StepTensors` that any of them reads.
        layers: Blocks of the backbone that any of them reads.
        reconstruction: Values of the losses that are `LossItem.is_reference` in the last call, by key, unweighted.

    Raises:
        ConfigError: A loss needs a tensor that the stage does not have, or has settings that do not fit it.
    """

    def __init__(
        self,
        configs: Sequence[LossConfig],
        *,
        available: frozenset[str],
        sizes: StepSizes,
        device: torch.device,
        path: str,
        average: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.items: list[LossItem] = []
        self.reconstruction: dict[str, Tensor] = {}
        self.heads = nn.ModuleDict()
        self._average = average
        for index, config in enumerate(configs):
            loss = manager().create("loss", config.name, **config.options)
            assert isinstance(loss, Loss)
            _check(config, loss, available, f"{path}[{index}]")
            loss.prepare(sizes)
            key = config.name.replace("/", "_").replace(".", "_")
            if any(item.key == key for item in self.items):
                key = f"{key}_{index}"
            loss.to(device)
            if loss.trains:
                self.heads[key] = loss
            elif not isinstance(loss, AdversarialLoss):
                loss.requires_grad_(False)
            self.items.append(LossItem(key, config, loss))
        self.adversaries = [item for item in self.items if isinstance(item.loss, AdversarialLoss)]
        self.needs = frozenset[str]().union(*(item.loss.needs for item in self.items))
        self.layers = tuple(sorted({layer for item in self.items for layer in item.loss.layers}))
        self.adaptive = tuple(
            sorted({item.config.adaptive.at for item in self.items if item.config.adaptive is not None})
        )
        if self.adaptive and not any(item.is_reference for item in self.items):
            raise ConfigError(
                f"{path}: an adaptive weight compares with the reconstruction losses, and there is none of fixed "
                "weight; add one such as 'l1'."
            )

    def __call__(
        self, tensors: StepTensors, layers: Mapping[str, nn.Parameter] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum and the unweighted terms by name, with adaptive factors as ``factor_KEY``.

        A term outside its window of steps is neither computed nor logged.

        Args:
            tensors: The step.
            layers: The weight that each part of `adaptive` is measured at.
        """
        active = [item for item in self.items if item.counts(tensors.step)]
        if not active:
            raise ConfigError(
                f"No loss counts at step {tensors.step}; extend the 'start' and 'end' of the stage's losses."
            )
        balancing = torch.is_grad_enabled() and any(item.config.adaptive is not None for item in active)
        seen = attrs.evolve(tensors, reconstruction=detached(tensors.reconstruction)) if balancing else tensors
        terms: dict[str, Tensor] = {}
        shares: list[Share] = []
        for item in active:
            values = item.loss(seen if item.judges_images else tensors)
            for name, value in values.items():
                terms[name if name not in terms else f"{name}_{item.key}"] = value.detach()
            total = torch.stack([value.float() for value in values.values()]).sum()
            shares.append(
                Share(item.key, total, item.config.weight, item.config.adaptive, item.judges_images, item.is_reference)
            )
        self.reconstruction = {share.key: share.value.detach() for share in shares if share.is_reference}
        if not balancing:
            return torch.stack([share.weight * share.value for share in shares]).sum(), terms
        if not any(share.is_reference for share in shares):
            raise ConfigError(
                f"An adaptive weight compares with the reconstruction losses, and none of fixed weight counts at step "
                f"{tensors.step}; extend the 'start' and 'end' of one."
            )
        assert layers is not None
        assert tensors.reconstruction is not None
        assert seen.reconstruction is not None
        loss, factors = balanced(shares, tensors.reconstruction, seen.reconstruction, layers, self._average)
        return loss, terms | {f"factor_{key}": factor for key, factor in factors.items()}

    @property
    def reaches_back(self) -> bool:
        """Whether an adaptive weight takes gradients at a layer before the decoder, through the whole of it."""
        return any(part != "decoder" for part in self.adaptive)

    def units(self) -> list[nn.Module]:
        """Return what of the losses to compile."""
        return [unit for item in self.items for network in item.loss.units() for unit in units_of(network)]

    def hashes(self) -> dict[str, str]:
        """Return hashes of what the losses compute with and do not train, by what it is."""
        found = {}
        for item in self.items:
            networks = (item.loss, *item.loss.held)
            frozen = {
                f"{place}.{name}": param
                for place, network in enumerate(networks)
                for name, param in network.named_parameters()
                if not param.requires_grad
            }
            if frozen:
                found[f"set of frozen weights of the loss '{item.key}'"] = tensor_hash(frozen)
        return found

    def alignment(self, tensors: StepTensors) -> Tensor | None:
        """Return the sum of the alignments that count at a step, without their weights; None where none does."""
        found = [item.loss(tensors) for item in self.items if item.aligns and item.counts(tensors.step)]
        values = [value.float() for terms in found for value in terms.values()]
        return torch.stack(values).sum() if values else None


def _check(config: LossConfig, loss: Loss, available: frozenset[str], path: str) -> None:
    lacking = sorted(loss.needs - available)
    if lacking:
        hint = " (a stage has references when it names a 'teacher')" if "reference" in lacking[0] else ""
        raise ConfigError(
            f"{path}: the loss '{config.name}' needs {', '.join(lacking)}, which this stage does not "
            f"have{hint}; it has {', '.join(sorted(available - {'step'}))}."
        )
    if config.adaptive is not None and not loss.needs & _REACHES[config.adaptive.at]:
        raise ConfigError(
            f"{path}: the gradient of the loss '{config.name}' does not reach the {config.adaptive.at}, where its "
            f"adaptive weight is measured; it needs {', '.join(sorted(loss.needs))}."
        )
    if config.critic is not None and not isinstance(loss, AdversarialLoss):
        raise ConfigError(f"{path}: the loss '{config.name}' has no critic to train; remove its key 'critic'.")

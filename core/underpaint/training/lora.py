"""Low-rank adaptation (Hu et al. 2022): pairs of thin matrices beside frozen weights, and their sum for the export.

The pairs are parametrizations of the weights, not layers of another class: code that reads ``layer.weight`` itself, as
some attention layers do, computes with the sum, and so does everything else. The forward and backward pass cost what
those of full training cost; what becomes small is the optimizer's state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from underpaint.config.stages import LoraConfig
from underpaint.errors import ConfigError

__all__ = ["add_pairs", "merged"]


class _Pair(nn.Module):
    """Adds scale·up·down to a weight; `up` starts at zero, `down` from N(0, 1/columns)."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        # On the CPU, so that the numbers do not depend on the device.
        self.down = nn.Parameter(torch.randn(rank, columns, device="cpu").mul(columns**-0.5).to(weight))
        self.up = nn.Parameter(torch.zeros(rows, rank).to(weight))
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down)


def add_pairs(part: nn.Module, config: LoraConfig, name: str) -> None:
    """Freeze a part and give its linear layers pairs that learn. Pairs are drawn from torch's generator.

    Args:
        part: Changed in place; its outputs stay as they are until the pairs learn.
        config: Rank, factor and layers.
        name: What the part is called, for messages.

    Raises:
        ConfigError: No layer has such a name, or one computes its weight from something else already.
    """
    part.requires_grad_(False)
    found = list(_matrices(part))
    chosen = [item for item in found if re.search(config.layers, item[0])]
    if not chosen:
        names = ", ".join(f"'{path}'" for path, _, _ in found[:3])
        raise ConfigError(
            f"lora.layers is '{config.layers}', which matches no linear layer of '{name}'; it has {len(found)}"
            f"{f', such as {names}' if found else ''}."
        )
    for path, module, attribute in chosen:
        if parametrize.is_parametrized(module, attribute):
            raise ConfigError(
                f"The layer '{path}' of '{name}' computes its weight, so it cannot be adapted; leave it out with "
                "lora.layers."
            )
        pair = _Pair(getattr(module, attribute), config.rank, config.alpha / config.rank)
        parametrize.register_parametrization(module, attribute, pair)


def _matrices(part: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield name, module and attribute of the weights of linear layers; attention may hold its first one itself."""
    for path, module in part.named_modules():
        if isinstance(module, nn.Linear):
            yield path, module, "weight"
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            yield path, module, "in_proj_weight"


def merged(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of a module with pairs as one of the module without them.

    Args:
        module: The module.
        state: All tensors of its state dict, by name, in any precision; values need not be the module's own.
    """
    result = dict(state)
    for path, layer in module.named_modules():
        if not parametrize.is_parametrized(layer):
            continue
        lists = layer.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        for attribute, steps in lists.items():
            pair = steps[0] if isinstance(steps, nn.ModuleList) else None
            if isinstance(pair, _Pair):
                start = f"{path}.parametrizations.{attribute}"
                weight, down, up = (result.pop(f"{start}.{name}") for name in ("original", "0.down", "0.up"))
                result[f"{path}.{attribute}"] = weight + pair.scale * (up @ down)
    return result

"""The trained layers of losses, such as a projection, from one stage to the next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from underpaint.config.recipe import write_atomically
from underpaint.weights import load_weights

__all__ = ["carry_heads", "differences", "export_heads"]


def export_heads(heads: nn.ModuleDict, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write ``KEY.safetensors`` for every head, for the next stage to carry on with.

    Args:
        heads: The losses that train, by key.
        state: Full state dict of the module that holds them as ``losses``.
        folder: Made if there are any heads.
    """
    for key in heads:
        start = f"losses.{key}."
        tensors = {name.removeprefix(start): t.contiguous() for name, t in state.items() if name.startswith(start)}
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"{key}.safetensors", save(tensors))


def carry_heads(heads: nn.ModuleDict, folder: Path) -> tuple[str, ...]:
    """Give the losses that train the heads that an earlier stage exported; one that does not fit stays new.

    Args:
        heads: The losses that train, by key, prepared.
        folder: The earlier stage's ``heads`` folder; it need not exist.

    Returns:
        Keys of the losses that were given one.

    Raises:
        DataError: A file is damaged.
    """
    taken = []
    for key, head in heads.items():
        path = folder / f"{key}.safetensors"
        state = load_weights(str(path)) if path.exists() else None
        if state is not None and not differences(head.state_dict(), state):
            head.load_state_dict(state)
            taken.append(key)
    return tuple(taken)


def differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    """Return names that only one of two state dicts has, or that have another shape in it."""

    def shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
        return tuple(state[name].shape) if name in state else None

    return [name for name in sorted(first.keys() | second.keys()) if shape(first, name) != shape(second, name)]

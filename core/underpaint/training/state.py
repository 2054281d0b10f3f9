"""The files of a training state: full tensors, one safetensors file per rank that wrote them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from underpaint.errors import DataError
from underpaint.training.ranks import Ranks
from underpaint.weights import save_tensors

__all__ = ["StateReader", "write_state"]

_FORMAT = "underpaint-engine-1"


def _shares(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Give every parameter to a rank so that all write about as much: the largest first, to the least loaded."""
    loads = [0] * count
    owner: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        owner[name] = rank
        loads[rank] += sizes[name]
    return owner


def _file(rank: int, count: int) -> str:
    return f"engine-{rank:05d}-of-{count:05d}.safetensors"


def write_state(
    folder: Path,
    ranks: Ranks,
    *,
    step: int,
    sizes: Mapping[str, int],
    read: Callable[[str], Iterable[tuple[str, Tensor]]],
    kinds: Sequence[str],
    buffers: Mapping[str, Tensor],
) -> None:
    """Write this rank's share. Every rank calls it.

    Args:
        folder: Existing folder, seen by all ranks.
        ranks: The processes.
        step: Applied optimizer steps.
        sizes: Elements of each parameter.
        read: Gives the full tensors of one kind, parameter by parameter, in the same order on every rank.
        kinds: Kinds to write.
        buffers: Buffers of rank 0 are written.

    Raises:
        OSError: Some rank could not write; raised on all of them.
    """
    owner = _shares(sizes, ranks.world_size)
    tensors: dict[str, Tensor] = {}
    for kind in kinds:
        for name, value in read(kind):
            if owner[name] == ranks.rank:
                tensors[f"{kind}/{name}"] = value.to("cpu", copy=True).contiguous()
    if ranks.is_main:
        tensors |= {f"buffer/{name}": buffer.to("cpu", copy=True).contiguous() for name, buffer in buffers.items()}
    failure: OSError | None = None
    try:
        path = folder / _file(ranks.rank, ranks.world_size)
        save_tensors(tensors, path, {"format": _FORMAT, "step": str(step)})
    except OSError as error:
        failure = error
    # All ranks leave together: the caller's next collective must not meet a rank that is handling an error.
    if ranks.any_true(failure is not None):
        raise failure or OSError("another rank could not write its share")


class StateReader:
    """Context that reads what `write_state` wrote, after all ranks agree that it is complete.

    Attributes:
        step: Applied optimizer steps.

    Raises:
        DataError: Files are missing or damaged, or other tensors are in them; raised on all ranks.
    """

    step: int

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        shapes: Mapping[str, torch.Size],
        kinds: Sequence[str],
        buffers: Mapping[str, Tensor],
    ) -> None:
        self._folder = folder
        self._ranks = ranks
        self._wanted = {f"{kind}/{name}": shape for kind in kinds for name, shape in shapes.items()}
        self._wanted |= {f"buffer/{name}": buffer.shape for name, buffer in buffers.items()}
        self._kinds = (*kinds, "buffer")
        self._files: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> StateReader:
        failure: DataError | None = None
        try:
            self._open()
        except DataError as error:
            failure = error
        except (OSError, SafetensorError) as error:
            failure = DataError(f"The training state in '{self._folder}' cannot be read: {error}.")
        if self._ranks.any_true(failure is not None):
            self._stack.close()
            raise failure or DataError(f"Another rank could not read the training state in '{self._folder}'.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _open(self) -> None:
        names = sorted(path.name for path in self._folder.glob("engine-*.safetensors"))
        count = len(names)
        if not names or names != [_file(rank, count) for rank in range(count)]:
            raise DataError(
                f"'{self._folder}' does not hold a complete training state: it has "
                f"{', '.join(names) or 'no engine files'}; choose another checkpoint."
            )
        steps = set()
        for name in names:
            file = self._stack.enter_context(safe_open(self._folder / name, framework="pt"))
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise DataError(
                    f"'{self._folder / name}' is no training state of this version; choose another checkpoint."
                )
            steps.add(int(metadata["step"]))
            self._files |= dict.fromkeys(file.keys(), file)
        if len(steps) != 1:
            raise DataError(f"The files in '{self._folder}' are of different steps; choose another checkpoint.")
        self.step = steps.pop()
        for problem in self._differences():
            raise DataError(
                f"The training state in '{self._folder}' is of another model: {problem}; "
                "use the recipe it was made with."
            )

    def _differences(self) -> Iterator[str]:
        held = {key for key in self._files if key.split("/", 1)[0] in self._kinds}
        for key in sorted(self._wanted.keys() - held):
            yield f"'{key}' is missing"
        for key in sorted(held - self._wanted.keys()):
            yield f"'{key}' is not part of this one"
        for key, shape in self._wanted.items():
            found = tuple(self._files[key].get_slice(key).get_shape())
            if found != tuple(shape):
                yield f"'{key}' has shape {list(found)} instead of {list(shape)}"

    def tensor(self, kind: str, name: str) -> Tensor:
        """Read one full tensor to the CPU."""
        key = f"{kind}/{name}"
        tensor: Tensor = self._files[key].get_tensor(key)
        return tensor

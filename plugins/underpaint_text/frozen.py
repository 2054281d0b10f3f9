"""What the conditioners have in common: a frozen encoder outside the module, with a memory of the texts it has seen.

The encoder is no submodule. So its weights are not trained, averaged, sharded or saved with a generator, which is made
again from the encoder's name; they are read when the first text is encoded, so that building a model needs no memory
for them. Conditioners of equal options share one encoder per device.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from underpaint import Condition, Conditioner, DataError
from underpaint_text.lost import losses

__all__ = ["Encode", "FrozenText", "stack"]

Encode = Callable[[list[str]], tuple[Condition, list[int]]]
"""B texts to their condition on the encoder's device, and how many tokens each lost because it was too long."""


class _Memory:
    """An encoder with its least recently used conditions: one row each, on the CPU.

    Args:
        encode: Encodes texts.
        device: Where it does.
        mib: Memory for the conditions.
        name: Of the encoder, for the warning about long texts.
    """

    def __init__(self, encode: Encode, device: torch.device, mib: int, name: str) -> None:
        self._encode = encode
        self._device = device
        self._limit = mib * 2**20
        self._name = name
        self._rows: OrderedDict[str, Condition] = OrderedDict()
        self._bytes = 0

    def __call__(self, texts: Sequence[str]) -> list[Condition]:
        """Return the condition of each text, a batch of one."""
        found = {text: self._rows[text] for text in texts if text in self._rows}
        for text in found:
            self._rows.move_to_end(text)
        new = [text for text in dict.fromkeys(texts) if text not in found]
        if new:
            found |= self._compute(new)
        return [found[text] for text in texts]

    def _compute(self, texts: list[str]) -> dict[str, Condition]:
        # No inference tensors, which a backward pass must not keep; and no autocast of whoever comes first, because
        # the rows serve training and sampling alike.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            condition, lost = self._encode(texts)
            condition = _map(condition, lambda tensor: tensor.detach().cpu())
            rows = {text: _row(condition, index) for index, text in enumerate(texts)}
        for text, tokens in zip(texts, lost, strict=True):
            if tokens > 0:
                losses.add(self._name, text, tokens)
        for text, row in rows.items():
            self._rows[text] = row
            self._bytes += _bytes(row)
        while self._bytes > self._limit:
            self._bytes -= _bytes(self._rows.popitem(last=False)[1])
        return rows


_memories: weakref.WeakValueDictionary[tuple[str, str], _Memory] = weakref.WeakValueDictionary()


class FrozenText(Conditioner):
    """Texts to the condition that a frozen encoder gives; the empty text is the null condition.

    Deriving classes set `token_dim` and `pooled_dim`.

    Args:
        config: Options; conditioners of equal ones share an encoder.
        model: Which encoder they name, for messages.
    """

    accepts: ClassVar[Literal["label", "text"]] = "text"
    name: ClassVar[str]
    _place: Tensor

    def __init__(self, config: Any, model: str) -> None:
        super().__init__()
        self.config = config
        self._model = model
        self._memory: tuple[torch.device, _Memory] | None = None
        # Follows the module to its device and type, which it could not know without a tensor.
        self.register_buffer("_place", torch.zeros(1), persistent=False)

    @abstractmethod
    def open(self, device: torch.device) -> Encode:
        """Read the encoder to a device.

        Raises:
            DataError: It cannot be had.
        """

    def forward(self, inputs: Tensor | Sequence[str], drop: Tensor | None = None) -> Condition:
        """Encode B texts.

        Args:
            inputs: The texts.
            drop: B booleans; True gives the null condition.

        Raises:
            DataError: The inputs are labels, or the encoder cannot be had.
        """
        if isinstance(inputs, Tensor):
            raise DataError(
                f"The conditioner '{self.name}' was given labels; use it with a data set that has captions, or use "
                "'labels'."
            )
        device = self._place.device
        given = self._on(stack(self._encoder()(inputs)), device)
        if drop is None:
            return given
        empty, drop = self.null(len(inputs), device), drop.to(device, non_blocking=True)

        def mixed(ours: Tensor | None, null: Tensor | None) -> Tensor | None:
            if ours is None or null is None:
                return None
            return torch.where(drop.view(-1, *[1] * (ours.dim() - 1)), null, ours)

        return Condition(
            mixed(given.tokens, empty.tokens), mixed(given.mask, empty.mask), mixed(given.pooled, empty.pooled)
        )

    def null(self, batch: int, device: torch.device) -> Condition:
        """Return the condition of the empty text, B times, on `device`."""
        empty = self._on(self._encoder()([""])[0], device)
        return _map(empty, lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def _on(self, condition: Condition, device: torch.device) -> Condition:
        dtype = self._place.dtype
        return _map(condition, lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def _encoder(self) -> _Memory:
        # The meta device is for shapes, and those are the same on the CPU.
        device = torch.device("cpu") if self._place.is_meta else self._place.device
        if self._memory is None or self._memory[0] != device:
            key = (repr(self.config), str(device))
            memory = _memories.get(key)
            if memory is None:
                with torch.device("cpu"):
                    memory = _Memory(self.open(device), device, self.config.cache, f"'{self.name}' ({self._model})")
                _memories[key] = memory
            self._memory = (device, memory)
        return self._memory[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None}


def stack(rows: Sequence[Condition]) -> Condition:
    """Join conditions of the same make along the batch."""

    def joined(tensors: list[Tensor | None]) -> Tensor | None:
        found = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(found) if found else None

    return Condition(
        joined([row.tokens for row in rows]), joined([row.mask for row in rows]), joined([row.pooled for row in rows])
    )


def _map(condition: Condition, change: Callable[[Tensor], Tensor]) -> Condition:
    parts = (condition.tokens, condition.mask, condition.pooled)
    return Condition(*(None if part is None else change(part) for part in parts))


def _row(condition: Condition, index: int) -> Condition:
    # A copy: a view would keep the whole batch in memory.
    return _map(condition, lambda tensor: tensor[index : index + 1].clone())


def _bytes(condition: Condition) -> int:
    parts = (condition.tokens, condition.mask, condition.pooled)
    return sum(part.nbytes for part in parts if part is not None)

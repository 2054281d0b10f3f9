"""The weights of ``tiny/vit`` that come with the package, and what is known of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from underpaint import DataError, load_weights, tensor_hash

__all__ = ["CARD", "Card", "read_shipped"]

_FOLDER = Path(__file__).with_name("weights")


@attrs.frozen
class Card:
    """What is known of the weights.

    Attributes:
        licence: Their licence.
        source: How they were made.
        hash: Hash of the tensors.
        numbers: Accuracy by name, as measured when they were made.
    """

    licence: str
    source: str
    hash: str
    numbers: Mapping[str, Any]


def _read_card() -> Card:
    return Card(**json.loads((_FOLDER / "card.json").read_text(encoding="utf-8")))


CARD = _read_card()


@cache
def read_shipped() -> dict[str, Tensor]:
    """Read the shipped weights, as float32.

    Raises:
        DataError: The file is missing or is not the one of the card.
    """
    path = _FOLDER / "tiny-vit.safetensors"
    state = load_weights(str(path))
    found = tensor_hash(state)
    if found != CARD.hash:
        raise DataError(
            f"The weights '{path.name}' of tiny/vit are damaged: their hash is {found[:12]}…, and should be "
            f"{CARD.hash[:12]}…; install underpaint again."
        )
    return {name: tensor.float() for name, tensor in state.items()}

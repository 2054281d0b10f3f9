"""Reads published files of the two networks, strictly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn

from torch import Tensor, nn

from underpaint import DataError, load_weights

__all__ = ["count_blocks", "fill", "read_tensors", "refuse"]

_PREFIX = "model.diffusion_model."

LEFT_OUT: Mapping[str, str] = {
    "first_stage_model.": "the image autoencoder: a tokenizer of its own",
    "vae.": "the image autoencoder: a tokenizer of its own",
    "text_encoders.": "text encoders: conditioners read them from their own folders",
    "conditioner.": "text encoders: conditioners read them from their own folders",
    "cond_stage_model.": "text encoders: conditioners read them from their own folders",
}
"""What files of whole pipelines hold beside the transformer, by the start of the key, and why it is left out."""

# The first that fits names a file, by a part of its keys.
_LOOKS: Mapping[str, str] = {
    "lora": "a LoRA, which needs the model that it changes",
    "joint_blocks.": "the transformer of Stable Diffusion 3 (format 'sd3')",
    "double_blocks.": "the transformer of FLUX (format 'flux')",
    "transformer_blocks.": "the layout of the library diffusers; take the single file of the model's publisher",
    "input_blocks.": "a U-Net of Stable Diffusion 1, 2 or XL",
    "adaLN_modulation": "a transformer of the DiT family",
    "decoder.": "an image autoencoder",
}


def read_tensors(source: str, mark: str, what: str) -> dict[str, Tensor]:
    """Return the transformer's tensors by their published names, in float32.

    Half-precision numbers are all float32 numbers too, so nothing is rounded.

    Args:
        source: File or fsspec URL.
        mark: Start of the names of its blocks.
        what: The network, for messages.

    Raises:
        DataError: The file cannot be read, is of another layout, or holds quantised weights.
    """
    state = load_weights(source)
    inside = {key.removeprefix(_PREFIX): tensor for key, tensor in state.items() if key.startswith(_PREFIX)}
    beside = [key for key in state if not key.startswith(_PREFIX)] if inside else []
    stray = [key for key in beside if not key.startswith(tuple(LEFT_OUT))]
    if stray:
        refuse(source, what, f"it holds {len(stray)} tensors beside the network ({', '.join(stray[:3])})")
    tensors = inside or state
    if not any(key.startswith(mark) for key in tensors):
        kind = next((name for part, name in _LOOKS.items() if any(part in key for key in state)), "")
        found = f"it looks like {kind}" if kind else f"its keys are like {', '.join(list(state)[:3]) or 'nothing'}"
        refuse(source, what, found)
    quantised = [f"{key} ({tensor.dtype})" for key, tensor in tensors.items() if not tensor.is_floating_point()]
    if quantised:
        refuse(source, what, f"{len(quantised)} tensors are no floating-point numbers ({', '.join(quantised[:3])})")
    return {key: tensor.float() for key, tensor in tensors.items()}


def count_blocks(tensors: Mapping[str, Tensor], start: str) -> int:
    """Return how many blocks the keys ``start.0.…``, ``start.1.…`` name: one more than the highest number."""
    numbers = [key.split(".")[1] for key in tensors if key.startswith(f"{start}.")]
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1


def refuse(source: str, what: str, why: str) -> NoReturn:
    """Raise the error that the file is not what it should be."""
    raise DataError(f"'{source}' is not {what} as published: {why}; check the file and the format.")


def fill(
    model: nn.Module, tensors: Mapping[str, Tensor], published: Callable[[str], str], source: str, what: str
) -> None:
    """Put tensors into a model that was made on the meta device.

    Args:
        model: The model.
        tensors: By published name, shaped as in the model.
        published: Gives the published name of one of the model's tensors.
        source: Where they come from, for messages.
        what: The network, for messages.

    Raises:
        DataError: A tensor is missing, left over or of another shape.
    """
    wanted = {published(name): (name, tensor.shape) for name, tensor in model.state_dict().items()}
    problems = {
        "missing": [key for key in wanted if key not in tensors],
        "unknown": [key for key in tensors if key not in wanted],
        "of another shape": [
            f"{key} {list(tensors[key].shape)} for {list(shape)}"
            for key, (_, shape) in wanted.items()
            if key in tensors and tensors[key].shape != shape
        ],
    }
    found = [
        f"{len(keys)} are {kind} ({', '.join(keys[:3])}{', …' * (len(keys) > 3)})"
        for kind, keys in problems.items()
        if keys
    ]
    if found:
        refuse(source, what, f"of its {len(wanted)} tensors, {' and '.join(found)}")
    model.load_state_dict({name: tensors[key].contiguous() for key, (name, _) in wanted.items()}, assign=True)

"""Reads weights from files and fsspec URLs, without unpickling anything but tensors; writes safetensors."""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import fsspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import Tensor

from underpaint.errors import DataError

__all__ = ["check_fit", "is_location", "load_weights", "save_tensors", "tensor_hash"]


def is_location(weights: str) -> bool:
    """Whether the part of a name after ``@`` is a place (``file:PATH`` or a URL) rather than a tag."""
    return weights.startswith("file:") or "://" in weights


def load_weights(location: str, *, nested: Sequence[str] = ("state_dict",)) -> dict[str, Tensor]:
    """Read a state dict.

    Args:
        location: ``file:PATH``, a path or any fsspec URL; ``.safetensors``, or a PyTorch file of plain tensors.
        nested: Keys under which a training file may hold the state dict; the first that is there is taken. What lies
            beside it, such as the arguments of the program that wrote it, is not looked at.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        DataError: The file is missing, unreachable, damaged or holds more than tensors.
    """
    path = location.removeprefix("file:") if location.startswith("file:") else location
    try:
        with fsspec.open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise DataError(f"There is no weights file '{path}'; check the path.") from None
    except IsADirectoryError:
        raise DataError(f"'{path}' is a folder; name the weights file in it.") from None
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"The weights '{path}' cannot be read: {error}.") from error
    try:
        if path.endswith(".safetensors"):
            return dict(load_safetensors(data))
        # Training files of DiT, SiT and REPA hold their command line; a namespace of plain values cannot do anything.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # What torch says here is advice to run the file's code.
        raise DataError(
            f"The weights file '{path}' is damaged, or holds objects beside tensors, which are not loaded because they "
            "can run code; have the program that wrote it save the tensors alone, best as safetensors."
        ) from None
    except Exception as error:
        raise DataError(
            f"The weights file '{path}' is damaged or not a file of tensors: {' '.join(str(error).split())[:200]}"
        ) from error
    if isinstance(state, Mapping):
        state = next((state[key] for key in nested if isinstance(state.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(
            f"The weights file '{path}' holds something else than named tensors; convert it to safetensors."
        )
    return dict(state)


def check_fit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], *, what: str, location: str) -> None:
    """Refuse weights whose names or shapes are not those of a module.

    Args:
        wanted: The module's state dict.
        given: The weights.
        what: Whose they should be, such as ``timm's 'vit_base_patch16_224'``, for the error.
        location: Where they come from, for the error.

    Raises:
        DataError: The message counts and names what is missing, unexpected and mis-shaped.
    """
    missing = [key for key in wanted if key not in given]
    unknown = [key for key in given if key not in wanted]
    shaped = [
        f"{key} {tuple(given[key].shape)} for {tuple(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    found = [("missing", missing), ("unexpected", unknown), ("mis-shaped", shaped)]
    problems = [f"{len(keys)} {kind} ({', '.join(keys[:3])}{', …' * (len(keys) > 3)})" for kind, keys in found if keys]
    if problems:
        raise DataError(
            f"The file '{location}' does not fit {what}: {'; '.join(problems)} of {len(wanted)} tensors; check that "
            "file and model belong together."
        )


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: The system refused, because the disk is full for instance.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        # The library wraps the system's error, and tells its number in the text alone.
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise OSError(errno.EIO, str(error), str(path)) from error
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors: names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

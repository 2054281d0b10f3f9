"""Checks of importers: what they refuse. What they read is for each plugin's own tests."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from underpaint.errors import UnderpaintError
from underpaint.testing.kit import Subject, check, expect

__all__: list[str] = []


def _refusal(subject: Subject, source: Path) -> str:
    try:
        found = subject.make().read(str(source))
    except UnderpaintError as error:
        return str(error)
    raise AssertionError(f"it made a {type(found).__name__} of '{source.name}', which is not of its layout")


@check("importer", since="1.1")
def refuses_missing_source(subject: Subject) -> None:
    """A source that does not exist is refused with an error that names it."""
    path = subject.folder / "absent.safetensors"
    message = _refusal(subject, path)
    expect(path.name in message, f"the error does not name the source: {message}")


@check("importer", since="1.1")
def refuses_other_weights(subject: Subject) -> None:
    """A file of other tensors is refused with an error that names the file and a tensor."""
    path = subject.folder / "other.safetensors"
    save_file({"no.such.layer": torch.zeros(3)}, path)
    message = _refusal(subject, path)
    expect(path.name in message, f"the error does not name the file: {message}")
    named = "no.such.layer" in message or "missing" in message or "'" in message.replace(f"'{path}'", "")
    expect(named, f"the error does not say what is missing or strange: {message}")


@check("importer", since="1.1")
def refuses_damaged_files(subject: Subject) -> None:
    """A damaged file is refused with an error, not with a library's exception."""
    path = subject.folder / "damaged.safetensors"
    path.write_bytes(b"\x00" * 100)
    message = _refusal(subject, path)
    expect(path.name in message, f"the error does not name the file: {message}")


class _Trap:
    """Leaves a folder behind when it is unpickled without care."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


@check("importer", since="1.1")
def unpickles_no_code(subject: Subject) -> None:
    """A PyTorch file whose pickle would run code is refused, and the code does not run."""
    trace, path = subject.folder / "ran", subject.folder / "trap.pt"
    torch.save({"model": _Trap(str(trace))}, path)
    message = _refusal(subject, path)
    expect(not trace.exists(), "the file's code was run; read weights with underpaint.load_weights")
    expect(path.name in message, f"the error does not name the file: {message}")

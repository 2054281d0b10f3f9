"""Listing and reading files on disk or at fsspec URLs, and what the three formats share."""

from __future__ import annotations

import hashlib
import json
import posixpath
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import fsspec
import numpy as np

from underpaint import BrokenImageError, DataError, short_side

__all__ = ["Names", "check_index", "find_shards", "fingerprint", "open_path", "read", "read_classes", "side"]

ATTEMPTS = 4
_HEAD = 65_536
"""Bytes that nearly all headers are within; profiles and previews may come before the size."""
_SPLIT = re.compile(r"(?:^|[-_.])(train|validation|valid|val|test)(?=[-_.]|$)")


class Names(Sequence[str]):
    """Many strings as one block of bytes, small in memory and quick to send to a worker."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._block = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        assert isinstance(index, (int, np.integer))
        return self._block[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


def check_index(index: int, count: int) -> None:
    """Raise IndexError unless 0 ≤ index < count."""
    if not 0 <= index < count:
        raise IndexError(f"There are {count} samples; {index} is not one of them.")


def open_path(path: str) -> tuple[Any, str]:
    """Return the file system of a path and the path within it.

    Raises:
        DataError: The URL is malformed, or what its protocol needs is not installed.
    """
    try:
        fs, root = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise DataError(f"The data path '{path}' cannot be opened: {error}.") from error
    return fs, str(root).rstrip("/")


def find_shards(path: str, split: str | None, suffix: str) -> tuple[Any, list[str], list[int]]:
    """List the files of a data set.

    Args:
        path: File, glob or folder.
        split: Word to choose files of a folder by.
        suffix: ``.parquet`` or ``.tar``.

    Returns:
        The file system, the sorted paths in it, and their sizes in bytes.

    Raises:
        DataError: There are none, or a folder holds several splits and none was chosen.
    """
    fs, root = open_path(path)
    try:
        if fs.isfile(root):
            files = [root]
        elif fs.isdir(root):
            files = [str(name) for name in fs.ls(root, detail=False) if str(name).endswith(suffix)]
            files = _of_split(files, split, path)
        else:
            files = [str(name) for name in fs.glob(root)] if re.search(r"[*?\[]", root) else []
        files.sort()
        sizes = [int(fs.info(name)["size"]) for name in files]
    except OSError as error:
        raise DataError(f"The data path '{path}' cannot be listed: {error}.") from error
    if not files:
        chosen = f" of split '{split}'" if split else ""
        raise DataError(f"There are no {suffix} files{chosen} at '{path}'; check the path.")
    return fs, files, sizes


def _of_split(files: list[str], split: str | None, path: str) -> list[str]:
    words = {name: match[1] if (match := _SPLIT.search(posixpath.basename(name))) else None for name in files}
    known = sorted({word for word in words.values() if word is not None})
    if split is not None:
        found = [name for name, word in words.items() if word == split]
        if not found:
            raise DataError(f"'{path}' has no files of split '{split}'; it has {', '.join(known) or 'no splits'}.")
        return found
    if len(known) > 1:
        raise DataError(f"'{path}' has files of the splits {', '.join(known)}; choose one with 'split'.")
    return files


def read(fs: Any, path: str, start: int | None = None, end: int | None = None) -> bytes:
    """Read a file or a part of it. Remote storage is asked again after a failure, with growing pauses.

    Raises:
        FileNotFoundError: There is no such file.
        DataError: It could not be read, or ended early; the message names the path and the attempts.
    """
    is_local = "file" in _protocols(fs)
    attempts = 1 if is_local else ATTEMPTS
    problem = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(0.5 * 2**attempt * random.uniform(0.5, 1.0))
        try:
            data = bytes(fs.cat_file(path, start=start, end=end))
        except FileNotFoundError:
            raise
        except (OSError, TimeoutError) as error:
            problem = f"{type(error).__name__}: {error}"
            continue
        if start is None or end is None or len(data) == end - start:
            return data
        problem = f"{len(data)} bytes came of {end - start}"
    raise DataError(
        f"'{fs.unstrip_protocol(path)}' could not be read in {attempts} attempt(s) ({problem}); "
        "check the storage and start again to resume."
    )


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def side(read_to: Callable[[int], bytes], size: int, key: str) -> int:
    """Return the short side of a stored image, from as few bytes as it takes.

    Args:
        read_to: Reads so many bytes from the image's beginning.
        size: How many it has.
        key: Name of the sample, for the error.

    Raises:
        BrokenImageError: It has no header of a known format.
    """
    try:
        return short_side(read_to(min(size, _HEAD)), key)
    except BrokenImageError:
        return short_side(read_to(size), key)


def read_classes(path: str) -> tuple[str, ...]:
    """Read class names from a JSON file.

    Raises:
        DataError: It is missing, or not of a form that `ParquetConfig` describes.
    """
    fs, root = open_path(path)
    try:
        items = json.loads(read(fs, root))
    except FileNotFoundError:
        raise DataError(f"There is no file of class names at '{path}'; check 'classes'.") from None
    except ValueError as error:
        raise DataError(f"The file of class names '{path}' is not JSON: {error}.") from error
    if isinstance(items, list) and items and all(isinstance(item, str) for item in items):
        return tuple(items)
    if isinstance(items, list) and items and all(isinstance(item, dict) and "name" in item for item in items):
        labels = [item.get("label", position) for position, item in enumerate(items)]
        if sorted(labels, key=str) == sorted(range(len(items)), key=str):
            names = {label: str(item["name"]) for label, item in zip(labels, items, strict=True)}
            return tuple(names[label] for label in range(len(items)))
        raise DataError(f"The labels in '{path}' are not the numbers 0 to {len(items) - 1}, each once.")
    raise DataError(f"The file of class names '{path}' must be a list of names, or of objects with 'name' and 'label'.")


def fingerprint(format_name: str, names: Iterable[str], sizes: Iterable[int], *details: object) -> str:
    """Return a hash of names and sizes of files; contents and dates are not read."""
    digest = hashlib.sha256(repr((format_name, *details)).encode())
    for name, size in zip(names, sizes, strict=True):
        digest.update(f"\n{size} ".encode() + name.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()

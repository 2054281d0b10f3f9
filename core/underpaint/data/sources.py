"""From a recipe or a path to data sets, and the split of one into training and validation."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from typing import Any

import attrs
import fsspec
import numpy as np
from numpy.typing import NDArray

from underpaint.config.component import ComponentConfig
from underpaint.data.order import Order
from underpaint.errors import DataError
from underpaint.interfaces.dataset import Dataset
from underpaint.registration.manager import manager

__all__ = ["GuessedData", "guess_dataset", "open_dataset", "split"]

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2")
_SHARDS = {".parquet": "files/parquet", ".tar": "files/webdataset"}
_SPLIT = re.compile(r"(?:^|[-_.])(train|validation|valid|val|test)(?=[-_.]|$)")
_HELD_OUT = ("validation", "valid", "val", "test")
_HOLDOUT_SEED = 20_250_101
_SEARCHED = 10_000
"""Folders without an image that are looked into; links that lead in circles end there."""


@attrs.frozen(kw_only=True)
class GuessedData:
    """What a path means.

    Attributes:
        train: Data set to train on.
        validation: Data set to measure on, or None when the path has no such part.
    """

    train: ComponentConfig
    validation: ComponentConfig | None = None


def open_dataset(config: ComponentConfig) -> Dataset:
    """Make a data set from its part of a recipe.

    Raises:
        UnderpaintError: The name or an option is wrong, or the source cannot be read.
        DataError: It holds no samples.
    """
    dataset = manager().create("dataset", config.name, **config.options)
    assert isinstance(dataset, Dataset)
    if not len(dataset):
        raise DataError(f"The data set '{config.name}' with options {dict(config.options)} holds no samples.")
    return dataset


def split(dataset: Dataset, holdout: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hold out a share of a data set, the same samples every time, drawn from all of its classes.

    Args:
        dataset: At least two samples.
        holdout: Share to hold out, between 0 and 1; at least one sample is held out and one is left.

    Returns:
        Indices to train on and indices to measure on, each ascending.

    Raises:
        DataError: There are fewer than two samples.
    """
    count = len(dataset)
    if count < 2:
        raise DataError(f"A data set of {count} samples cannot be split; give data.validation or more images.")
    held = min(max(1, round(count * holdout)), count - 1)
    order = Order(count, _HOLDOUT_SEED).indices(np.arange(count))
    return np.sort(order[held:]), np.sort(order[:held])


def guess_dataset(path: str) -> GuessedData:
    """Say which data set a path means.

    - a ``.parquet`` file, or a folder with such files (or with a ``data`` folder of them, as on Hugging Face):
      ``files/parquet``;
    - a ``.tar`` file, or a folder with such files: ``files/webdataset``;
    - a folder of images or of class folders: ``files/folder``.

    Names such as ``train-…``, ``val…`` and ``test-…`` of the files, or ``train`` and ``val`` of two folders of
    images, give both parts. A ``classes.json`` beside Parquet or tar files names the classes.

    Args:
        path: File, folder or fsspec URL.

    Raises:
        DataError: There is nothing at the path, or nothing that can be read.
    """
    # One place is one data set, however it is typed: a run goes on only on the same.
    path = path.rstrip("/") or path
    try:
        fs, root = fsspec.core.url_to_fs(path)
        exists, is_file = fs.exists(root), fs.isfile(root)
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"The data path '{path}' cannot be opened: {error}.") from error
    if not exists:
        raise DataError(f"There is no data at '{path}'; give a folder of images, or .parquet or .tar files.")
    if is_file:
        suffix = posixpath.splitext(root)[1].lower()
        if suffix in _SHARDS:
            return GuessedData(train=ComponentConfig(name=_SHARDS[suffix], options={"path": path}))
        hint = " Give the folder that it is in." if suffix in _IMAGES else ""
        raise DataError(f"'{path}' is neither a .parquet nor a .tar file.{hint}")
    files, folders = _list(fs, root)
    for suffix in _SHARDS:
        if any(name.endswith(suffix) for name in files):
            return _shards(path, files, suffix)
    if "data" in folders:
        inner, _ = _list(fs, f"{root}/data")
        if any(name.endswith(".parquet") for name in inner):
            return _shards(f"{path}/data", inner, ".parquet")
    if _has_images(fs, root):
        return _folders(path, folders)
    found = f"holds only {', '.join((files + folders)[:3])}" if files or folders else "is empty"
    raise DataError(f"The folder '{path}' {found}; it should hold images, class folders, .parquet or .tar files.")


def _list(fs: Any, folder: str) -> tuple[list[str], list[str]]:
    """Return the names of a folder's files and of its subfolders, sorted."""
    names: tuple[list[str], list[str]] = ([], [])
    for entry in fs.ls(folder, detail=True):
        path = str(entry["name"]).rstrip("/")
        is_folder = entry["type"] == "directory" or (entry.get("islink", False) and fs.isdir(path))
        names[is_folder].append(posixpath.basename(path))
    return sorted(names[0]), sorted(names[1])


def _shards(path: str, files: Iterable[str], suffix: str) -> GuessedData:
    names = set(files)
    splits = {match[1] for name in names if name.endswith(suffix) and (match := _SPLIT.search(name))}
    options: dict[str, Any] = {"path": path}
    if "classes.json" in names:
        options["classes"] = f"{path}/classes.json"
    kind = _SHARDS[suffix]
    if len(splits) < 2:
        return GuessedData(train=ComponentConfig(name=kind, options=options))
    held = next((name for name in _HELD_OUT if name in splits), None)
    first = "train" if "train" in splits else sorted(splits - {held})[0]
    return GuessedData(
        train=ComponentConfig(name=kind, options={**options, "split": first}),
        validation=ComponentConfig(name=kind, options={**options, "split": held}),
    )


def _folders(path: str, folders: list[str]) -> GuessedData:
    held = next((name for name in _HELD_OUT if name in folders), None)
    if "train" not in folders or held is None:
        return GuessedData(train=ComponentConfig(name="files/folder", options={"path": path}))
    return GuessedData(
        train=ComponentConfig(name="files/folder", options={"path": f"{path}/train"}),
        validation=ComponentConfig(name="files/folder", options={"path": f"{path}/{held}"}),
    )


def _has_images(fs: Any, root: str) -> bool:
    folders = [root]
    for _ in range(_SEARCHED):
        if not folders:
            break
        folder = folders.pop()
        files, inner = _list(fs, folder)
        if any(name.lower().endswith(_IMAGES) and not name.startswith(".") for name in files):
            return True
        folders += [f"{folder}/{name}" for name in reversed(inner) if not name.startswith(".")]
    return False

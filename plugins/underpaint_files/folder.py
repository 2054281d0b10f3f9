"""A folder of images."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

import numpy as np

from underpaint import BrokenImageError, DataError, Dataset, Sample, decode_image
from underpaint_files.config import FolderConfig
from underpaint_files.storage import Names, check_index, fingerprint, open_path, read, side

__all__ = ["Folder"]


class Folder(Dataset):
    """Images of a folder, sorted by path; the first subfolder of a path, if any, is its class.

    Keys are paths relative to the folder.

    Raises:
        DataError: The folder is missing or has no images, or has images beside class folders.
    """

    def __init__(self, config: FolderConfig) -> None:
        self._fs, self._root = open_path(config.path)
        found = _find(self._fs, self._root, config.extensions, config.path)
        flat = [name for name in found if "/" not in name]
        if flat and len(flat) < len(found):
            raise DataError(
                f"'{config.path}' has images such as '{flat[0]}' beside class folders; move them into folders, or all "
                "images into one."
            )
        names = sorted(found)
        self._names = Names(names)
        self._sizes = np.array([found[name] for name in names], dtype=np.int64)
        self._labels: np.ndarray[Any, np.dtype[np.int32]] | None = None
        if not flat:
            folders = [name.partition("/")[0] for name in names]
            self.classes = tuple(sorted(set(folders)))
            numbers = {name: number for number, name in enumerate(self.classes)}
            self._labels = np.array([numbers[name] for name in folders], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        key = self._names[index]
        data = self._read(key)
        label = None if self._labels is None else int(self._labels[index])
        return Sample(image=decode_image(data, key), key=key, label=label)

    def short_side(self, index: int) -> int:
        """Read it from the beginning of the file."""
        check_index(index, len(self))
        key = self._names[index]
        return side(lambda end: self._read(key, end), int(self._sizes[index]), key)

    def _read(self, key: str, end: int | None = None) -> bytes:
        try:
            return read(self._fs, f"{self._root}/{key}", None if end is None else 0, end)
        except FileNotFoundError:
            raise BrokenImageError(key, "the file is gone") from None

    def fingerprint(self) -> str:
        """Hash the relative paths and sizes of the images."""
        return fingerprint("folder", self._names, self._sizes.tolist())


def _find(fs: Any, root: str, extensions: tuple[str, ...], path: str) -> dict[str, int]:
    if not fs.isdir(root):
        what = "is a file" if fs.exists(root) else "does not exist"
        raise DataError(f"The folder of images '{path}' {what}; give a folder.")
    found = {}
    folders = [""]
    try:
        while folders:
            inside = folders.pop()
            for entry in fs.ls(f"{root}/{inside}".rstrip("/"), detail=True):
                path_here = str(entry["name"]).rstrip("/")
                name = posixpath.basename(path_here)
                if name.startswith("."):
                    continue
                if entry["type"] == "directory" or (entry.get("islink") and _leads_on(path_here)):
                    folders.append(f"{inside}{name}/")
                elif name.lower().endswith(extensions):
                    found[f"{inside}{name}"] = int(entry["size"])
    except OSError as error:
        raise DataError(f"The folder of images '{path}' cannot be listed: {error}.") from error
    if not found:
        raise DataError(f"There are no images ({', '.join(extensions)}) in '{path}'; check the path.")
    return found


def _leads_on(link: str) -> bool:
    """Whether a link is one to a folder that it is not itself in; following those would never end."""
    path = Path(link)
    return path.is_dir() and not path.parent.resolve().is_relative_to(path.resolve())

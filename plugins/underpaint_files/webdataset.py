"""Tar files of samples, read at random by an index of offsets."""

from __future__ import annotations

import json
import posixpath
from array import array
from typing import Any

import attrs
import numpy as np

from underpaint import DataError, Dataset, Sample, decode_image
from underpaint_files.config import WebDatasetConfig
from underpaint_files.storage import Names, check_index, find_shards, fingerprint, read, read_classes, side
from underpaint_files.tar import TruncatedTarError, members

__all__ = ["WebDataset"]

_IMAGES = ("jpg", "jpeg", "png", "webp")
_KNOWN = (*_IMAGES, "cls", "txt", "json")


class WebDataset(Dataset):
    """Samples of tar files, in the order of the sorted files.

    The headers are read once, when the data set is made; nothing is unpacked. Keys are ``file/sample``.

    Raises:
        DataError: There are no files or no images, a file is damaged or ends early, or some samples have a
            label or caption and others not.
    """

    def __init__(self, config: WebDatasetConfig) -> None:
        self._fs, self._files, self._sizes = find_shards(config.path, config.split, ".tar")
        index = _Index()
        for number, path in enumerate(self._files):
            try:
                with self._fs.open(path, "rb") as file:
                    index.add_file(number, path, file, self._sizes[number])
            except OSError as error:
                raise DataError(f"'{path}' cannot be read: {error}.") from error
        if not index.keys:
            raise DataError(
                f"There are no {', '.join('.' + e for e in _IMAGES)} members in the tars of '{config.path}'."
            )
        count = len(index.keys)
        self._keys = Names(index.keys)
        self._places = np.frombuffer(index.places, dtype=np.int64).reshape(count, 3)
        self._labels = _complete("class index (.cls)", np.frombuffer(index.labels, dtype=np.int64) >= 0, self._keys)
        self._label = np.frombuffer(index.labels, dtype=np.int64)
        self._captions = np.frombuffer(index.captions, dtype=np.int64).reshape(count, 2)
        self._text_kind = "txt" if (self._captions[:, 1] >= 0).any() else ""
        if not self._text_kind:
            self._captions = np.frombuffer(index.details, dtype=np.int64).reshape(count, 2)
            if (self._captions[:, 1] >= 0).all() and self._caption_of(0, "json") is not None:
                self._text_kind = "json"
        self.has_text = self._text_kind != "" and _complete("caption", self._captions[:, 1] >= 0, self._keys)
        if self._labels:
            highest = int(self._label.max())
            self.classes = (
                tuple(str(label) for label in range(highest + 1))
                if config.classes is None
                else read_classes(config.classes)
            )
            if highest >= len(self.classes):
                raise DataError(
                    f"'{config.path}' has label {highest}, and '{config.classes}' names {len(self.classes)}."
                )

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        key = self._keys[index]
        data = self._part(int(self._places[index, 0]), *self._places[index, 1:])
        return Sample(
            image=decode_image(data, key),
            key=key,
            label=int(self._label[index]) if self._labels else None,
            text=self._caption_of(index, self._text_kind) if self.has_text else None,
        )

    def short_side(self, index: int) -> int:
        """Read it from the beginning of the member."""
        check_index(index, len(self))
        number, start, size = (int(value) for value in self._places[index])
        return side(lambda end: self._part(number, start, end), size, self._keys[index])

    def fingerprint(self) -> str:
        """Hash the files' names and sizes."""
        return fingerprint("webdataset", [posixpath.basename(path) for path in self._files], self._sizes)

    def _part(self, number: int, start: Any, size: Any) -> bytes:
        path = self._files[number]
        try:
            return read(self._fs, path, int(start), int(start) + int(size))
        except FileNotFoundError:
            raise DataError(f"'{path}' is gone since it was listed; restore it and start again to resume.") from None

    def _caption_of(self, index: int, kind: str) -> str | None:
        data = self._part(int(self._places[index, 0]), *self._captions[index])
        if kind == "txt":
            return data.decode("utf-8", "replace").strip()
        try:
            details = json.loads(data)
        except ValueError as error:
            raise DataError(f"The .json of '{self._keys[index]}' is damaged: {error}.") from error
        for name in ("caption", "text"):
            if isinstance(details, dict) and name in details:
                return str(details[name] or "").strip()
        return None


def _complete(what: str, present: np.ndarray[Any, np.dtype[np.bool_]], keys: Names) -> bool:
    """Whether all samples have it; that only some have it is an error."""
    if present.any() and not present.all():
        bare = keys[int(np.argmin(present))]
        raise DataError(
            f"{int((~present).sum())} of {len(keys)} samples have no {what}, such as '{bare}'; complete or remove them."
        )
    return bool(present.all())


@attrs.define
class _Index:
    """Where the parts of each sample are; grows by whole files.

    Attributes:
        keys: Names.
        places: File number, offset and size of each image.
        labels: Class index, or −1.
        captions: Offset and size of each ``.txt``, or −1.
        details: Offset and size of each ``.json``, or −1.
    """

    keys: list[str] = attrs.field(factory=list)
    places: array[int] = attrs.field(factory=lambda: array("q"))
    labels: array[int] = attrs.field(factory=lambda: array("q"))
    captions: array[int] = attrs.field(factory=lambda: array("q"))
    details: array[int] = attrs.field(factory=lambda: array("q"))

    def add_file(self, number: int, path: str, file: Any, size: int) -> None:
        first = len(self.keys)
        current, parts = "", dict[str, tuple[int, int]]()
        label = -1
        try:
            for member in members(file, size):
                key, kind = _key_and_kind(member.name)
                if key != current:
                    self._add(number, path, current, parts, label)
                    current, parts, label = key, {}, -1
                if kind not in _KNOWN:
                    continue
                kind = "image" if kind in _IMAGES else kind
                if kind in parts:
                    raise DataError(f"The sample '{key}' of '{path}' has two members of kind {kind}; rename one.")
                parts[kind] = (member.offset, member.size)
                if kind == "cls":
                    label = _label(member.read(), key, path)
            self._add(number, path, current, parts, label)
        except TruncatedTarError as error:
            if error.member and _key_and_kind(error.member)[0] != current:
                self._add(number, path, current, parts, label)
            raise DataError(
                f"'{path}' {error}; {len(self.keys) - first} samples before that are readable; copy the file anew."
            ) from error

    def _add(self, number: int, path: str, key: str, parts: dict[str, tuple[int, int]], label: int) -> None:
        if "image" not in parts:
            return
        self.keys.append(f"{posixpath.basename(path)}/{key}")
        self.places.extend((number, *parts["image"]))
        self.labels.append(label)
        self.captions.extend(parts.get("txt", (-1, -1)))
        self.details.extend(parts.get("json", (-1, -1)))


def _key_and_kind(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part, as WebDataset does."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}/{stem}".removeprefix(".").lstrip("/"), extension.lower()


def _label(data: bytes, key: str, path: str) -> int:
    try:
        label = int(data.decode("ascii").strip())
    except ValueError:
        label = -1
    if label < 0:
        raise DataError(f"The .cls of '{key}' in '{path}' holds {data[:20]!r}, not a class index.")
    return label

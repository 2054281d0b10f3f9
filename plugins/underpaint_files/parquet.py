"""Parquet files with one image per row."""

from __future__ import annotations

import json
import posixpath
from collections import OrderedDict
from typing import Any

import attrs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from underpaint import BrokenImageError, DataError, Dataset, Sample, decode_image, short_side
from underpaint_files.config import ParquetConfig
from underpaint_files.storage import check_index, find_shards, fingerprint, read_classes

__all__ = ["Parquet"]


class Parquet(Dataset):
    """Rows of Parquet files, in the order of the sorted files.

    Keys are ``file:row``. Row groups are read whole and the last ones used are kept, per process.

    Raises:
        DataError: There are no files, one is damaged or has other columns, or a column has the wrong type.
    """

    def __init__(self, config: ParquetConfig) -> None:
        self._config = config
        self._fs, self._files, self._sizes = find_shards(config.path, config.split, ".parquet")
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        groups: list[tuple[int, int, int]] = []
        highest = -1
        for number, path in enumerate(self._files):
            with self._open(path) as file:
                metadata = file.metadata
                columns = _Columns.of(config, file.schema_arrow, path)
                if number == 0:
                    self._columns, names = columns, _names_in(file.schema_arrow, columns.label)
                elif columns != self._columns:
                    raise DataError(f"'{path}' has other columns than '{self._files[0]}'; give files of one table.")
                groups += [
                    (number, group, metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)
                ]
                if columns.label is not None:
                    unnamed = names is None and config.classes is None
                    highest = max(highest, _highest(file, columns.label, search=unnamed))
        self._groups = np.array([group[:2] for group in groups], dtype=np.int64).reshape(-1, 2)
        self._starts = np.cumsum([0, *(rows for _, _, rows in groups)], dtype=np.int64)
        if config.classes is not None:
            self.classes = read_classes(config.classes)
        elif names is not None:
            self.classes = names
        else:
            self.classes = tuple(str(label) for label in range(highest + 1))
        if highest >= len(self.classes):
            raise DataError(
                f"The data at '{config.path}' have labels up to {highest}, and there are names for {len(self.classes)} "
                "classes only; name all of them, or correct the labels."
            )
        self.has_text = self._columns.text is not None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        image, key, table, row = self._image(index)
        columns = self._columns
        label = None if columns.label is None else table.column(columns.label)[row].as_py()
        if label is not None and label >= len(self.classes):
            raise DataError(f"'{key}' has label {label}, and there are names for {len(self.classes)} classes only.")
        return Sample(
            image=decode_image(image, key),
            key=key,
            label=None if label is None or label < 0 else int(label),  # −1 marks unlabelled test splits
            text=None if columns.text is None else table.column(columns.text)[row].as_py(),
        )

    def short_side(self, index: int) -> int:
        """Read it from the header of the image; the row group is read whole."""
        image, key, _, _ = self._image(index)
        return short_side(image, key)

    def _image(self, index: int) -> tuple[bytes, str, pa.Table, int]:
        """Return an image file and its key, and the table and the row that it is in."""
        check_index(index, len(self))
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        number, inside = (int(value) for value in self._groups[group])
        row = index - int(self._starts[group])
        first = group - inside  # of this file
        key = f"{posixpath.basename(self._files[number])}:{index - int(self._starts[first])}"
        table = self._table(group)
        data = table.column(self._columns.image)[row]
        if self._columns.nested and data.is_valid:
            data = data["bytes"]
        if not data.is_valid:
            raise BrokenImageError(key, "the row has no image bytes")
        return data.as_py(), key, table, row

    def fingerprint(self) -> str:
        """Hash the files' names and sizes and the columns that are read."""
        names = [posixpath.basename(path) for path in self._files]
        config = self._config
        return fingerprint("parquet", names, self._sizes, config.image, config.label, config.text)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict()}

    def _open(self, path: str) -> Any:
        try:
            return pq.ParquetFile(self._fs.open(path, "rb"))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"'{path}' is truncated or not a Parquet file: {error}") from error

    def _table(self, group: int) -> pa.Table:
        if group in self._tables:
            self._tables.move_to_end(group)
            return self._tables[group]
        number, inside = (int(value) for value in self._groups[group])
        try:
            with self._open(self._files[number]) as file:
                table = file.read_row_group(inside, columns=self._columns.paths(), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"Row group {inside} of '{self._files[number]}' is damaged: {error}") from error
        self._tables[group] = table
        while len(self._tables) > 1 and sum(t.nbytes for t in self._tables.values()) > self._config.cache * 2**20:
            self._tables.popitem(last=False)
        return table


@attrs.frozen
class _Columns:
    """The columns that are read: their names, and whether the image is a struct with ``bytes``."""

    image: str
    nested: bool
    label: str | None
    text: str | None

    @classmethod
    def of(cls, config: ParquetConfig, schema: pa.Schema, path: str) -> _Columns:
        image = _column(schema, config.image, None, path)
        assert image is not None
        kind = schema.field(image).type
        nested = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        inner = kind.field("bytes").type if nested else kind
        if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
            raise DataError(f"The column '{image}' of '{path}' holds {kind}, not the bytes of image files.")
        label = _column(schema, config.label, "label", path)
        if label is not None and not pa.types.is_integer(schema.field(label).type):
            raise DataError(
                f"The column '{label}' of '{path}' holds {schema.field(label).type}, not class indices; "
                "set 'label' to another column or to null."
            )
        text = _column(schema, config.text, "text", path)
        if text is not None and not (
            pa.types.is_string(schema.field(text).type) or pa.types.is_large_string(schema.field(text).type)
        ):
            raise DataError(f"The column '{text}' of '{path}' holds {schema.field(text).type}, not captions.")
        return cls(image, nested, label, text)

    def paths(self) -> list[str]:
        """Return what to read, the struct's other fields left out."""
        image = f"{self.image}.bytes" if self.nested else self.image
        return [image, *(name for name in (self.label, self.text) if name is not None)]


def _column(schema: pa.Schema, name: str | None, optional: str | None, path: str) -> str | None:
    if name is None or name in schema.names:
        return name
    if name == optional:
        return None
    raise DataError(f"'{path}' has no column '{name}'; it has {', '.join(schema.names)}.")


def _names_in(schema: pa.Schema, label: str | None) -> tuple[str, ...] | None:
    """Return the class names that Hugging Face keeps in the schema's metadata."""
    if label is None:
        return ()
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _highest(file: Any, label: str, search: bool) -> int:
    """Return the largest label of a file, from its statistics; without them by a search, or -1."""
    metadata = file.metadata
    position = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(label)
    chunks = [metadata.row_group(i).column(position).statistics for i in range(metadata.num_row_groups)]
    if all(chunk is not None and chunk.has_min_max for chunk in chunks):
        return max((int(chunk.max) for chunk in chunks), default=-1)
    if not search:
        return -1
    values = [value for value in file.read(columns=[label]).column(label).to_pylist() if value is not None]
    return max(values, default=-1)

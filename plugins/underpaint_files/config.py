"""Options of the data sets of files."""

from __future__ import annotations

import attrs
from attrs import validators as v

__all__ = ["FolderConfig", "ParquetConfig", "WebDatasetConfig"]


@attrs.frozen(kw_only=True)
class FolderConfig:
    """A folder of images.

    Attributes:
        path: Folder or fsspec URL. Images in subfolders, at any depth, belong to the class that the first
            subfolder names; images right in the folder have no class.
        extensions: Files that count as images, in lower case; hidden files never do.
    """

    path: str
    extensions: tuple[str, ...] = attrs.field(
        default=(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2"),
        validator=v.min_len(1),
    )


@attrs.frozen(kw_only=True)
class ParquetConfig:
    """Parquet files with one image per row.

    Attributes:
        path: File, glob or folder, or an fsspec URL of one.
        split: Of a folder, the files with this word in their names: ``train``, ``validation``, ``val``, …
        image: Column with the file's bytes, or with a struct that has them as ``bytes``.
        label: Column with the class index; null for none. A column ``label`` that is absent means no labels.
        text: Column with the caption; null for none. A column ``text`` that is absent means no captions.
        classes: JSON file that names the classes: a list of names, or of objects with ``name`` and perhaps
            ``label``. Without it the names of Hugging Face's metadata are taken, else the numbers.
        cache: Row groups kept in memory per process, in MiB. Reading at random reads a row group for each
            sample that is not among them, so let it hold the data set, or use small row groups or tars.
    """

    path: str
    split: str | None = None
    image: str = "image"
    label: str | None = "label"
    text: str | None = "text"
    classes: str | None = None
    cache: int = attrs.field(default=512, validator=v.gt(0))


@attrs.frozen(kw_only=True)
class WebDatasetConfig:
    """Tar files whose members form a sample when their names differ in the extension only.

    Of a sample, ``.jpg``, ``.jpeg``, ``.png`` or ``.webp`` is the image, ``.cls`` the class index, ``.txt`` the
    caption, else ``caption`` or ``text`` of ``.json``. Samples without an image are passed over.

    Attributes:
        path: File, glob or folder, or an fsspec URL of one; uncompressed.
        split: Of a folder, the files with this word in their names: ``train``, ``validation``, ``val``, …
        classes: JSON file that names the classes: a list of names, or of objects with ``name`` and perhaps
            ``label``. Without it the numbers are the names.
    """

    path: str
    split: str | None = None
    classes: str | None = None

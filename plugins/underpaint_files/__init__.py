"""Data sets of files: folders of images, Parquet tables and WebDataset tars, on disk or at any fsspec URL."""

from __future__ import annotations

from typing import Any

from underpaint import hookimpl


@hookimpl
def register_datasets(register: Any) -> None:
    """Register the three formats."""
    register(
        "files/folder",
        "underpaint_files.folder:Folder",
        config="underpaint_files.config:FolderConfig",
        tiny={"path": "{images}"},
        summary="folder of images; its subfolders, if any, are the classes",
    )
    register(
        "files/parquet",
        "underpaint_files.parquet:Parquet",
        config="underpaint_files.config:ParquetConfig",
        tiny={"path": "{parquet}"},
        summary="Parquet files with image, label and text columns, as on Hugging Face",
    )
    register(
        "files/webdataset",
        "underpaint_files.webdataset:WebDataset",
        config="underpaint_files.config:WebDatasetConfig",
        tiny={"path": "{tar}"},
        summary="tar files of images with .cls, .txt or .json beside them",
    )

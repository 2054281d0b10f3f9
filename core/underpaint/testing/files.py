"""Small image files for data sets that read files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["PLACES", "place"]

_CLASSES = ("ants", "bees")


def _pictures() -> list[tuple[str, int, bytes]]:
    random = np.random.default_rng(0)
    found = []
    for index in range(6):
        data = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(data, "PNG")
        found.append((f"{index:03d}", index % 2, data.getvalue()))
    return found


def _images(root: Path) -> None:
    for name, label, data in _pictures():
        folder = root / _CLASSES[label]
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.png").write_bytes(data)


def _parquet(root: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": {"bytes": data, "path": f"{name}.png"}, "label": label} for name, label, data in _pictures()]
    pq.write_table(pa.Table.from_pylist(rows), root / "train-00000.parquet", row_group_size=2)


def _tar(root: Path) -> None:
    with tarfile.open(root / "train-00000.tar", "w") as archive:
        for name, label, data in _pictures():
            for ending, content in (("png", data), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


PLACES: Mapping[str, Callable[[Path], None]] = {"{images}": _images, "{parquet}": _parquet, "{tar}": _tar}
"""Values of options that receive a folder, and what fills it."""


def place(value: str, folder: Path) -> str:
    """Return the path of the folder that the value `{…}` of an option asks for, made when first asked for."""
    root = folder / value.strip("{}")
    if not root.exists():
        root.mkdir()
        PLACES[value](root)
    return str(root)

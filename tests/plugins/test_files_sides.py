"""The short side of stored images, from their headers."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import underpaint
from underpaint import BrokenImageError, Dataset
from underpaint_files import storage

SIZES = {"JPEG": (70, 40), "PNG": (40, 71), "WEBP": (33, 33), "GIF": (90, 31), "TIFF": (35, 80), "JPEG2000": (64, 37)}


def stored(kind: str) -> bytes:
    """A picture of noise; the JPEG is turned by its metadata."""
    width, height = SIZES[kind]
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, kind, **({"exif": exif} if kind == "JPEG" else {}))
    return target.getvalue()


def members() -> dict[str, bytes]:
    return {f"{kind.lower()}": stored(kind) for kind in SIZES} | {"zz": b"no image", "zzz": b""}


@pytest.fixture(params=["files/folder", "files/parquet", "files/webdataset"])
def data(request, tmp_path) -> Dataset:
    if request.param == "files/folder":
        for name, content in members().items():
            (tmp_path / f"{name}.jpg").write_bytes(content)
        return underpaint.create("dataset", request.param, path=str(tmp_path))
    if request.param == "files/parquet":
        pq.write_table(pa.table({"image": list(members().values())}), tmp_path / "a.parquet")
        return underpaint.create("dataset", request.param, path=str(tmp_path / "a.parquet"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in members().items():
            info = tarfile.TarInfo(f"{name}.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return underpaint.create("dataset", request.param, path=str(tmp_path / "a.tar"))


@pytest.mark.parametrize("head", [65_536, 40])
def test_the_side_is_that_of_the_decoded_image(data, monkeypatch, head) -> None:
    # Where the header is not in the first bytes, the whole image is read.
    monkeypatch.setattr(storage, "_HEAD", head)
    found = {}
    for index in range(len(SIZES)):
        found[index] = data.short_side(index)
        assert found[index] == min(data[index].image.shape[:2])
    assert sorted(found.values()) == sorted(min(size) for size in SIZES.values())


def test_what_is_no_image_has_no_side(data) -> None:
    for index in (len(SIZES), len(SIZES) + 1):
        with pytest.raises(BrokenImageError, match="header cannot be read"):
            data.short_side(index)
    with pytest.raises(IndexError):
        data.short_side(len(data))


def test_pixels_are_not_decoded(data, monkeypatch) -> None:
    def decoded(*arguments: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", decoded)
    for index in range(len(SIZES)):
        data.short_side(index)


def test_a_missing_file_is_broken(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(stored("PNG"))
    data = underpaint.create("dataset", "files/folder", path=str(tmp_path))
    (tmp_path / "a.png").unlink()
    with pytest.raises(BrokenImageError, match="the file is gone"):
        data.short_side(0)

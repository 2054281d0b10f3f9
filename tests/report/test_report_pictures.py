"""Contact sheets and data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from underpaint.report.pictures import contact_sheet, data_uri, enlarge


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_sheet_holds_every_image_at_its_place():
    images = np.random.default_rng(0).integers(0, 255, (5, 6, 4, 3), dtype=np.uint8)
    sheet = opened(contact_sheet(images, 3, gap=2))
    assert sheet.shape == (2 * 6 + 2, 3 * 4 + 2 * 2, 3)
    for index, image in enumerate(images):
        top, left = (index // 3) * 8, (index % 3) * 6
        assert (sheet[top : top + 6, left : left + 4] == image).all()
    assert (sheet[6:8] == 255).all()  # the gap
    assert (sheet[8:, 12:] == 255).all()  # the place that no image fills


@pytest.mark.parametrize(("count", "columns", "width"), [(1, 8, 4), (2, 8, 10), (8, 8, 46), (3, 1, 4)])
def test_a_sheet_is_no_wider_than_its_images(count, columns, width):
    images = np.zeros((count, 4, 4, 3), dtype=np.uint8)
    assert opened(contact_sheet(images, columns)).shape[1] == width


def test_data_uris():
    image = np.random.default_rng(0).integers(0, 255, (7, 5, 3), dtype=np.uint8)
    head, data = data_uri(image).split(",")
    assert head == "data:image/png;base64"
    assert (opened(base64.b64decode(data)) == image).all()
    head, data = data_uri(np.full((16, 16, 3), 90, dtype=np.uint8), lossless=False).split(",")
    assert head == "data:image/jpeg;base64"
    assert opened(base64.b64decode(data)).shape == (16, 16, 3)


def test_enlarging_repeats_pixels():
    small = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3)
    assert (enlarge(small, 8, 6) == small.repeat(4, axis=1).repeat(2, axis=2)).all()
    assert enlarge(small, 5, 7).shape == (2, 5, 7, 3)

"""Pictures as image files and data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["contact_sheet", "data_uri", "enlarge", "png"]


def png(image: NDArray[np.uint8]) -> bytes:
    """Return an H×W×3 image as PNG, which loses nothing."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image), "RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def data_uri(image: NDArray[np.uint8], *, lossless: bool = True) -> str:
    """Return an H×W×3 image as a ``data:`` URI: a PNG, or a JPEG of high quality, a third of its size."""
    if lossless:
        return "data:image/png;base64," + base64.b64encode(png(image)).decode("ascii")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image), "RGB").save(buffer, format="JPEG", quality=93, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def enlarge(images: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize N×h×w×3 images to `height` × `width` without interpolation."""
    rows = np.arange(height) * images.shape[1] // height
    columns = np.arange(width) * images.shape[2] // width
    return images[:, rows[:, None], columns[None, :]]


def contact_sheet(images: NDArray[np.uint8], columns: int, *, gap: int = 2) -> bytes:
    """Lay images out in rows, from the top left.

    Args:
        images: N×H×W×3 uint8, N at least 1.
        columns: Images per row.
        gap: White pixels between images.

    Returns:
        A PNG file; places that no image fills are white.
    """
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return png(sheet)

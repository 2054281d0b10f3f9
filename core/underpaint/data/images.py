"""Bytes of an image file to RGB pixels."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from underpaint.errors import BrokenImageError

__all__ = ["MAX_PIXELS", "decode_image", "short_side"]

MAX_PIXELS = 178_956_970
"""Largest image that is decoded, in pixels; it needs half a gigabyte. Larger ones are refused by their header."""

# Named, so that a file in a training set never reaches an interpreter such as Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")

_ORIENTATION_TAG = 0x0112
_TURNS = {  # EXIF 2.32, §4.6.4: what brings an image of that orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, key: str) -> NDArray[np.uint8]:
    """Decode an image file to 8-bit RGB.

    The EXIF orientation is applied. Transparent pixels are laid over white. Greyscale, palette, CMYK and
    16-bit images are converted; colour profiles are not applied. Of an animation the first frame counts.

    Args:
        data: The whole file: JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or JPEG 2000.
        key: Name of the sample, for the error.

    Returns:
        H×W×3 uint8, writable. 1×1 is a valid size.

    Raises:
        BrokenImageError: The data is empty, truncated, damaged, not an image, or larger than `MAX_PIXELS`.
    """
    if not data:
        raise BrokenImageError(key, "the file is empty")
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata and of large but permitted images; the pixels are what counts here.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BrokenImageError(key, _too_large(f"{image.width}×{image.height} pixels"))
                image.load()
                return np.array(_to_rgb(_upright(image), key))
    except BrokenImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenImageError(key, _too_large(str(error))) from error
    except UnidentifiedImageError as error:
        raise BrokenImageError(key, "it is not an image of a known format") from error
    except Exception as error:  # on damaged input decoders raise anything, from SyntaxError to struct.error
        raise BrokenImageError(key, f"it cannot be decoded ({type(error).__name__}: {error})") from error


def short_side(data: bytes, key: str) -> int:
    """Return the short side of an image in pixels, from its header.

    Args:
        data: The file, or so much of its beginning that the header is in it.
        key: Name of the sample, for the error.

    Raises:
        BrokenImageError: There is no header of a known format.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                return min(image.size)
    except Exception as error:  # as for `decode_image`
        raise BrokenImageError(key, f"its header cannot be read ({type(error).__name__}: {error})") from error


def _too_large(what: str) -> str:
    return f"the limit is {MAX_PIXELS} pixels ({what})"


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata tells no orientation; every viewer then shows the pixels as stored
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, key: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise BrokenImageError(key, "floating-point pixels have no defined range")
    if image.mode.startswith("I"):
        return _from_integers(image, key)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_integers(image: Image.Image, key: str) -> Image.Image:
    # Pillow's own conversion clips 16-bit values at 255 and gives a white picture.
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BrokenImageError(key, "32-bit pixels have no defined range")
    grey = np.round(values / 257.0).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")

"""Decoding: every kind of image file to upright 8-bit RGB, every kind of damage to a named error."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from underpaint import BrokenImageError, decode_image
from underpaint.data.images import MAX_PIXELS

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(pixels, mode=None, file_format="PNG", **options):
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(out, file_format, **options)
    return out.getvalue()


def png_header(width, height):
    """A PNG that claims a size, with hardly any data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(file_format):
    image = decode_image(encoded(COLOURS, file_format=file_format), "a")
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert np.array_equal(image, COLOURS)


def test_lossless_webp_keeps_every_pixel():
    assert np.array_equal(decode_image(encoded(COLOURS, file_format="WEBP", lossless=True), "a"), COLOURS)


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP", "GIF", "JPEG2000"])
def test_flat_colour_survives_lossy_formats(file_format):
    flat = np.full((16, 16, 3), (200, 60, 20), dtype=np.uint8)
    assert np.abs(decode_image(encoded(flat, file_format=file_format), "a").astype(int) - flat).max() <= 4


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_greyscale_gets_three_equal_channels(file_format):
    grey = np.full((16, 16), 77, dtype=np.uint8)
    image = decode_image(encoded(grey, file_format=file_format), "a")
    assert image.shape == (16, 16, 3)
    assert np.abs(image.astype(int) - 77).max() <= 1


def test_one_bit_image_is_black_and_white():
    bits = RNG.random((6, 9)) < 0.5
    image = decode_image(encoded(Image.fromarray(bits)), "a")
    assert np.array_equal(image[..., 0], np.where(bits, 255, 0))


def test_palette_is_looked_up():
    palette = Image.fromarray(COLOURS).quantize(256)
    expected = np.zeros((256, 3), dtype=np.uint8)
    colours = np.array(palette.getpalette(), dtype=np.uint8).reshape(-1, 3)
    expected[: len(colours)] = colours
    assert np.array_equal(decode_image(encoded(palette), "a"), expected[np.asarray(palette)])


def test_alpha_is_laid_over_white():
    alpha = RNG.integers(0, 256, (5, 7, 1), dtype=np.uint8)
    image = decode_image(encoded(np.concatenate([COLOURS, alpha], axis=2)), "a")
    share = alpha / 255.0
    assert np.abs(image - (COLOURS * share + 255 * (1 - share))).max() <= 1.0


def test_grey_with_alpha_is_laid_over_white():
    grey = np.full((4, 4), 10, dtype=np.uint8)
    alpha = np.array([[0, 255, 0, 255]] * 4, dtype=np.uint8)
    image = decode_image(encoded(Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))), "a")
    assert np.array_equal(image[..., 2], np.where(alpha == 0, 255, 10))


def test_transparent_palette_entry_is_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    image = decode_image(encoded(palette, transparency=0), "a")
    assert image.tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_transparent_rgb_colour_is_white():
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)
    assert decode_image(encoded(pixels, transparency=(1, 2, 3)), "a").tolist() == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(file_format):
    inks = np.full((16, 16, 4), (0, 128, 255, 51), dtype=np.uint8)
    bands = [Image.fromarray(np.ascontiguousarray(inks[..., i])) for i in range(4)]
    image = decode_image(encoded(Image.merge("CMYK", bands), file_format=file_format), "a")
    expected = (255 - inks[0, 0, :3].astype(int)) * (255 - 51) / 255  # each ink and black take light away
    assert np.abs(image[8, 8] - expected).max() <= 4


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(file_format):
    deep = np.array([[0, 256, 257, 32768], [40000, 65535, 128, 129]], dtype=np.uint16)
    image = decode_image(encoded(deep, file_format=file_format), "a")
    assert np.array_equal(image[..., 1], np.round(deep / 65535 * 255))


def upright(stored, orientation):
    """EXIF's table: which visual side row 0 and column 0 of the stored image are."""
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored.transpose(1, 0, 2)[:, ::-1],
        7: stored.transpose(1, 0, 2)[::-1, ::-1],
        8: stored.transpose(1, 0, 2)[::-1],
    }
    return turned[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "JPEG"])
def test_exif_orientation_is_applied(orientation, file_format):
    blocks = np.kron(np.array([[30, 90, 150], [200, 240, 10]], dtype=np.uint8), np.ones((16, 16), dtype=np.uint8))
    stored = np.repeat(blocks[..., None], 3, axis=2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(encoded(stored, file_format=file_format, exif=exif), "a")
    expected = upright(stored, orientation)
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).max() <= (3 if file_format == "JPEG" else 0)


def test_damaged_exif_leaves_the_pixels():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(COLOURS, exif=exif.tobytes()[:9] + b"\xff" * 40)
    assert np.array_equal(decode_image(data, "a"), COLOURS)


def test_one_pixel_is_an_image():
    assert decode_image(encoded(np.array([[[1, 2, 3]]], dtype=np.uint8)), "a").tolist() == [[[1, 2, 3]]]


def test_animation_gives_its_first_frame():
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    data = encoded(red, file_format="GIF", save_all=True, append_images=[blue])
    assert decode_image(data, "a")[0, 0].tolist() == [255, 0, 0]


PHOTO = encoded(np.kron(COLOURS, np.ones((16, 16, 1), dtype=np.uint8)), file_format="JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no picture, just a note\n", "not an image of a known format"),
        (PHOTO[:-100], "truncated"),
        (PHOTO[: len(PHOTO) // 2], "cannot be decoded"),
        (PHOTO[:11], "cannot be decoded|not an image"),
        (png_header(20_000, 20_000), "limit is 178956970 pixels"),
        (encoded(np.array([[0.5]], dtype=np.float32), file_format="TIFF"), "floating-point"),
        (encoded(np.array([[70000]], dtype=np.int32), file_format="TIFF"), "32-bit"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
    ],
)
def test_broken_files_are_named(data, reason):
    with pytest.raises(BrokenImageError, match=reason) as caught:
        decode_image(data, "cats/7.jpg")
    assert caught.value.key == "cats/7.jpg"
    assert str(caught.value).startswith("cats/7.jpg: ")


def test_the_limit_holds_when_pillows_own_is_off(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(BrokenImageError, match=f"{side}×{side} pixels"):
        decode_image(png_header(side, side), "a")


def test_pillows_warning_about_large_images_is_no_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    assert decode_image(encoded(COLOURS), "a").shape == (5, 7, 3)


@settings(max_examples=150)
@given(
    source=st.sampled_from(
        [PHOTO, encoded(COLOURS), encoded(COLOURS, file_format="GIF"), encoded(COLOURS, file_format="TIFF")]
    ),
    place=st.integers(0, 10_000),
    junk=st.binary(min_size=1, max_size=8),
)
def test_damage_gives_pixels_or_the_error_and_nothing_else(source, place, junk):
    place %= len(source)
    try:
        image = decode_image(source[:place] + junk + source[place + len(junk) :], "a")
    except BrokenImageError:
        return
    assert image.dtype == np.uint8
    assert image.ndim == 3

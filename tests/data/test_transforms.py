"""Crops and pixel ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from underpaint import BrokenImageError
from underpaint.data.transforms import MIN_SIDE, Crop, to_tensor, to_uint8


def rng(seed=0):
    return np.random.default_rng(seed)


def ramp(height, width):
    """Red counts columns, green rows."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.zeros_like(rows)], axis=2).astype(np.uint8)


@settings(max_examples=80)
@given(
    height=st.integers(MIN_SIDE, 90),
    width=st.integers(MIN_SIDE, 90),
    tall=st.integers(1, 70),
    wide=st.integers(1, 70),
    crop=st.sampled_from(["center", "random"]),
    flip=st.booleans(),
)
def test_any_image_gives_any_crop(height, width, tall, wide, crop, flip):
    image = np.full((height, width, 3), 93, dtype=np.uint8)
    cut = Crop(tall, wide, crop, flip)(image, rng())
    assert cut.shape == (tall, wide, 3)
    assert cut.dtype == np.uint8
    assert (cut == 93).all()


def test_centre_crop_of_an_image_that_fits_is_a_slice():
    cut = Crop(40, 40)(ramp(40, 61), rng())
    assert np.array_equal(cut, ramp(40, 61)[:, 10:50])


def test_short_side_is_resized_to_the_crop():
    # Halving a ramp gives a ramp of twice the slope: pixel i averages around 2i + ½.
    cut = Crop(40, 40)(ramp(80, 120), rng()).astype(float)
    columns = 2 * np.arange(40) + 0.5 + 20
    assert np.abs(cut[5:-5, :, 0] - columns).max() <= 1
    assert np.abs(cut[5:-5, 7, 1] - (2 * np.arange(40) + 0.5)[5:-5]).max() <= 1


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    cut = Crop(16, 16)(stripes, rng()).astype(int)
    assert np.abs(cut[:, 2:-2] - 127.5).max() < 3


def test_small_images_are_enlarged():
    cut = Crop(64, 64)(ramp(32, 32), rng())
    assert np.abs(cut[8:-8, 30, 1].astype(float) - ((np.arange(64) + 0.5) / 2 - 0.5)[8:-8]).max() <= 1


def test_random_crops_reach_every_place_equally():
    lefts = np.array([Crop(8, 8, "random")(ramp(8, 12), rng(seed))[0, 0, 0] for seed in range(2000)])
    counts = np.bincount(lefts, minlength=5)
    assert len(counts) == 5
    assert (abs(counts - 400) < 5 * np.sqrt(400 * 0.8)).all()


def test_a_crop_of_a_larger_image_shows_its_pixels_at_that_size():
    image = ramp(60, 80)
    cut = Crop(10, 10, "random", resize=30)(image, rng())
    steps = np.diff(cut[..., 0].astype(int), axis=1)
    assert steps.mean() == pytest.approx(80 / 40, abs=0.1)  # 8 if the image just covered the crop
    assert np.array_equal(Crop(10, 10, resize=30)(ramp(30, 30), rng()), ramp(30, 30)[10:20, 10:20])
    assert Crop(40, 20, resize=30)(image, rng()).shape == (40, 20, 3)


def test_zoomed_crops_have_sides_drawn_evenly_and_reach_every_place():
    image = ramp(64, 96)
    cuts = np.array([Crop(16, 16, "random", zoom=(0.5, 1.0))(image, rng(seed)) for seed in range(1000)]).astype(float)
    # The ramp rises by one a pixel of the image, so by the side over 16 a pixel of the crop.
    sides = 16 * (cuts[:, 8, 12, 0] - cuts[:, 8, 3, 0]) / 9
    assert sides.min() == pytest.approx(32, abs=1.5)
    assert sides.max() == pytest.approx(64, abs=1.5)
    assert sides.mean() == pytest.approx(48, abs=5 * 32 / np.sqrt(12 * 1000) + 0.2)
    # Centres lie between half a side from one border and half a side from the other, evenly.
    share = (cuts[:, 8, 7:9, 0].mean(1) - sides / 2) / (96 - sides)
    assert share.min() > -0.05
    assert share.max() < 1.05
    assert share.mean() == pytest.approx(0.5, abs=5 / np.sqrt(12 * 1000) + 0.02)


def test_an_oblong_zoomed_crop_keeps_its_shape():
    cut = Crop(8, 16, "random", zoom=(0.5, 0.5))(ramp(64, 64), rng()).astype(float)
    # Half of the largest crop of 1:2, which is 32×64: 16×32 pixels in 8×16.
    assert np.diff(cut[4, 3:13, 0]).mean() == pytest.approx(2.0, abs=0.1)
    assert np.diff(cut[2:6, 8, 1]).mean() == pytest.approx(2.0, abs=0.3)


@settings(max_examples=200)
@given(
    height=st.integers(MIN_SIDE, 200),
    width=st.integers(MIN_SIDE, 200),
    tall=st.integers(1, 120),
    wide=st.integers(1, 120),
    low=st.floats(0.01, 1.0),
    seed=st.integers(0, 100),
)
# A side that fills the image and is above it by a rounding error.
@example(height=29, width=31, tall=100, wide=100, low=1.0, seed=0)
def test_a_zoomed_crop_lies_within_the_image(height, width, tall, wide, low, seed):
    cut = Crop(tall, wide, "random", zoom=(low, 1.0))(np.full((height, width, 3), 255, np.uint8), rng(seed))
    assert cut.shape == (tall, wide, 3)
    assert cut.min() == 255


def test_half_of_the_images_are_flipped():
    crop = Crop(8, 8, flip=True)
    flipped = 0
    for seed in range(1000):
        cut = crop(ramp(8, 8), rng(seed))
        assert np.array_equal(cut, ramp(8, 8)) or np.array_equal(cut, ramp(8, 8)[:, ::-1])
        flipped += bool(cut[0, 0, 0] == 7)
    assert 420 < flipped < 580


def test_random_numbers_decide_alone():
    crop = Crop(16, 16, "random", True)
    one, two = crop(ramp(20, 40), rng(3)), crop(ramp(20, 40), rng(3))
    assert np.array_equal(one, two)


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (300, 7)])
def test_placeholders_are_broken_images(shape):
    with pytest.raises(BrokenImageError, match=f"dots/1.gif: it is {shape[0]}×{shape[1]} pixels, smaller than 8"):
        Crop(8, 8)(np.zeros((*shape, 3), dtype=np.uint8), rng(), "dots/1.gif")


def test_pixels_to_the_range_of_networks():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    images = to_tensor(levels)
    assert images.shape == (2, 3, 16, 16)
    assert images.is_contiguous()
    expected = torch.arange(256, dtype=torch.float64) / 255 * 2 - 1
    assert torch.allclose(images[1, 2].reshape(-1).double(), expected, atol=1e-6, rtol=0)
    assert images.min() == -1.0
    assert images.max() == 1.0


def test_pixels_survive_the_round_trip():
    pixels = torch.from_numpy(rng().integers(0, 256, (3, 9, 5, 3), dtype=np.uint8))
    back = to_uint8(to_tensor(pixels))
    assert back.is_contiguous()
    assert torch.equal(back, pixels)


def test_levels_are_rounded_and_clamped():
    values = torch.tensor([-7.0, -1.0, (100.4 / 127.5) - 1, (100.6 / 127.5) - 1, 1.0, 7.0])
    images = values.reshape(1, 1, 1, 6).repeat(1, 3, 1, 1)
    assert to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 100, 101, 255, 255]


def test_half_precision_is_accepted():
    assert to_uint8(torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16)).unique().tolist() == [128]

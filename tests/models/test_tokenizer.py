"""What a tokenizer takes, and what it says to everything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.test_folders import make_tokenizer
from underpaint import DataError

IMAGES = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
LATENTS = torch.zeros(2, 4, 4, 6)


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (IMAGES[0], "3×32×48 float32"),
        (IMAGES[:, :1], "2×1×32×48 float32"),
        (IMAGES[:0], "0×3×32×48 float32"),
        (IMAGES.permute(0, 2, 3, 1), "2×32×48×3 float32"),
        (((IMAGES + 1) * 127.5).to(torch.uint8), "2×3×32×48 uint8"),
        (IMAGES.long(), "2×3×32×48 int64"),
        (IMAGES.numpy(), "ndarray"),
    ],
)
def test_images_are_a_batch_of_floats(images: Any, named: str) -> None:
    tokenizer = make_tokenizer()
    for take in (tokenizer.encode, tokenizer.posterior, tokenizer.reconstruct):
        with pytest.raises(DataError, match=rf"images as {named}, and takes a tensor of B×3×H×W floats in \[-1, 1\]"):
            take(images)


@pytest.mark.parametrize(
    ("latents", "named"),
    [
        (LATENTS[0], "4×4×6 float32"),
        (LATENTS[:, :3], "2×3×4×6 float32"),
        (LATENTS.long(), "2×4×4×6 int64"),
        (LATENTS.numpy(), "ndarray"),
    ],
)
def test_latents_are_a_batch_of_floats(latents: Any, named: str) -> None:
    with pytest.raises(DataError, match=f"latents as {named}, and takes a tensor of B×4×h×w floats"):
        make_tokenizer().decode(latents)


@torch.no_grad()
def test_floats_of_every_precision_are_taken() -> None:
    tokenizer = make_tokenizer()
    for dtype in (torch.float32, torch.float64):
        assert tokenizer.encode(IMAGES.to(dtype)).shape == LATENTS.shape
    assert make_tokenizer().bfloat16().decode(LATENTS.bfloat16()).shape == IMAGES.shape


@torch.no_grad()
def test_bytes_are_taken_as_the_sentence_says() -> None:
    tokenizer = make_tokenizer()
    data = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    scaled = data / 127.5 - 1
    assert scaled.min() >= -1.0
    assert scaled.max() <= 1.0
    assert tokenizer.encode(scaled).shape == (1, 4, 4, 4)

"""The views and losses that train ``tiny/vit``, and what its shipped weights know."""

from __future__ import annotations

import colorsys
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import underpaint
import underpaint_tiny
from underpaint import StepSizes, StepTensors
from underpaint_tiny import augment

SIZES = StepSizes(image=(32, 32), latent_channels=4, grid=(4, 4), feature_channels=(48,))
DATA = Path(os.environ.get("UNDERPAINT_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "tiny-imagenet"


def test_a_crop_of_the_whole_image_is_the_image_or_its_mirror() -> None:
    torch.manual_seed(0)
    images = torch.rand(16, 3, 8, 8) * 2 - 1
    # An aspect ratio of 1 is drawn only by chance, so the crop is at least nine tenths of the image on each side.
    seen = augment.crops(images.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8), (8, 8), (0.5, 1.0))
    torch.testing.assert_close(seen, images.mean((2, 3), keepdim=True).expand_as(seen))
    ramp = torch.linspace(-1, 1, 64).expand(400, 3, 64, 64)
    slopes = augment.crops(ramp, (8, 8), (0.25, 0.25))[:, 0].diff(dim=-1).mean((1, 2))
    # A quarter of the area, with aspect ratios of 3:4 to 4:3, is 0.43 to 0.58 of the width; half are mirrored.
    widths = slopes.abs() * 8 / (2 / 63 * 64)
    assert 0.5 * math.sqrt(3 / 4) - 0.01 < float(widths.min())
    assert float(widths.max()) < 0.5 * math.sqrt(4 / 3) + 0.01
    assert 0.4 < float((slopes > 0).float().mean()) < 0.6


def test_the_chroma_matrix_keeps_luma_and_turns_hue() -> None:
    one, none = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    torch.testing.assert_close(augment._chroma(one, none)[0], torch.eye(3), atol=1e-4, rtol=0)
    colour = torch.tensor([0.6, 0.4, 0.3])
    for angle in (0.3, -0.6):
        turned = augment._chroma(one, torch.full((1, 1, 1), angle))[0] @ colour
        luma = torch.tensor([0.299, 0.587, 0.114])
        assert float(turned @ luma) == pytest.approx(float(colour @ luma), abs=1e-3)
        assert colorsys.rgb_to_hsv(*turned.tolist())[0] != pytest.approx(
            colorsys.rgb_to_hsv(*colour.tolist())[0], abs=0.02
        )
    grey = augment._chroma(none, none)[0] @ colour
    torch.testing.assert_close(grey, grey.mean().expand(3), atol=1e-4, rtol=0)


def test_blur_is_a_gaussian_of_each_images_own_width() -> None:
    images = torch.zeros(2, 3, 9, 9)
    images[:, :, 4, 4] = 1.0
    sigma = torch.tensor([0.5, 1.4])
    blurred = augment._blurred(images, sigma)
    for image, width in zip(blurred, sigma.tolist(), strict=True):
        taps = np.exp(-0.5 * (np.arange(-2, 3) / width) ** 2)
        taps /= taps.sum()
        np.testing.assert_allclose(image[0, 2:7, 2:7], np.outer(taps, taps), atol=1e-6)


def test_views_stay_in_range_differ_and_repeat_with_the_seed() -> None:
    images = (torch.rand(64, 3, 16, 24) * 2 - 1).double()
    torch.manual_seed(3)
    first = augment.views(images, (16, 24), (0.3, 1.0))
    assert first.shape == (64, 3, 16, 24)
    assert float(first.abs().max()) <= 1.0 + 1e-5
    torch.manual_seed(3)
    assert torch.equal(first, augment.views(images, (16, 24), (0.3, 1.0)))
    assert not torch.equal(first, augment.views(images, (16, 24), (0.3, 1.0)))
    grey = (first - first.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-4
    assert 0.08 < float(grey.float().mean()) < 0.4


class _Pixels(torch.nn.Module):
    """An encoder whose pooled features are the mean colours."""

    info = underpaint.create("encoder", "tiny/vit@random", width=48, depth=1, heads=2).info

    def forward(self, images: Tensor) -> underpaint.Features:
        return underpaint.Features(maps=(images,), pooled=images.mean((2, 3)))


def test_contrast_equals_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"hidden": 8, "channels": 4, "wide": 2, "narrow": 1, "temperature": 0.2, "pixels": 0.5}
    loss = underpaint.create("loss", "tiny/contrast", **options)
    loss.prepare(StepSizes(image=(16, 16), latent_channels=4, grid=(2, 2), feature_channels=(3,)))
    loss.eval()
    monkeypatch.setattr("underpaint_tiny.contrast.views", lambda images, size, area: images * (0.5 + area[0]))
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        terms = loss(StepTensors(step=0, inputs=images, encoder=_Pixels()))  # type: ignore[arg-type]
    seen = [images.mean((2, 3)) * (0.5 + low) for low in (0.3, 0.3, 0.08)]
    z = [F.normalize(loss.projector(view), dim=1).detach().double().numpy() for view in seen]
    total = []
    for a in range(3):
        for b in range(2):
            if a != b:
                scores = np.exp(z[a] @ z[b].T / 0.2)
                total.append(-np.log(np.diag(scores) / scores.sum(1)).mean())
    assert float(terms["contrast"]) == pytest.approx(np.mean(total), rel=1e-5)
    # What a patch's mean colour tells of its 8×8 pixels, for both wide views, which this test makes alike.
    weight, bias = loss.reader.weight.detach().double().numpy(), loss.reader.bias.detach().double().numpy()
    errors = []
    for image in images.double().numpy() * 0.8:
        for row, column in np.ndindex(2, 2):
            patch = image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            errors.append((weight @ patch.mean((1, 2)) + bias - patch.reshape(-1)) ** 2)
    assert float(terms["pixels"]) == pytest.approx(0.5 * np.mean(errors), rel=1e-5)


def test_supervised_learns_the_labels() -> None:
    torch.manual_seed(0)
    encoder = underpaint.create("encoder", "tiny/vit@random", width=48, depth=1, heads=2)
    loss = underpaint.create("loss", "tiny/supervised", classes=2, smoothing=0.0)
    loss.prepare(SIZES)
    labels = torch.arange(16) % 2
    images = (labels.view(-1, 1, 1, 1) * 1.6 - 0.8).expand(-1, 3, 32, 32) + 0.05 * torch.randn(16, 3, 32, 32)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *loss.parameters()], lr=3e-3)
    values = []
    for step in range(25):
        value = loss(StepTensors(step=step, inputs=images, labels=labels, encoder=encoder))["supervised"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[0] == pytest.approx(math.log(2), abs=0.4)
    assert np.mean(values[-5:]) < 0.5 * math.log(2)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_cards_numbers_are_those_of_the_shipped_weights(tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip(f"Tiny ImageNet is not at '{DATA}'; set UNDERPAINT_TEST_DATA")
    card = json.loads((Path(underpaint_tiny.__file__).parent / "weights" / "card.json").read_text())["numbers"]
    script = Path(__file__).parents[2] / "benchmarks" / "tiny_encoder.py"
    command = [sys.executable, str(script), "measure", "tiny/vit", "--data", str(DATA), "--workers", "1"]
    # The probe's steps are small, and two threads that wait for each other on a busy core take five times as long.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(tmp_path / "found.json")], check=True, timeout=3000, env=environment)
    rows = json.loads((tmp_path / "found.json").read_text())
    assert (rows["train"], rows["validation"]) == (card["train"], card["validation"])
    found = rows["encoders"]["tiny/vit"]
    for name in ("knn", "linear", "layout"):
        assert found[name] == pytest.approx(card["tiny/vit"][name], abs=0.005), name

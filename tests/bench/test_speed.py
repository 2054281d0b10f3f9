"""Sizes and speed of models: counts against closed forms, timing against a clock that is set by hand."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from tests.run.conftest import TINY, tiny_recipe
from underpaint.bench import speed
from underpaint.bench.measure import measure_models
from underpaint.bench.speed import images_per_second, tokenizer_speed
from underpaint.config.recipe import dump_recipe, recipe_from_plain
from underpaint.models.build import build_tokenizer
from underpaint.models.folders import save_tokenizer
from underpaint.run.pipeline import run_recipe


def test_the_rate_is_the_median_of_calls_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    # Three slow calls to warm up, then 1, 2, 1, 2, … seconds: after ten seconds, seven calls.
    took = itertools.chain([50.0] * 3, itertools.cycle([1.0, 2.0]))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    calls = []

    def call() -> None:
        now[0] += next(took)
        calls.append(now[0])

    rate, spread = images_per_second(call, 8, torch.device("cpu"))
    assert len(calls) == 3 + 7
    assert rate == 8.0  # 8, 4, 8, 4, 8, 4, 8 images a second
    assert spread == pytest.approx((7 * (4 * 64 + 3 * 16) / 7 - 7 * (44 / 7) ** 2) ** 0.5 / 6**0.5)


def test_a_fast_call_is_timed_twenty_times() -> None:
    calls = []
    images_per_second(lambda: calls.append(1), 1, torch.device("cpu"))
    assert len(calls) == 3 + 20


def test_parameters_are_counted_and_speed_says_how_it_was_measured(tmp_path: Path) -> None:
    recipe = recipe_from_plain({**TINY, "diffusion": None})
    tokenizer = build_tokenizer(recipe.tokenizer, 0)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    (tmp_path / "config.yaml").write_text(dump_recipe(recipe))
    numbers = {number.name: number for number in measure_models(tmp_path)}
    assert list(numbers) == [
        "encoder, M parameters", "adapter, M parameters", "decoder, M parameters", "encode img/s", "decode img/s",
    ]  # fmt: skip
    # Two linear layers of the MLP adapter, 32 to 32 to 4.
    parts = {name: numbers[f"{name}, M parameters"].value for name in ("encoder", "adapter", "decoder")}
    assert parts["adapter"] * 1e6 == pytest.approx((32 * 32 + 32) + (32 * 4 + 4))
    assert sum(parts.values()) * 1e6 == pytest.approx(sum(len(p.flatten()) for p in tokenizer.parameters()))
    encode, decode = numbers["encode img/s"], numbers["decode img/s"]
    assert encode.protocol["precision"] == "fp32"
    assert encode.protocol["torch"] == torch.__version__
    assert encode.higher_is_better is True
    assert encode.id != decode.id
    again = {n.name: n for n in tokenizer_speed(tokenizer.eval(), 32, 32)}
    assert again["encode img/s"].id == encode.id
    assert again["encode img/s"].value > 0
    larger = {n.name: n for n in tokenizer_speed(tokenizer, 32, 64, batch=2)}
    assert larger["encode img/s"].id != encode.id


def test_a_loaded_tokenizer_is_timed_where_it_was_trained_or_stands_alone(tmp_path: Path) -> None:
    tokenizer = ["encoder, M parameters", "adapter, M parameters", "decoder, M parameters"]
    speed = ["encode img/s", "decode img/s"]
    generator = ["backbone, M parameters", "conditioner, M parameters"]
    folder = tmp_path / "run"
    run_recipe(tiny_recipe(), folder)
    assert [number.name for number in measure_models(folder)] == [*tokenizer, *generator, *speed]
    loads = {**TINY, "tokenizer": {"load": str(folder / "tokenizer")}, "stages": []}
    (folder / "config.yaml").write_text(dump_recipe(recipe_from_plain(loads)))
    assert [number.name for number in measure_models(folder)] == generator
    shutil.rmtree(folder / "generator")
    (folder / "config.yaml").write_text(dump_recipe(recipe_from_plain({**loads, "diffusion": None})))
    assert [number.name for number in measure_models(folder)] == [*tokenizer, *speed]

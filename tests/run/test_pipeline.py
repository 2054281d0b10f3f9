"""A recipe carried through its stages: what the papers' method promises, and what a run folder holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import underpaint
from tests.run.conftest import tiny_recipe
from underpaint.data.latents import LatentCache
from underpaint.errors import ConfigError, DataError
from underpaint.models.generator import Generator
from underpaint.models.tokenizer import Tokenizer
from underpaint.run import pipeline
from underpaint.run.data import build_cache, open_run_data
from underpaint.run.folder import RunFolder
from underpaint.run.pipeline import run_recipe
from underpaint.training.log import read_rows
from underpaint.training.ranks import Ranks
from underpaint.training.tokenizer_stage import TokenizerModule, tokenizer_losses, tokenizer_sizes
from underpaint.weights import tensor_hash


def stage(finished: Path, name: str) -> Tokenizer:
    tokenizer = underpaint.load(finished / "stages" / name / "tokenizer")
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


def test_run_folder_holds_what_the_design_says(finished: Path) -> None:
    expected = {"config.yaml", "provenance.json", "stages", "tokenizer", "latents", "generator", "samples", "report"}
    assert expected <= {path.name for path in finished.iterdir()}
    assert (finished / "report" / "index.html").stat().st_size > 10_000
    provenance = json.loads((finished / "provenance.json").read_text())
    (environment,) = provenance["environments"]
    assert torch.__version__.startswith(environment["versions"]["torch"])
    assert {p["name"] for p in environment["plugins"]} >= {"aligntok", "tiny"}
    assert provenance["sessions"][-1]["environment"] == 0
    rows = read_rows(finished / "stages" / "align" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"loss", "l1", "lr", "grad_norm", "images_per_second", "data_wait", "memory_gib"} <= rows[0].keys()
    # A CPU's peak is not known, so nothing is a share of it.
    assert "mfu" not in rows[0]


def test_stage_one_leaves_the_encoder_as_it_was(finished: Path) -> None:
    # aligntok.md §4.3: no encoder parameter changes in stage 1.
    fresh = underpaint.create("encoder", "tiny/vit@random", width=32, depth=2, heads=2)
    assert tensor_hash(stage(finished, "align").encoder.state_dict()) == tensor_hash(fresh.state_dict())


def test_stage_two_moves_the_encoder(finished: Path) -> None:
    before, after = stage(finished, "align"), stage(finished, "perceive")
    assert tensor_hash(before.encoder.state_dict()) != tensor_hash(after.encoder.state_dict())


def test_stage_three_leaves_every_latent_bit_equal(finished: Path) -> None:
    before, after = stage(finished, "perceive"), stage(finished, "refine")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(before.encode(images), after.encode(images))
        assert not torch.equal(before.decode(before.encode(images)), after.decode(after.encode(images)))
    assert before.fingerprint() == after.fingerprint()


def test_semantic_loss_is_zero_at_the_first_step_of_stage_two(finished: Path) -> None:
    # aligntok.md §4.3: the student starts as its teacher.
    recipe = tiny_recipe()
    student, teacher = stage(finished, "align"), stage(finished, "align")
    losses = tokenizer_losses(recipe.stages[1], 1, torch.device("cpu"), tokenizer_sizes(student, 32, 32))
    module = TokenizerModule(student, recipe.stages[1].trains, losses, teacher).eval()
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    _, terms, _ = module(pixels, 0)
    assert float(terms["semantic"]) == 0.0


def test_teacher_is_neither_trained_nor_saved(finished: Path) -> None:
    recipe = tiny_recipe()
    teacher = stage(finished, "align")
    losses = tokenizer_losses(recipe.stages[1], 1, torch.device("cpu"), tokenizer_sizes(teacher, 32, 32))
    module = TokenizerModule(stage(finished, "align"), recipe.stages[1].trains, losses, teacher)
    assert {name.partition(".")[0] for name in module.state_dict()} == {"encoder", "adapter", "decoder"}
    assert not any(p.requires_grad for p in teacher.parameters())


def test_statistics_are_those_of_the_cached_latents(finished: Path) -> None:
    tokenizer = underpaint.load(finished / "tokenizer")
    cache = LatentCache(finished / "latents", None)
    values = cache.read(np.arange(len(cache))).double()
    assert tokenizer.statistics is not None
    np.testing.assert_allclose(tokenizer.statistics.mean, values.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(tokenizer.statistics.std, values.std((0, 2, 3), correction=0), rtol=1e-6)
    assert cache.identity.tokenizer == tokenizer.fingerprint()


def test_cache_of_another_tokenizer_is_refused_naming_both(finished: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    data = open_run_data(recipe.data)
    shutil.copytree(finished / "latents", tmp_path / "latents")
    other = stage(finished, "align")
    with Ranks("cpu") as ranks, pytest.raises(DataError) as caught:
        build_cache(tmp_path / "latents", other, data, recipe.latents, ranks)
    assert other.fingerprint() in str(caught.value)
    assert stage(finished, "refine").fingerprint() in str(caught.value)


def test_generator_samples_and_each_sample_depends_on_its_own_seed(finished: Path) -> None:
    generator = underpaint.load(finished)
    assert isinstance(generator, Generator)
    both = generator.sample(torch.tensor([0, 1]), seeds=[5, 6])
    alone = generator.sample(torch.tensor([1]), seeds=[6])
    assert both.shape == (2, 3, 32, 32)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_a_finished_run_is_not_run_again(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "again"
    shutil.copytree(finished, copy)
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("model.safetensors") if "tokenizer" not in p.parts[-3:-1]}
    run_recipe(tiny_recipe("engine.log_every=2"), copy)
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_only_what_is_encoded_is_called_encoding(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    run_recipe(tiny_recipe(), tmp_path / "run", until="latents")
    assert "latents: encoding" not in capsys.readouterr().err
    (tmp_path / "run" / "latents" / "index.json").unlink()
    run_recipe(tiny_recipe(), tmp_path / "run", until="latents")
    assert "latents: encoding" in capsys.readouterr().err


def test_another_recipe_is_refused_and_says_what_differs(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages\[0\].steps was 4 and is 5"):
        run_recipe(tiny_recipe("stages.align.steps=5"), finished)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis.tex"):
        run_recipe(tiny_recipe(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("text", ["lr: 3\n", "", "[]\n", "a: [\n"])
def test_a_folder_with_a_config_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config.yaml' is no recipe that .*: .* Choose another --out\."):
        run_recipe(tiny_recipe(), tmp_path)
    assert (tmp_path / "config.yaml").read_text() == text


def test_interrupted_training_goes_on_bit_by_bit(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from underpaint.training import loop

    class Cut(Exception):
        pass

    real = loop.train_loop

    def cut_short(**arguments: object) -> object:
        if arguments["name"] == "perceive" and arguments["start"] == 0:
            real(**{**arguments, "steps": 2})  # type: ignore[arg-type]
            raise Cut
        return real(**arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("underpaint.run.training.train_loop", cut_short)
    with pytest.raises(Cut):
        run_recipe(tiny_recipe(), tmp_path / "run", until="perceive")
    run_recipe(tiny_recipe(), tmp_path / "run", until="perceive")
    resumed = underpaint.load(tmp_path / "run" / "stages" / "perceive" / "tokenizer")
    assert tensor_hash(resumed.state_dict()) == tensor_hash(stage(finished, "perceive").state_dict())
    ours = [row["loss"] for row in read_rows(tmp_path / "run" / "stages" / "perceive" / "metrics.jsonl")]
    assert ours == [row["loss"] for row in read_rows(finished / "stages" / "perceive" / "metrics.jsonl")]


def test_non_square_images_go_through(tmp_path: Path) -> None:
    sizes = ["data.size=[32, 48]", "data.enlarge=true"]
    recipe = tiny_recipe(*sizes, "evaluation.generation=[]", "stages.align.steps=1", "diffusion.steps=1")
    run_recipe(recipe, tmp_path / "run")
    generator = underpaint.load(tmp_path / "run")
    assert generator.sample(torch.tensor([0]), seeds=[0]).shape == (1, 3, 32, 48)


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_as_the_recipe_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tf32: bool) -> None:
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    found: list[bool] = []
    monkeypatch.setattr(pipeline, "_run", lambda *_: found.extend(backend.allow_tf32 for backend in backends))
    try:
        for backend in backends:
            backend.allow_tf32 = not tf32
        run_recipe(tiny_recipe(f"engine.tf32={str(tf32).lower()}"), tmp_path / "run")
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
    assert found == [tf32, tf32]


def test_loss_that_needs_a_teacher_is_refused_before_training(tmp_path: Path) -> None:
    recipe = tiny_recipe("stages.align.losses=[aligntok/semantic]")
    with pytest.raises(ConfigError, match="teacher"):
        run_recipe(recipe, tmp_path / "run")


def test_claim_keeps_the_config_of_the_first_session(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(tiny_recipe())
    folder.stage("align").mkdir(parents=True)
    folder.claim(tiny_recipe("engine.zero=1", "data.workers=1"))
    with pytest.raises(ConfigError, match="seed was 0 and is 1"):
        folder.claim(tiny_recipe("seed=1"))

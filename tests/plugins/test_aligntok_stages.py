"""What AlignTok's stages promise (aligntok.md §4.3), on a tiny run with critics; see tests/run/test_pipeline.py too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import underpaint
from underpaint.config.schema import Recipe
from underpaint.data.latents import LatentCache
from underpaint.models.generator import Generator
from underpaint.models.tokenizer import Tokenizer
from underpaint.run import tokenizer_stage
from underpaint.run.data import build_cache, open_run_data
from underpaint.run.pipeline import run_recipe
from underpaint.run.recipes import load_recipe
from underpaint.training.log import read_rows
from underpaint.training.ranks import Ranks
from underpaint.training.tokenizer_stage import TokenizerModule, tokenizer_losses, tokenizer_sizes
from underpaint.weights import tensor_hash

pytestmark = pytest.mark.slow

_SHARED = [
    "data.train={name: scenes/shapes, length: 40, size: 32}",
    "data.validation=null",
    "data.holdout=0.2",
    "data.size=32",
    "data.crop=center",
    "data.workers=0",
    "evaluation={images: 4, batch: 4, show: 2, reconstruction: [psnr], sampler: {name: euler, steps: 2}}",
    "engine={device: cpu, log_every: 1, checkpoint_every: 2}",
]
_STAGES = [
    f"stages.{stage}.{setting}"
    for stage in ("align", "perceive", "refine")
    for setting in ("steps=3", "batch=4", "optimizer.lr=0.002", "losses.critics/patchgan.channels=8", "ema=0.5")
]


@attrs.frozen
class Run:
    """A finished run, and what its stages were trained with: module, teacher, hash of the teacher at the start."""

    folder: Path
    recipe: Recipe
    modules: dict[str, tuple[TokenizerModule, Tokenizer | None, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of recipe:aligntok-small. Tests read it and never write into it."""
    recipe = load_recipe(
        "recipe:aligntok-small",
        [
            *_SHARED,
            *_STAGES,
            "tokenizer.encoder={name: tiny/vit@random, width: 32, depth: 2, heads: 2}",
            "tokenizer.decoder={name: ldm/decoder, base: 16, blocks: 1, multipliers: [1, 1, 1, 2]}",
            "tokenizer.latent_channels=4",
            "stages.align.losses.critics/patchgan.start=1",
            "stages.align.losses.critics/patchgan.critic.start=1",
            "latents={shard: 10, batch: 8}",
            "diffusion.backbone={name: lightningdit/S-1, width: 32, depth: 1, heads: 2}",
            "diffusion.steps=2",
            "diffusion.batch=4",
        ],
    )
    modules: dict[str, tuple[TokenizerModule, Tokenizer | None, str]] = {}
    names = iter(stage.name for stage in recipe.stages)

    def noted(tokenizer: Tokenizer, trains: Any, losses: Any, teacher: Tokenizer | None, *rest: Any) -> TokenizerModule:
        module = TokenizerModule(tokenizer, trains, losses, teacher, *rest)
        modules[next(names)] = (module, teacher, "" if teacher is None else tensor_hash(teacher.state_dict()))
        return module

    folder = tmp_path_factory.mktemp("aligntok") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_stage, "TokenizerModule", noted)
        run_recipe(recipe, folder)
    return Run(folder, recipe, modules)


def exported(run: Run, stage: str) -> Tokenizer:
    tokenizer = underpaint.load(run.folder / "stages" / stage / "tokenizer")
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


# ------------------------------------------------------------------------------------------------- teacher


def test_teacher_is_the_exported_first_stage_and_shares_nothing_with_the_student(run: Run) -> None:
    assert [name for name, (_, teacher, _) in run.modules.items() if teacher is not None] == ["perceive"]
    student, teacher, before = run.modules["perceive"]
    assert teacher is not None
    assert before == tensor_hash(exported(run, "align").state_dict())
    places = {tensor.data_ptr() for tensor in student.state_dict().values()}
    assert not places & {tensor.data_ptr() for tensor in teacher.state_dict().values()}


def test_teacher_is_after_the_stage_what_it_was_before(run: Run) -> None:
    _, teacher, before = run.modules["perceive"]
    assert teacher is not None
    assert tensor_hash(teacher.state_dict()) == before
    assert tensor_hash(exported(run, "perceive").encoder.state_dict()) != tensor_hash(teacher.encoder.state_dict())


def test_optimizer_and_average_hold_the_student_alone(run: Run) -> None:
    wanted = {name for name, _ in exported(run, "perceive").named_parameters()}
    checkpoints = run.folder / "stages" / "perceive" / "checkpoints"
    newest = sorted(path for path in checkpoints.iterdir() if path.is_dir())[-1]
    files = list(newest.glob("engine-*.safetensors"))
    assert files
    kinds: dict[str, list[str]] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                kind, _, name = key.partition("/")
                kinds.setdefault(kind, []).append(name)
    assert {"param", "exp_avg", "exp_avg_sq", "ema"} <= kinds.keys()
    for kind in ("param", "exp_avg", "exp_avg_sq", "ema"):
        assert sorted(kinds[kind]) == sorted(wanted), kind


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize(
    ("stage", "still"), [("align", ("encoder",)), ("perceive", ()), ("refine", ("encoder", "adapter"))]
)
def test_gradients_reach_what_the_stage_trains_and_nothing_else(run: Run, stage: str, still: tuple[str, ...]) -> None:
    index = [s.name for s in run.recipe.stages].index(stage)
    config = run.recipe.stages[index]
    tokenizer = exported(run, "align")
    teacher = exported(run, "align") if config.teacher else None
    losses = tokenizer_losses(config, index, torch.device("cpu"), tokenizer_sizes(tokenizer, 32, 32))
    module = TokenizerModule(tokenizer, config.trains, losses, teacher)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    module(pixels, 2)[0].backward()
    for part in ("encoder", "adapter", "decoder"):
        reached = [p.grad is not None for p in getattr(module, part).parameters()]
        assert reached == [part not in still] * len(reached), part


def test_last_stage_leaves_latents_as_they_are_beside_a_critic(run: Run) -> None:
    assert exported(run, "perceive").fingerprint() == exported(run, "refine").fingerprint()
    before = load_file(run.folder / "stages" / "perceive" / "critics" / "critics_patchgan.safetensors")
    after = load_file(run.folder / "stages" / "refine" / "critics" / "critics_patchgan.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize("place", ["stages/align", "stages/perceive", "stages/refine", "."])
def test_exported_tokenizer_holds_neither_critic_nor_measure_nor_teacher(run: Run, place: str) -> None:
    folder = run.folder / place / "tokenizer"
    tokenizer = underpaint.load(folder)
    tensors = load_file(folder / "model.safetensors")
    assert {name.partition(".")[0] for name in tensors} == {"encoder", "adapter", "decoder"}
    parts = (tokenizer.encoder, tokenizer.adapter, tokenizer.decoder)
    assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for p in parts for t in p.state_dict().values())
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_exported_tokenizer_knows_its_preprocessing_and_statistics(run: Run) -> None:
    tokenizer = underpaint.load(run.folder / "tokenizer")
    fresh = underpaint.create("encoder", "tiny/vit@random", width=32, depth=2, heads=2)
    assert (tokenizer.encoder.info.mean, tokenizer.encoder.info.std) == (fresh.info.mean, fresh.info.std)
    assert tokenizer.statistics is not None
    assert len(tokenizer.statistics.mean) == len(tokenizer.statistics.std) == 4


# ---------------------------------------------------------------------------------------------------- logs


def rows(run: Run, stage: str) -> list[dict[str, Any]]:
    return read_rows(run.folder / "stages" / stage / "metrics.jsonl")


def test_ratio_of_gradients_of_the_semantic_loss_is_logged_and_not_applied(run: Run) -> None:
    last = rows(run, "perceive")[-1]
    assert last["factor_aligntok_semantic"] > 0.0
    expected = last["l1"] + last["features"] + 1.0 * last["semantic"]
    expected += 0.5 * last["factor_critics_patchgan"] * last["adversarial"]
    assert last["loss"] == pytest.approx(expected, rel=1e-4)


def test_scale_of_the_latent_is_logged_and_adds_nothing(run: Run) -> None:
    first = rows(run, "align")[0]
    assert 0.0 < first["latent_std_min"] <= first["latent_std"] <= first["latent_std_max"]
    assert first["loss"] == pytest.approx(first["l1"] + first["features"], rel=1e-5)


# -------------------------------------------------------------------------------------------- refined later


def test_decoder_refined_later_leaves_cache_and_generator_valid(run: Run, tmp_path: Path) -> None:
    recipe = load_recipe(
        "recipe:aligntok-refine",
        [
            *_SHARED,
            f"tokenizer.load={run.folder / 'tokenizer'}",
            "stages.refine.losses.lpips={name: features, encoder: tiny/vit@random}",
            "stages.refine.losses.critics/patchgan.channels=8",
            "stages.refine.losses.critics/patchgan.layers=2",
            "stages.refine.losses.critics/patchgan.start=1",
            "stages.refine.losses.critics/patchgan.critic.start=0",
            "stages.refine.steps=2",
            "stages.refine.batch=4",
            "stages.refine.optimizer.lr=0.01",
            "stages.refine.ema=0.5",
            "stages.refine.stop=null",
        ],
    )
    run_recipe(recipe, tmp_path / "refined")
    old, new = underpaint.load(run.folder / "tokenizer"), underpaint.load(tmp_path / "refined" / "tokenizer")
    assert new.fingerprint() == old.fingerprint()
    assert new.statistics == old.statistics
    assert tensor_hash(new.decoder.state_dict()) != tensor_hash(old.decoder.state_dict())

    shutil.copytree(run.folder / "latents", tmp_path / "latents")
    before = LatentCache(run.folder / "latents", None).read(np.arange(8))
    with Ranks("cpu") as ranks:
        cache = build_cache(tmp_path / "latents", new, open_run_data(run.recipe.data), run.recipe.latents, ranks)
    assert torch.equal(cache.read(np.arange(8)), before)

    generator = underpaint.load(run.folder)
    assert isinstance(generator, Generator)
    images = generator.sample(torch.tensor([0, 1]), seeds=[3, 4])
    generator.tokenizer = new
    refined = generator.sample(torch.tensor([0, 1]), seeds=[3, 4])
    assert refined.shape == images.shape
    assert not torch.equal(refined, images)


# --------------------------------------------------------------------------------------------------- shapes


def shaped(encoder: Any, size: int, latent_channels: int = 32) -> tuple[int, ...]:
    adapter = underpaint.create(
        "adapter", "aligntok/mlp", in_channels=encoder.info.channels, latent_channels=latent_channels
    )
    decoder = underpaint.create(
        "decoder", "ldm/decoder", latent_channels=latent_channels, stride=encoder.info.stride, base=8, blocks=1
    )
    tokenizer = Tokenizer(encoder, adapter, decoder).eval()
    with torch.inference_mode():
        latents = tokenizer.encode(torch.zeros(1, 3, size, size))
    assert tokenizer.grid(size, size) == tuple(latents.shape[-2:])
    return tuple(latents.shape[1:])


@pytest.mark.parametrize(("size", "side"), [(256, 16), (512, 32)])
def test_latent_of_a_size(size: int, side: int) -> None:
    encoder = underpaint.create("encoder", "tiny/vit@random", patch=16, width=32, depth=1, heads=2)
    assert shaped(encoder, size) == (32, side, side)
    assert shaped(encoder, size, 64) == (64, side, side)


@pytest.mark.parametrize(("size", "side"), [(256, 16), (512, 32)])
def test_latent_of_a_size_of_dinov2(size: int, side: int) -> None:
    encoder = underpaint.create("encoder", "timm/vit_small_patch14_dinov2@random", interpolation="bilinear")
    assert shaped(encoder, size) == (32, side, side)

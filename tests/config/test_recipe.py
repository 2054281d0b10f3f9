"""Recipes: YAML, overrides, strictness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from underpaint.config.recipe import (
    apply_overrides,
    dump_recipe,
    plain_recipe,
    read_yaml,
    recipe_from_plain,
    write_atomically,
)
from underpaint.errors import ConfigError, NotFoundError
from underpaint.registration.manager import manager
from underpaint.run.recipes import check_recipe, load_recipe

SHIPPED = [registration.name for registration in manager().catalogue.recipes()]


def minimal() -> dict[str, Any]:
    return {
        "name": "minimal",
        "data": {"train": "scenes/shapes"},
        "tokenizer": {"encoder": "tiny/vit", "adapter": "aligntok/mlp", "decoder": "ldm/decoder"},
        "stages": [{"name": "align", "trains": ["adapter"], "losses": ["l1"], "steps": 3}],
    }


def test_yaml_reads_exponents_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: 1e-4\nb: 1.5e3\nc: .5\nd: 3\ne: 1e5x\n")
    assert read_yaml(path) == {"a": 1e-4, "b": 1500.0, "c": 0.5, "d": 3, "e": "1e5x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "stands twice in line 2"),
        ("- 1\n- 2\n", "must hold a mapping"),
        ("a: [1, 2\n", "not valid YAML"),
        ("a: {b: !!python/object:os.system x}\n", "not valid YAML"),
    ],
)
def test_bad_yaml_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_missing_file_names_the_way_to_recipes(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="recipe:NAME"):
        read_yaml(tmp_path / "absent.yaml")


def test_overrides_reach_names_indices_and_bare_components() -> None:
    plain = apply_overrides(
        minimal(),
        [
            "stages.align.steps=7",
            "stages.0.optimizer.lr=1e-3",
            "tokenizer.encoder.layers=[1, 3]",
            "data.size=[64, 32]",
            "stages.align.losses.l1.weight=0.5",
        ],
    )
    recipe = recipe_from_plain(plain)
    assert recipe.stages[0].steps == 7
    assert recipe.stages[0].optimizer.lr == 1e-3
    assert recipe.tokenizer.encoder is not None
    assert recipe.tokenizer.encoder.options == {"layers": [1, 3]}
    assert (recipe.data.height, recipe.data.width) == (64, 32)
    assert recipe.stages[0].losses[0].weight == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.align.optmizer=1", r"stages\[0\] has no key 'optmizer'. Did you mean 'optimizer'"),
        ("data.size=big", "data.size must be a whole number or a list, not 'big'"),
        ("seed=1.5", "seed must be a whole number"),
        ("stages.align.optimizer.rates={encoder: 1e-3}", r"stages\[0\].optimizer has no key 'rates'"),
        (
            "stages.align.optimizer.parts.encoder=1e-3",
            "parts.encoder must be a mapping with keys such as 'lr', 'betas'",
        ),
        ("stages.align.optimizer.parts.encoder.betas=[0.9, 1.5]", "betas"),
        ("stages.align.optimizer.betas=[1.0, 0.9]", "betas"),
        ("stages.align.optimizer.parts.encoder.warmup=-1", "warmup"),
        ("stages.nope.steps=1", "known: align"),
        ("engine.zero=4", "engine.zero is 4"),
        ("nonsense", "write 'path=value'"),
        ("seed.deeper=1", "seed"),
        ("stages.align.trains=[]", "is empty"),
        ("stages.align.teacher=later", "not an earlier stage"),
        ("stages.align.name=latents", "none of start, latents"),
        ("data.holdout=1.5", "holdout"),
        ("data.resize=8", "resize to at least its longer side"),
        ("data.zoom=[0.5, 1.5]", "data.zoom is .* 0 < low ≤ high ≤ 1"),
        ("data.zoom=[0.5, 1.0]", "set data.crop to 'random'"),
        ("evaluation.guidance.interval=[0.8, 0.2]", "low < high"),
        ("tokenizer.load=somewhere", "keep one of the two"),
    ],
)
def test_wrong_overrides_name_their_path(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_from_plain(apply_overrides({"seed": 0, **minimal()}, [override]))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_is_valid_and_survives_a_round_trip(name: str) -> None:
    recipe = load_recipe(f"recipe:{name}")
    assert recipe_from_plain(plain_recipe(recipe)) == recipe
    assert recipe.about


def test_fp8_without_a_diffusion_model_is_refused() -> None:
    plain = apply_overrides(minimal(), ["engine.precision=fp8"])
    with pytest.raises(ConfigError, match="engine.precision is 'fp8', which is for .* diffusion is null"):
        recipe_from_plain(plain)


def test_a_recipe_that_trains_nothing_is_refused() -> None:
    nothing = ["stages=[]", "diffusion=null"]
    with pytest.raises(ConfigError, match="trains nothing: stages is empty and diffusion is null; add one"):
        recipe_from_plain(apply_overrides(minimal(), nothing))
    # What a finished tokenizer is worth can be measured without training.
    recipe_from_plain(apply_overrides(minimal(), [*nothing, "tokenizer={load: somewhere}"]))


def test_dumped_recipe_reads_back(tmp_path: Path) -> None:
    recipe = recipe_from_plain(minimal())
    path = tmp_path / "config.yaml"
    path.write_text(dump_recipe(recipe))
    assert recipe_from_plain(read_yaml(path)) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenizer.encoder=tiny/vitt", "Did you mean 'tiny/vit'"),
        ("tokenizer.adapter.hiden=3", "tokenizer.adapter has no key 'hiden'. Did you mean 'hidden'"),
        ("tokenizer.decoder.base=wide", "tokenizer.decoder.base must be"),
        ("stages.align.losses=[lll1]", r"stages\[0\].losses\[0\]: There is no loss 'lll1'"),
        ("plugins=[absent_plugin]", "absent_plugin"),
    ],
)
def test_components_are_checked_before_anything_is_built(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_recipe(recipe_from_plain(apply_overrides(minimal(), [override])))


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


GAN = "critics/patchgan"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stages.0.losses=[l1, {name: mse, start: 3}]"],
            "stages[0].losses[1].start is 3, and steps is 3, so the loss 'mse' would never count; set",
        ),
        (
            ["stages.0.losses=[{name: l1, start: 1, end: 1}]"],
            "stages[0].losses[0].end is 1, and start is 1, so the loss",
        ),
        (["stages.0.losses=[{name: l1, end: 0}]"], "stages[0].losses[0].end is 0, and start is 0, so the loss 'l1'"),
        (
            [f"stages.0.losses=[l1, {{name: {GAN}, critic: {{start: 4}}}}]"],
            "stages[0].losses[1].critic.start is 4, and steps is 3, so the critic of 'critics/patchgan'",
        ),
        (
            ["diffusion={backbone: sit/S-1, conditioner: labels, steps: 5, losses: [{name: velocity, start: 5}]}"],
            "diffusion",
        ),
        (
            [
                "stages.0.denoiser={backbone: sit/S-1, conditioner: labels, losses: [{name: repa, start: 9}]}",
            ],
            "stages[0].denoiser.losses[0].start is 9",
        ),
    ],
)
def test_a_loss_that_would_never_count_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_from_plain(apply_overrides(minimal(), overrides))
    assert str(caught.value).startswith(message)


def test_a_stage_may_train_a_critic_for_a_later_one_alone() -> None:
    plain = minimal()
    (first,) = plain["stages"]
    first["losses"] = ["l1", {"name": GAN, "start": 3}]
    with pytest.raises(ConfigError, match="never count"):
        recipe_from_plain(plain)
    second = {**first, "name": "second", "losses": ["l1", {"name": GAN, "critic": {"carry": "align"}}]}
    recipe_from_plain({**plain, "stages": [first, second]})
    first["losses"] = ["l1", {"name": GAN, "start": 2, "end": 9, "critic": {"start": 2}}]
    recipe_from_plain(plain)
    first["losses"] = ["l1", {"name": GAN, "start": 3, "critic": {"start": 3}}]
    with pytest.raises(ConfigError, match="would never learn"):
        recipe_from_plain({**plain, "stages": [first, second]})

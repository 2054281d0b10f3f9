"""``underpaint encode`` and ``--check``: the sentence, the exit code, and every kind of damage."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from PIL import Image

from tests.run.conftest import tiny_recipe
from underpaint.cli import main as cli
from underpaint.data.latent_writer import LatentCacheWriter
from underpaint.data.latents import LatentCache
from underpaint.models.build import build_tokenizer
from underpaint.models.folders import save_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokenizers, images, and a cache of the first. Tests read them and never write into them."""
    root = tmp_path_factory.mktemp("check")
    for seed, name in enumerate(("tokenizer", "other")):
        tokenizer = build_tokenizer(tiny_recipe().tokenizer, seed)
        tokenizer.about["size"] = [32, 32]
        save_tokenizer(tokenizer, root / name)
    rng = np.random.default_rng(0)
    for number in range(7):
        path = root / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    code, out, _ = run(root / "tokenizer", "--data", root / "images", "--out", root / "cache", "--shard", 3, "--flip")
    assert code == 0
    assert out.startswith("7 latents of 4×4×4 in ")
    return root


def run(*arguments: object) -> tuple[int, str, str]:
    """Run ``underpaint encode``; return exit code, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patched.setattr(sys, "argv", ["underpaint", "encode", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.run()
    assert isinstance(stop.value.code, int)
    return stop.value.code, out.getvalue(), err.getvalue()


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "cache", tmp_path / "cache")
    return tmp_path / "cache"


def check(made: Path, cache: Path, *arguments: object) -> tuple[int, str, str]:
    return run(made / "tokenizer", "--check", "--out", cache, *arguments)


def change(path: Path, what: Callable[[Any], Any], index: Path | None = None) -> None:
    """Change a JSON file, or an array; with an index, as if it had been written so."""
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        what(value)
        path.write_text(json.dumps(value))
        return
    array = np.load(path)
    what(array)
    np.save(path, array)
    if index is not None:
        old, new = json.loads(index.read_text()), sha256(path.read_bytes()).hexdigest()
        for files in [old["files"], *(record["files"] for record in old["shards"])]:
            if path.name in files:
                files[path.name]["sha256"] = new
        hashes = [file["sha256"] for record in old["shards"] for file in record["files"].values()]
        old["hash"] = sha256("\n".join(hashes).encode()).hexdigest()
        index.write_text(json.dumps(old))


def test_a_sound_cache(made: Path, cache: Path) -> None:
    code, out, err = check(made, cache, "--data", made / "images")
    assert (code, err) == (0, "")
    assert out.endswith("files, identity, values and statistics are as they should be.\n")
    assert check(made, cache)[0] == 0
    code, out, _ = check(made, cache, "--json")
    facts = json.loads(out)
    assert (code, facts["verified"], facts["samples"]) == (0, True, 7)
    assert len(facts["mean"]) == len(facts["std"]) == 4


def flip_bits(name: str) -> Callable[[Path], None]:
    def damage(cache: Path) -> None:
        data = (cache / name).read_bytes()
        (cache / name).write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])

    return damage


def several(cache: Path) -> None:
    for name in ("shard-00000.npy", "shard-00000.arrow", "shard-00001.npy", "shard-00002.npy", "statistics.npy"):
        flip_bits(name)(cache)


def set_item(array: Any, value: int) -> None:
    array.reshape(-1)[5] = value


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "latents": (flip_bits("shard-00001.npy"), "'shard-00001.npy' is not what was written; delete that file and 'index"),
    "mirrored": (flip_bits("shard-00001.flipped.npy"), "'shard-00001.flipped.npy' is not what was written"),
    "table": (flip_bits("shard-00002.arrow"), "'shard-00002.arrow' is not what was written"),
    "statistics file": (flip_bits("statistics.npy"), "'statistics.npy' is not what was written"),
    "several": (
        several,
        "'shard-00002.npy' and 'statistics.npy' are not what was written; delete these files and 'index.json'",
    ),
    "missing": (lambda c: (c / "shard-00001.npy").unlink(), "'shard-00001.npy' of the latent cache"),
    "no index": (lambda c: (c / "index.json").unlink(), "unfinished: 3 of 3 shards are there"),
    "broken index": (lambda c: (c / "index.json").write_text("{"), "is damaged"),
    "nothing": (lambda c: shutil.rmtree(c), "There is no latent cache at"),
    "hash": (lambda c: change(c / "index.json", lambda v: v.update(hash="0")), "is not that of the shards; delete 'in"),
    "nan": (
        lambda c: change(c / "shard-00001.npy", lambda a: set_item(a, 0x7FC0), c / "index.json"),
        "'shard-00001.npy' holds latents that are not finite, the first is that of image 3;",
    ),
    "infinity": (
        lambda c: change(c / "shard-00002.flipped.npy", lambda a: set_item(a, 0xFF80), c / "index.json"),
        "'shard-00002.flipped.npy' holds latents that are not finite, the first is that of image 6;",
    ),
    "other latents": (
        lambda c: change(c / "shard-00001.npy", lambda a: set_item(a, 0x4120), c / "index.json"),
        "statistics of each position are not those of the latents; delete 'index.json' and run",
    ),
    "other channels": (
        lambda c: change(c / "index.json", lambda v: v["statistics"]["mean"].reverse()),
        "statistics of each channel are not those of the latents",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_ends_with_1(made: Path, cache: Path, name: str) -> None:
    damage, sentence = DAMAGE[name]
    damage(cache)
    code, out, err = check(made, cache, "--data", made / "images")
    assert (code, out) == (1, "")
    assert sentence in err
    assert err.count("\n") == 1
    # That command would only check again.
    assert "run the same command again" not in err
    code, out, err = check(made, cache, "--json")
    problem = json.loads(out)
    assert (code, err, problem["verified"]) == (1, "", False)
    assert sentence in problem["problem"]


def test_doing_what_the_sentence_says_mends_a_cache(made: Path, cache: Path) -> None:
    several(cache)
    _, _, err = check(made, cache)
    assert "'shard-00000.npy', 'shard-00000.arrow', 'shard-00001.npy', 'shard-00002.npy' and 'statistics.npy'" in err
    for name in ("shard-00000.npy", "shard-00000.arrow", "shard-00001.npy", "shard-00002.npy", "statistics.npy"):
        (cache / name).unlink()
    (cache / "index.json").unlink()
    again = ("--data", made / "images", "--out", cache, "--shard", 3, "--flip")
    assert run(made / "tokenizer", *again)[0] == 0
    assert check(made, cache)[0] == 0
    assert LatentCache(cache).fingerprint == LatentCache(made / "cache").fingerprint


def test_a_cache_of_something_else_ends_with_1(made: Path, cache: Path, tmp_path: Path) -> None:
    code, _, err = run(made / "other", "--check", "--out", cache)
    assert code == 1
    assert "tokenizer '" in err
    shutil.copytree(made / "images" / "class0", tmp_path / "fewer" / "class0")
    code, _, err = check(made, cache, "--data", tmp_path / "fewer")
    assert code == 1
    assert "data '" in err
    assert "count 7 where 4 is asked for" in err
    code, _, err = check(made, cache, "--data", made / "images", "--size", 64)
    assert code == 1
    assert "height 32 where 64 is asked for" in err
    assert err.endswith("; delete that folder and encode again.\n")


def test_mistakes_end_with_2(made: Path, cache: Path, tmp_path: Path) -> None:
    code, _, err = run(made / "tokenizer", "--out", tmp_path / "new")
    assert code == 2
    assert "--data" in err
    assert run(made / "nowhere", "--check", "--out", cache)[0] == 2
    code, _, err = run(made / "tokenizer", "--data", made / "images", "--out", tmp_path / "new", "--store", "posterior")
    assert code == 2
    assert "--store mode" in err


def test_a_variance_that_is_not_finite_is_found(made: Path, tmp_path: Path) -> None:
    identity = LatentCache(made / "cache").identity
    identity = attrs.evolve(identity, store="posterior", dtype="float32", flip=False, count=2)
    writer = LatentCacheWriter(tmp_path / "cache", identity, shard_size=2)
    writer.write(0, torch.zeros(2, *identity.stored_shape), keys=["a", "b"])
    writer.finish()
    path = tmp_path / "cache" / "shard-00000.npy"
    assert check(made, tmp_path / "cache")[0] == 0
    change(path, lambda a: a.__setitem__((1, 7, 0, 0), 100.0), tmp_path / "cache" / "index.json")
    code, _, err = check(made, tmp_path / "cache")
    assert code == 1
    assert "the first is that of image 1;" in err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--dtype", "float32"], "dtype"),
        (["--store", "sample"], "store"),
        (["--size", "64"], "height"),
    ],
)
def test_a_cache_is_held_against_what_is_asked_for(made: Path, cache: Path, options: list[str], named: str) -> None:
    assert check(made, cache, "--flip", "--dtype", "bfloat16", "--store", "mode", "--size", 32)[0] == 0
    code, _, err = check(made, cache, *options)
    assert code == 1
    assert named in err


def test_what_only_encoding_takes_is_refused(made: Path, cache: Path) -> None:
    code, _, err = check(made, cache, "--rebuild", "--shard", 5)
    assert code == 2
    assert "--check encodes nothing; leave out --shard, --rebuild." in err
    assert LatentCache(cache).fingerprint == LatentCache(made / "cache").fingerprint

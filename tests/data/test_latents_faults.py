"""The latent cache: a fault before, within and after every step of building it, then the same command again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.data.test_latents import COUNT, FLIPPED, build, everything, with_, write_shard

from underpaint.data import latent_writer as module
from underpaint.data.latent_check import check_cache
from underpaint.data.latent_writer import LatentCacheWriter
from underpaint.data.latents import LatentCache
from underpaint.errors import DataError

IDENTITY, SHARD = with_(flip=True), 16  # three shards
STEPS = [
    "build.json",
    *(f"shard-0000{k}{end}" for k in range(3) for end in (".npy", ".flipped.npy", ".arrow", ".json")),
    "statistics.npy",
    "index.json",
]


class Killed(BaseException):
    """Caught by nothing, like a kill."""


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Nothing here loses power, and syncing takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def fail_at(patched: pytest.MonkeyPatch, name: str, moment: str) -> list[str]:
    """Make the write of a file fail; return the list that gets the names of the files written or removed."""
    write, unlink = module.write_atomically, Path.unlink
    done: list[str] = []

    def failing_write(path: Path, data) -> None:
        if path.name == name and moment == "before":
            raise Killed
        if path.name == name and moment == "within":
            # What a kill leaves of an atomic write: half of a temporary file.
            path.with_name(f".{path.name}.0123.tmp").write_bytes(bytes(len(data) // 2))
            raise Killed
        write(path, data)
        done.append(path.name)
        if path.name == name and moment == "after":
            raise Killed

    def failing_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == name and moment == "before removal":
            raise Killed
        unlink(path, missing_ok=missing_ok)
        if path.name == name and moment == "after removal":
            raise Killed

    patched.setattr(module, "write_atomically", failing_write)
    patched.setattr(Path, "unlink", failing_unlink)
    return done


@pytest.mark.parametrize("moment", ["before", "within", "after"])
@pytest.mark.parametrize("name", STEPS)
def test_a_fault_in_a_build(tmp_path, monkeypatch, name, moment):
    whole, folder = tmp_path / "whole", tmp_path / "cache"
    build(whole, IDENTITY, shard_size=SHARD)
    with monkeypatch.context() as patched:
        done = fail_at(patched, name, moment)
        with pytest.raises(Killed):
            build(folder, IDENTITY, shard_size=SHARD)
    assert done == STEPS[: STEPS.index(name) + (moment == "after")]
    if "index.json" in done:
        check_cache(folder, IDENTITY)
    else:
        with pytest.raises(DataError, match="unfinished" if done else "no latent cache"):
            LatentCache(folder)
    marked = sum(step.startswith("shard") and step.endswith(".json") for step in done)
    assert LatentCacheWriter(folder, IDENTITY, shard_size=SHARD).missing_shards() == list(range(marked, 3))
    build(folder, IDENTITY, shard_size=SHARD)
    assert everything(folder) == everything(whole)


REWRITE = [
    *((name, moment) for name in ("index.json", "shard-00001.json") for moment in ("before removal", "after removal")),
    *((name, moment) for name in STEPS[5:9] + STEPS[-2:] for moment in ("before", "within", "after")),
]


@pytest.mark.parametrize(("name", "moment"), REWRITE)
def test_a_fault_while_a_shard_is_written_again(tmp_path, monkeypatch, name, moment):
    """With other values of the same size: old and new may never pass for one cache."""

    def rewrite(folder: Path) -> None:
        writer = LatentCacheWriter(folder, IDENTITY, shard_size=SHARD)
        write_shard(writer, 1, latents=FLIPPED[16:32])
        writer.finish()

    old, new, folder = tmp_path / "old", tmp_path / "new", tmp_path / "cache"
    for built in (old, new, folder):
        build(built, IDENTITY, shard_size=SHARD)
    rewrite(new)
    assert everything(new) != everything(old)
    with monkeypatch.context() as patched:
        fail_at(patched, name, moment)
        with pytest.raises(Killed):
            rewrite(folder)
    if (folder / "index.json").exists():
        assert everything(folder) in (everything(old), everything(new))
    else:
        with pytest.raises(DataError, match="unfinished"):
            LatentCache(folder)
    rewrite(folder)
    assert everything(folder) == everything(new)
    assert len(check_cache(folder, IDENTITY)) == COUNT


def test_the_mark_of_a_shard_is_believed_only_with_all_its_files(tmp_path):
    build(tmp_path, IDENTITY, shard_size=SHARD)
    for name in STEPS[1:4]:
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-1])
        assert LatentCacheWriter(tmp_path, IDENTITY, shard_size=SHARD).missing_shards() == [0]
        (tmp_path / name).write_bytes(data)
    assert LatentCacheWriter(tmp_path, IDENTITY, shard_size=SHARD).missing_shards() == []


def test_lost_statistics_are_made_anew_without_encoding(tmp_path):
    build(tmp_path, IDENTITY, shard_size=SHARD)
    before = everything(tmp_path)
    (tmp_path / "statistics.npy").unlink()
    with pytest.raises(DataError, match=r"'statistics\.npy' .* is missing; delete that file and 'index\.json'"):
        LatentCache(tmp_path)
    (tmp_path / "index.json").unlink()
    writer = LatentCacheWriter(tmp_path, IDENTITY, shard_size=SHARD)
    assert writer.missing_shards() == []
    writer.finish()
    assert everything(tmp_path) == before

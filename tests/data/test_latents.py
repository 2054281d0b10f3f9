"""The latent cache: exact statistics of channels, restarts, identity, damage, and reading at random."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import time
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch

from underpaint.data import latent_writer as module
from underpaint.data.latent_check import check_cache
from underpaint.data.latent_writer import LatentCacheWriter
from underpaint.data.latents import CacheIdentity, LatentCache
from underpaint.errors import DataError

COUNT, SHARD, SHAPE = 43, 8, (3, 4, 5)
IDENTITY = CacheIdentity(
    tokenizer="tok-a", data="data-a", height=64, width=80, crop="center", flip=False, dtype="bfloat16", store="mode",
    shape=SHAPE, count=COUNT,
)  # fmt: skip


def values(count: int = COUNT, seed: int = 0) -> torch.Tensor:
    scale = torch.tensor([0.1, 1.0, 30.0])[:, None, None]
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)) * scale + 5 * scale


ALL, FLIPPED = values(), values(seed=1)


def write_shard(writer: LatentCacheWriter, shard: int, **changes) -> None:
    span = writer.positions(shard)
    rows = slice(span.start, span.stop)
    arguments = {
        "keys": [f"img/{p}.jpeg" for p in span],
        "labels": [p % 7 for p in span],
        "texts": [f"a photo, Nr. {p} — ‘é’" if p % 3 else None for p in span],
        "flipped": FLIPPED[rows] if writer.identity.flip else None,
    }
    writer.write(shard, changes.pop("latents", ALL[rows]), **(arguments | changes))


def build(folder: Path, identity: CacheIdentity = IDENTITY, world_size: int = 1, shard_size: int = SHARD) -> str:
    for rank in range(world_size):
        writer = LatentCacheWriter(folder, identity, shard_size=shard_size, rank=rank, world_size=world_size)
        for shard in writer.missing_shards():
            write_shard(writer, shard)
    return LatentCacheWriter(folder, identity, shard_size=shard_size).finish()


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def with_(**changes) -> CacheIdentity:
    return attrs.evolve(IDENTITY, **changes)


# --- reading ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reads_at_random_what_was_written(tmp_path, dtype):
    build(tmp_path, with_(dtype=dtype, flip=True))
    cache = LatentCache(tmp_path)
    rng = np.random.default_rng(0)
    indices = rng.integers(0, COUNT, 100)
    flip = rng.random(100) < 0.5
    expected = torch.where(torch.from_numpy(flip)[:, None, None, None], FLIPPED[indices], ALL[indices])
    if dtype == "bfloat16":
        expected = expected.to(torch.bfloat16).float()
    got = cache.read(indices, flip)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    assert torch.equal(cache.read(indices, np.zeros(100, dtype=bool)), cache.read(indices))
    assert len(cache) == COUNT
    assert cache.labels(indices).tolist() == [i % 7 for i in indices.tolist()]
    assert cache.texts(indices) == [f"a photo, Nr. {i} — ‘é’" if i % 3 else None for i in indices.tolist()]
    assert cache.keys(indices) == [f"img/{i}.jpeg" for i in indices.tolist()]
    check_cache(tmp_path)


def test_bfloat16_rounds_to_nearest_even_and_keeps_the_extremes(tmp_path):
    # By hand: bfloat16 has 8 significant bits, so 1 + 1/256 is a tie (to even: 1) and 1 + 3/256 a tie (to 1 + 1/64).
    given = [1 + 1 / 256, 1 + 3 / 256, 1 + 1.01 / 256, -0.0, 2.0**-133, -(2.0**127), 1e-3]
    kept = [1.0, 1 + 1 / 64, 1 + 1 / 128, -0.0, 2.0**-133, -(2.0**127), 0.00099945068359375]
    identity = with_(shape=(1, 1, len(given)), count=1)
    writer = LatentCacheWriter(tmp_path, identity, shard_size=4)
    writer.write(0, torch.tensor(given, dtype=torch.float64).reshape(1, 1, 1, -1), keys=["k"])
    writer.finish()
    read = LatentCache(tmp_path).read(np.array([0])).flatten()
    assert read.tolist() == kept
    assert torch.signbit(read[3])


def test_no_labels_and_no_texts(tmp_path):
    writer = LatentCacheWriter(tmp_path, with_(count=2), shard_size=2)
    writer.write(0, ALL[:2], keys=["a", "b"])
    writer.finish()
    cache = LatentCache(tmp_path)
    assert cache.labels(np.array([1, 0])).tolist() == [-1, -1]
    assert cache.texts(np.array([1])) == [None]


def test_broken_images_are_never_read_nor_counted(tmp_path):
    broken = {0, 9, 10, *range(16, 24), 42}
    writer = LatentCacheWriter(tmp_path, with_(dtype="float32"), shard_size=SHARD)
    for shard in writer.missing_shards():
        span = writer.positions(shard)
        latents = ALL[span.start : span.stop].clone()
        valid = np.array([p not in broken for p in span])
        latents[~torch.from_numpy(valid)] = torch.nan
        write_shard(writer, shard, latents=latents, valid=valid)
    writer.finish()
    cache = LatentCache(tmp_path)
    kept = [p for p in range(COUNT) if p not in broken]
    assert len(cache) == len(kept)
    assert cache.positions.tolist() == kept
    assert torch.equal(cache.read(np.arange(len(cache))), ALL[kept])
    assert cache.labels(np.arange(len(cache))).tolist() == [p % 7 for p in kept]
    assert cache.keys(np.array([0])) == ["img/1.jpeg"]
    np.testing.assert_allclose(cache.mean.flatten(), ALL[kept].double().mean((0, 2, 3)), rtol=1e-6)


def test_a_pickled_cache_reads_and_carries_no_data(tmp_path):
    build(tmp_path, shard_size=40)
    cache = LatentCache(tmp_path)
    before = len(pickle.dumps(cache))
    first = cache.read(np.arange(COUNT))
    cache.texts(np.arange(COUNT))
    data = pickle.dumps(cache)
    assert len(data) == before
    assert torch.equal(pickle.loads(data).read(np.arange(COUNT)), first)


def test_reading_flips_that_were_not_stored_is_refused(tmp_path):
    build(tmp_path)
    with pytest.raises(DataError, match=r"no flipped images.*latents\.flip=true"):
        LatentCache(tmp_path).read(np.array([0]), np.array([True]))


# --- statistics ---


def stored_float64(dtype: str, flip: bool) -> np.ndarray:
    parts = torch.cat([ALL, FLIPPED]) if flip else ALL
    return (parts.to(torch.bfloat16) if dtype == "bfloat16" else parts).double().numpy()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_are_exact(tmp_path, dtype, flip):
    build(tmp_path, with_(dtype=dtype, flip=flip))
    statistics = json.loads((tmp_path / "index.json").read_text())["statistics"]
    whole = stored_float64(dtype, flip)
    np.testing.assert_allclose(statistics["mean"], whole.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(statistics["variance"], whole.var(axis=(0, 2, 3)), rtol=1e-13)


def test_statistics_keep_a_small_spread_about_a_large_mean(tmp_path):
    # A single pass, or float32 sums, loses all digits here: mean² / variance is 1e10.
    identity = with_(shape=(1, 2, 2), dtype="float32", count=64)
    latents = 1000.0 + 0.01 * torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    writer = LatentCacheWriter(tmp_path, identity, shard_size=8)
    for shard in writer.missing_shards():
        writer.write(shard, latents[shard * 8 : shard * 8 + 8], keys=[str(i) for i in range(8)])
    writer.finish()
    variance = json.loads((tmp_path / "index.json").read_text())["statistics"]["variance"][0]
    assert variance == pytest.approx(latents.double().numpy().var(), rel=1e-10)


@pytest.mark.parametrize("world_size", [2, 3, 6, 9])
def test_any_number_of_ranks_builds_the_same_files(tmp_path, world_size):
    one, many = tmp_path / "one", tmp_path / "many"
    assert build(one, with_(flip=True)) == build(many, with_(flip=True), world_size=world_size)
    assert everything(one) == everything(many)


def test_standardise_and_restore(tmp_path):
    build(tmp_path, with_(dtype="float32"))
    cache = LatentCache(tmp_path)
    latents = cache.read(np.arange(COUNT))
    standard = cache.standardise(latents)
    torch.testing.assert_close(standard.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(cache.restore(standard), latents)


def test_a_constant_channel_is_only_centred(tmp_path, caplog):
    writer = LatentCacheWriter(tmp_path, with_(count=4), shard_size=4)
    latents = ALL[:4].clone()
    latents[:, 1] = 2.5
    writer.write(0, latents, keys=list("abcd"))
    writer.finish()
    assert "channels [1] are constant" in caplog.text
    cache = LatentCache(tmp_path)
    standard = cache.standardise(cache.read(np.arange(4)))
    assert (standard[:, 1] == 0).all()
    assert torch.isfinite(cache.restore(standard)).all()


# --- what may not be stored ---


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.4e38])
def test_latents_that_are_not_finite_are_refused_with_the_key(tmp_path, bad):
    writer = LatentCacheWriter(tmp_path, IDENTITY, shard_size=SHARD)
    latents = ALL[SHARD : 2 * SHARD].clone()
    latents[3, 1, 2, 2] = bad  # 3.4e38 is finite in float32 and rounds to infinity in bfloat16
    with pytest.raises(DataError, match=r"'img/11\.jpeg' \(position 11\)"):
        write_shard(writer, 1, latents=latents)
    assert 1 in writer.missing_shards()
    assert not list(tmp_path.glob("shard-*"))


def test_only_broken_images(tmp_path):
    writer = LatentCacheWriter(tmp_path, with_(count=2), shard_size=2)
    writer.write(0, ALL[:2], keys=["a", "b"], valid=np.array([False, False]))
    with pytest.raises(DataError, match="None of the 2 images could be read"):
        writer.finish()


def test_a_full_disk_is_a_sentence_and_the_next_run_goes_on(tmp_path, monkeypatch):
    writer = LatentCacheWriter(tmp_path, IDENTITY, shard_size=SHARD)
    write_shard(writer, 0)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_atomically", full)
        with pytest.raises(DataError, match=r"No space left on device.*shards that are done stay"):
            write_shard(writer, 1)
    assert writer.missing_shards() == [1, 2, 3, 4, 5]


# --- identity ---


DIFFERENT = {
    "tokenizer": "tok-b", "data": "data-b", "height": 32, "width": 32, "crop": "random", "flip": True,
    "dtype": "float32", "store": "posterior", "shape": (3, 5, 4), "count": COUNT + 1,
}  # fmt: skip


@pytest.mark.parametrize("field", DIFFERENT)
def test_another_identity_is_refused_naming_both(tmp_path, field):
    build(tmp_path)
    other = with_(**{field: DIFFERENT[field]})
    both = re.escape(f"{field} {getattr(IDENTITY, field)!r} where {DIFFERENT[field]!r} is asked for")
    both += ".*delete that folder and encode again"
    before = everything(tmp_path)
    with pytest.raises(DataError, match=both):
        LatentCache(tmp_path, other)
    with pytest.raises(DataError, match=both):
        LatentCacheWriter(tmp_path, other, shard_size=SHARD)
    assert everything(tmp_path) == before
    assert len(LatentCache(tmp_path, IDENTITY)) == COUNT


def test_every_field_of_the_identity_is_covered_and_survives_json():
    assert set(DIFFERENT) == {field.name for field in attrs.fields(CacheIdentity)}
    assert CacheIdentity.from_json(json.loads(json.dumps(IDENTITY.to_json()))) == IDENTITY


def test_a_partial_build_of_another_tokenizer_is_not_continued(tmp_path):
    write_shard(LatentCacheWriter(tmp_path, IDENTITY, shard_size=SHARD), 0)
    with pytest.raises(DataError, match="tokenizer 'tok-a' where 'tok-b'"):
        LatentCacheWriter(tmp_path, with_(tokenizer="tok-b"), shard_size=SHARD)
    # Even when somebody deletes the plan, the shards know what they are from.
    (tmp_path / "build.json").unlink()
    assert 0 in LatentCacheWriter(tmp_path, with_(tokenizer="tok-b"), shard_size=SHARD).missing_shards()


def test_another_shard_size_is_refused(tmp_path):
    write_shard(LatentCacheWriter(tmp_path, IDENTITY, shard_size=SHARD), 0)
    with pytest.raises(DataError, match=r"8 samples per shard where 16.*latents\.shard=8, or --shard 8"):
        LatentCacheWriter(tmp_path, IDENTITY, shard_size=16)


# --- damage ---


def test_no_cache_and_an_unfinished_one(tmp_path):
    with pytest.raises(DataError, match="There is no latent cache"):
        LatentCache(tmp_path / "nowhere")
    writer = LatentCacheWriter(tmp_path, IDENTITY, shard_size=SHARD)
    write_shard(writer, 0)
    write_shard(writer, 4)
    with pytest.raises(DataError, match=r"unfinished: 2 of 6 shards"):
        LatentCache(tmp_path)
    with pytest.raises(DataError, match=r"lacks 4 of 6 shards, the first is 1"):
        writer.finish()


@pytest.mark.parametrize("name", ["shard-00002.npy", "shard-00002.arrow", "shard-00002.flipped.npy"])
@pytest.mark.parametrize("how", ["missing", "half", "empty", "flipped bit"])
def test_a_damaged_file_is_named_and_its_shard_made_anew(tmp_path, name, how):
    identity = with_(flip=True)
    whole = build(tmp_path, identity)
    path = tmp_path / name
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "flipped bit":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    else:
        path.write_bytes(data[: len(data) // 2 if how == "half" else 0])
    with pytest.raises(DataError, match=rf"'{name}' of .* (is missing|has \d+ of \d+ bytes)|'{name}' is not what"):
        check_cache(tmp_path)
    path.unlink(missing_ok=True)  # what the message says to do
    (tmp_path / "index.json").unlink()
    writer = LatentCacheWriter(tmp_path, identity, shard_size=SHARD)
    assert writer.missing_shards() == [2]
    write_shard(writer, 2)
    assert writer.finish() == whole


def test_a_file_that_vanishes_after_opening(tmp_path):
    build(tmp_path)
    cache = LatentCache(tmp_path)
    (tmp_path / "shard-00000.npy").unlink()
    (tmp_path / "shard-00000.arrow").unlink()
    with pytest.raises(DataError, match=r"'shard-00000\.npy' .* is missing"):
        cache.read(np.array([0]))
    with pytest.raises(DataError, match=r"'shard-00000\.arrow' .* is missing"):
        cache.labels(np.array([0]))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 2, "identity": {}}'])
def test_a_damaged_index(tmp_path, text):
    build(tmp_path)
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DataError, match=r"index.*damaged"):
        LatentCache(tmp_path)


@pytest.mark.parametrize("version", [1, 3])
def test_an_index_of_another_version(tmp_path, version):
    build(tmp_path)
    path = tmp_path / "index.json"
    path.write_text(path.read_text().replace('"format": 2', f'"format": {version}'))
    with pytest.raises(DataError, match=f"format {version}.*reads 2; delete the folder"):
        LatentCache(tmp_path)


def test_rewriting_a_shard_takes_the_index_away_first(tmp_path):
    build(tmp_path)
    writer = LatentCacheWriter(tmp_path, IDENTITY, shard_size=SHARD)
    assert writer.missing_shards() == []
    write_shard(writer, 1)
    with pytest.raises(DataError, match="unfinished: 6 of 6 shards"):
        LatentCache(tmp_path)
    writer.finish()
    check_cache(tmp_path)


def test_rewriting_a_shard_takes_its_mark_away_first(tmp_path, monkeypatch):
    build(tmp_path)
    path = tmp_path / "shard-00002.npy"
    path.write_bytes(path.read_bytes()[:50])
    writer = LatentCacheWriter(tmp_path, IDENTITY, shard_size=SHARD)
    write = module.write_atomically

    def crash_at_the_table(path: Path, data) -> None:
        if path.suffix == ".arrow":
            raise KeyboardInterrupt
        write(path, data)

    # The new latents have the old size and other values: with the old mark they would pass for done.
    monkeypatch.setattr(module, "write_atomically", crash_at_the_table)
    with pytest.raises(KeyboardInterrupt):
        write_shard(writer, 2, latents=FLIPPED[16:24])
    assert writer.missing_shards() == [2]


# --- kills: the processes are forked from a server that has imported torch, so that a trial is short ---


def _build_and_die(folder: str, rank: int, world_size: int, die_at: int) -> None:
    """Build, and kill the own process at the `die_at`-th rename; the pauses give an outer kill time to hit."""
    renames = 0
    rename = Path.replace

    def replace(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.002)
        return rename(self, target)

    Path.replace = replace
    writer = LatentCacheWriter(Path(folder), with_(flip=True), shard_size=SHARD, rank=rank, world_size=world_size)
    for shard in writer.missing_shards():
        write_shard(writer, shard)
    if world_size == 1:
        writer.finish()


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["underpaint.data.latent_writer"])
    return context


def started(server, *arguments):
    process = server.Process(target=_build_and_die, args=arguments)
    process.start()
    return process


@pytest.mark.slow
def test_killed_at_every_rename_then_continued(server, tmp_path):
    whole = build(tmp_path / "whole", with_(flip=True))
    renames = 1 + 6 * 4 + 2  # the plan; latents, flipped, table and mark of six shards; the statistics; the index
    for die_at in range(1, renames + 1):
        folder = tmp_path / f"killed-{die_at}"
        process = started(server, str(folder), 0, 1, die_at)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (folder / "index.json").exists()
        writer = LatentCacheWriter(folder, with_(flip=True), shard_size=SHARD)
        assert len(writer.missing_shards()) == 6 - min(6, max(0, die_at - 2) // 4)
        assert build(folder, with_(flip=True)) == whole
        assert everything(folder) == everything(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_random_moments_until_it_is_done(server, tmp_path):
    whole = build(tmp_path / "whole", with_(flip=True))
    folder = tmp_path / "killed"
    moments = random.Random(5)
    kills = 0
    for trial in range(60):
        process = started(server, str(folder), 0, 1, 0)
        process.join(moments.uniform(0.0, 0.01 * (trial + 1)))
        process.kill()
        process.join()
        kills += process.exitcode != 0
        if (folder / "index.json").exists():
            break
    assert kills > 0
    assert build(folder, with_(flip=True)) == whole
    check_cache(folder)


@pytest.mark.slow
def test_two_builders_at_once_leave_no_gap_and_no_duplicate(server, tmp_path):
    whole = build(tmp_path / "whole", with_(flip=True))
    folder = tmp_path / "two"
    builders = [started(server, str(folder), rank, 2, 0) for rank in range(2)]
    for builder in builders:
        builder.join()
        assert builder.exitcode == 0
    assert LatentCacheWriter(folder, with_(flip=True), shard_size=SHARD).finish() == whole
    assert everything(folder) == everything(tmp_path / "whole")

"""Encoding a data set into a cache: what is stored, what it is standardised with, and builds cut short."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.run.conftest import tiny_recipe
from underpaint import Posterior
from underpaint.config.data import LatentsConfig
from underpaint.data.latent_check import check_cache
from underpaint.data.latents import LatentCache
from underpaint.data.transforms import to_tensor
from underpaint.errors import ConfigError, DataError
from underpaint.models.tokenizer import Tokenizer
from underpaint.run.data import RunData, build_cache, cache_statistics, open_run_data
from underpaint.training.ranks import Ranks


class Pooling:
    """A tokenizer without weights: pooled pixels, with a variance that follows them."""

    latent_channels = 3

    def __init__(self, point: bool = False, calls: int | None = None) -> None:
        self.point = point
        self.calls = calls
        self.images = 0

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 8, width // 8

    def fingerprint(self) -> str:
        return "pooling"

    def posterior(self, images: Tensor) -> Posterior:
        if self.calls is not None:
            if self.calls == 0:
                raise KeyboardInterrupt
            self.calls -= 1
        self.images += len(images)
        mean = torch.nn.functional.avg_pool2d(images, 8)
        return Posterior(mean, None if self.point else 2.0 * mean - 1.0)


class Part:
    """One of several ranks that encode one after another in this process; the last waits for nobody."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.is_main = rank == 0

    def barrier(self) -> None:
        pass


@pytest.fixture(scope="module")
def data() -> RunData:
    return open_run_data(tiny_recipe().data)


def encode(folder: Path, data: RunData, tokenizer: Pooling | None = None, part: Any = None, **options: Any) -> Any:
    config = LatentsConfig(**{"shard": 10, "batch": 4, "dtype": "float32", **options})
    with Ranks("cpu") as ranks:
        return build_cache(folder, cast("Tokenizer", tokenizer or Pooling()), data, config, part or ranks)


def posteriors(data: RunData) -> Posterior:
    crop = data.plain_crop()
    images = [crop(data.train[int(i)].image, 0) for i in data.train_indices]
    return Pooling().posterior(to_tensor(torch.from_numpy(np.stack(images))))


def test_the_posterior_is_stored_as_it_is(tmp_path: Path, data: RunData) -> None:
    cache = encode(tmp_path, data, store="posterior")
    stored = torch.from_numpy(np.concatenate([np.load(tmp_path / f"shard-0000{k}.npy") for k in range(4)]))
    expected = posteriors(data)
    assert expected.logvar is not None
    torch.testing.assert_close(stored, torch.cat([expected.mean, expected.logvar], 1))
    variance = expected.mean.double().var(0, correction=0) + expected.logvar.double().exp().mean(0)
    torch.testing.assert_close(np.load(tmp_path / "statistics.npy")[1], variance.numpy())
    assert cache.identity.shape == (3, 4, 4)


def test_a_sample_is_a_draw_of_its_own_for_each_image_and_its_mirror_image(tmp_path: Path, data: RunData) -> None:
    cache = encode(tmp_path, data, store="sample", flip=True)
    everything = np.arange(len(cache))
    expected = posteriors(data)
    assert expected.logvar is not None
    std = (expected.logvar / 2).exp()
    noise = (cache.read(everything) - expected.mean) / std
    mirrored = (cache.read(everything, np.ones(len(cache), dtype=bool)) - expected.mean.flip(-1)) / std.flip(-1)
    # 1,536 normal draws each: five standard errors of mean, spread and correlation.
    for one in (noise, mirrored):
        assert abs(one.mean()) < 5 / 1536**0.5
        assert abs(one.std() - 1) < 5 / (2 * 1536) ** 0.5
    for other in (mirrored, mirrored.flip(-1), noise.roll(1, 0)):
        assert abs((noise * other).mean()) < 5 / 1536**0.5


@pytest.mark.parametrize("store", ["mode", "posterior", "sample"])
def test_ranks_and_batches_make_no_difference(tmp_path: Path, data: RunData, store: str) -> None:
    one = encode(tmp_path / "one", data, store=store, flip=True)
    for rank in (2, 1):  # they find no cache to open, for the main rank finishes it
        with pytest.raises(DataError, match="unfinished"):
            encode(tmp_path / "many", data, part=Part(rank, 3), store=store, flip=True, batch=7)
    many = encode(tmp_path / "many", data, part=Part(0, 3), store=store, flip=True, batch=7)
    assert many.fingerprint == one.fingerprint
    assert (tmp_path / "one/statistics.npy").read_bytes() == (tmp_path / "many/statistics.npy").read_bytes()


@pytest.mark.parametrize("store", ["posterior", "sample"])
def test_a_point_has_no_posterior_to_store(tmp_path: Path, data: RunData, store: str) -> None:
    with pytest.raises(ConfigError, match=f"latents.store is '{store}'.*points.*latents.store=mode"):
        encode(tmp_path, data, Pooling(point=True), store=store)
    encode(tmp_path / "mode", data, Pooling(point=True))


@pytest.mark.parametrize("statistics", ["channel", "position"])
def test_a_tokenizer_standardises_as_the_cache_did(tmp_path: Path, data: RunData, statistics: str) -> None:
    cache = encode(tmp_path, data, statistics=statistics)
    kept = cache_statistics(cache)
    assert kept.grid == ((4, 4) if statistics == "position" else None)
    latents = cache.read(np.arange(len(cache)))
    mean, std = kept.tensors(latents)
    torch.testing.assert_close((latents - mean) / std, cache.standardise(latents))
    dims = 0 if statistics == "position" else (0, 2, 3)
    torch.testing.assert_close(((latents - mean) / std).var(dims, correction=0), torch.ones(std.numel()).view(
        (3, 4, 4) if statistics == "position" else (3,)))  # fmt: skip


def test_other_statistics_need_no_other_cache(tmp_path: Path, data: RunData) -> None:
    encode(tmp_path, data)
    tokenizer = Pooling()
    assert encode(tmp_path, data, tokenizer, statistics="position").mean.shape == (3, 4, 4)
    assert tokenizer.images == 0


@pytest.mark.parametrize("store", ["mode", "sample"])
@pytest.mark.parametrize("calls", [0, 1, 3, 5, 7])
def test_a_build_cut_short_encodes_only_the_shards_that_are_missing(
    tmp_path: Path, data: RunData, store: str, calls: int
) -> None:
    whole = encode(tmp_path / "whole", data, store=store)
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "cut", data, Pooling(calls=calls), store=store)
    with pytest.raises(DataError, match="unfinished"):
        LatentCache(tmp_path / "cut")
    done = len(list((tmp_path / "cut").glob("shard-*.json")))
    # A shard of 10 is written once the image after it is there, in batches of 4.
    assert done == sum(calls * 4 > 10 * (shard + 1) for shard in range(4))
    tokenizer = Pooling()
    again = encode(tmp_path / "cut", data, tokenizer, store=store)
    assert tokenizer.images == len(data.train_indices) - 10 * done
    assert again.fingerprint == whole.fingerprint
    check_cache(tmp_path / "cut", attrs.evolve(whole.identity))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: Path, data: RunData, message: str, rebuild: bool) -> None:
    before = files(folder)
    with pytest.raises(ConfigError, match=message), Ranks("cpu") as ranks:
        config = LatentsConfig(shard=10, batch=4, dtype="float32")
        build_cache(folder, cast("Tokenizer", Pooling()), data, config, ranks, rebuild=rebuild)
    assert files(folder) == before


@pytest.mark.parametrize("rebuild", [True, False])
@pytest.mark.parametrize("with_cache", [True, False])
def test_what_is_no_cache_is_left_alone(tmp_path: Path, data: RunData, rebuild: bool, with_cache: bool) -> None:
    if with_cache:
        encode(tmp_path, data)
        if not rebuild:
            (tmp_path / "index.json").unlink()  # or the cache that is there would only be read
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"mine")
    refused(tmp_path, data, "holds 'photos', which is no part of a latent cache; choose another folder", rebuild)
    (tmp_path / "photos").rename(tmp_path / "shard-00000.tar")
    refused(tmp_path, data, "holds 'shard-00000.tar'", rebuild)


@pytest.mark.parametrize("name", ["index.json", "shard-00000.npy", "statistics.npy"])
def test_files_named_like_a_caches_are_not_deleted(tmp_path: Path, data: RunData, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    refused(tmp_path, data, f"holds '{name}' and no latent cache", True)


def test_a_finished_cache_of_other_shards_is_refused(tmp_path: Path, data: RunData) -> None:
    encode(tmp_path, data)
    config = LatentsConfig(shard=20, batch=4, dtype="float32")
    with pytest.raises(DataError, match="10 samples per shard where 20.*--shard 10"), Ranks("cpu") as ranks:
        build_cache(tmp_path, cast("Tokenizer", Pooling()), data, config, ranks)


def test_a_rebuild_deletes_the_cache_and_nothing_hidden(tmp_path: Path, data: RunData) -> None:
    folder = tmp_path / "cache"
    before = encode(folder, data, flip=True).identity
    (folder / ".nfs1").write_bytes(b"of the system")
    assert before.flip
    (folder / "build.json").write_text((folder / "build.json").read_text()[:-40])
    with Ranks("cpu") as ranks:
        config = LatentsConfig(shard=20, batch=4, dtype="float32")
        cache = build_cache(folder, cast("Tokenizer", Pooling()), data, config, ranks, rebuild=True)
    assert not cache.identity.flip
    assert not list(folder.glob("*.flipped.npy"))
    assert (folder / ".nfs1").read_bytes() == b"of the system"
    # A first build in a place that does not exist, and one where a file is.
    encode(tmp_path / "new", data)
    (tmp_path / "taken").write_bytes(b"mine")
    refused(tmp_path / "taken", data, "is a file; a latent cache is a folder", True)
    assert (tmp_path / "taken").read_bytes() == b"mine"

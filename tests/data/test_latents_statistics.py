"""The latent cache: statistics of each position, and stored posteriors with their draws."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tests.data.test_latents import (
    ALL,
    COUNT,
    FLIPPED,
    IDENTITY,
    SHAPE,
    SHARD,
    build,
    stored_float64,
    values,
    with_,
    write_shard,
)  # fmt: skip

from underpaint.data.latent_check import check_cache
from underpaint.data.latent_writer import LatentCacheWriter
from underpaint.data.latents import LatentCache, draw_latents
from underpaint.errors import DataError

LOGVARS = 2.0 * torch.randn(COUNT, *SHAPE, generator=torch.Generator().manual_seed(9)) - 1.0


# --- statistics of each position ---


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_of_each_position_are_exact(tmp_path, dtype, flip):
    build(tmp_path, with_(dtype=dtype, flip=flip))
    mean, variance = np.load(tmp_path / "statistics.npy")
    whole = stored_float64(dtype, flip)
    np.testing.assert_allclose(mean, whole.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(variance, whole.var(axis=0), rtol=1e-13)


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_any_number_of_ranks_gives_the_same_statistics(tmp_path, world_size):
    build(tmp_path / "one")
    build(tmp_path / "many", world_size=world_size)
    one, many = (tmp_path / name / "statistics.npy" for name in ("one", "many"))
    assert one.read_bytes() == many.read_bytes()


def test_both_keep_a_small_spread_about_large_means(tmp_path):
    # Means of positions far apart: the channel's variance is almost only that between positions.
    identity = with_(shape=(1, 1, 2), dtype="float32", count=64)
    noise = 0.01 * torch.randn(64, 1, 1, 2, generator=torch.Generator().manual_seed(3))
    latents = torch.tensor([1000.0, -500.0]) + noise
    writer = LatentCacheWriter(tmp_path, identity, shard_size=64)
    writer.write(0, latents, keys=[str(i) for i in range(64)])
    writer.finish()
    exact = latents.double().numpy()
    np.testing.assert_allclose(np.load(tmp_path / "statistics.npy")[1], exact.var(axis=0), rtol=1e-10)
    statistics = json.loads((tmp_path / "index.json").read_text())["statistics"]
    assert statistics["variance"] == pytest.approx([exact.var()], rel=1e-12)


def test_broken_images_do_not_count(tmp_path):
    writer = LatentCacheWriter(tmp_path, with_(dtype="float32"), shard_size=SHARD)
    for shard in writer.missing_shards():
        write_shard(writer, shard, valid=np.array([p % 5 != 0 for p in writer.positions(shard)]))
    writer.finish()
    kept = ALL[[p for p in range(COUNT) if p % 5]].double().numpy()
    np.testing.assert_allclose(np.load(tmp_path / "statistics.npy")[1], kept.var(axis=0), rtol=1e-13)


def test_standardise_and_restore_each_position(tmp_path):
    build(tmp_path, with_(dtype="float32"))
    cache = LatentCache(tmp_path, statistics="position")
    latents = cache.read(np.arange(COUNT))
    standard = cache.standardise(latents)
    torch.testing.assert_close(standard.mean(0), torch.zeros(SHAPE), atol=2e-5, rtol=0)
    torch.testing.assert_close(standard.std(0, correction=0), torch.ones(SHAPE), atol=2e-5, rtol=0)
    torch.testing.assert_close(cache.restore(standard), latents)
    assert not torch.allclose(standard, LatentCache(tmp_path).standardise(latents), atol=1e-2)


def test_a_constant_position_is_only_centred(tmp_path):
    writer = LatentCacheWriter(tmp_path, with_(count=4), shard_size=4)
    latents = ALL[:4].clone()
    latents[:, 1, 2, 3] = 2.5
    writer.write(0, latents, keys=list("abcd"))
    writer.finish()
    cache = LatentCache(tmp_path, statistics="position")
    standard = cache.standardise(cache.read(np.arange(4)))
    assert (standard[:, 1, 2, 3] == 0).all()
    assert torch.isfinite(standard).all()


# --- stored posteriors ---


def build_posterior(folder, *, dtype="float32", flip=False, logvars=LOGVARS):
    identity = with_(store="posterior", dtype=dtype, flip=flip)
    writer = LatentCacheWriter(folder, identity, shard_size=SHARD)
    for shard in writer.missing_shards():
        span = writer.positions(shard)
        rows = slice(span.start, span.stop)
        both = torch.cat([ALL, logvars], dim=1)[rows]
        mirrored = torch.cat([FLIPPED, logvars], dim=1)[rows] if flip else None
        write_shard(writer, shard, latents=both, flipped=mirrored)
    writer.finish()
    return LatentCache(folder, statistics="position")


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_of_posteriors_are_those_of_their_draws(tmp_path, dtype, flip):
    build_posterior(tmp_path, dtype=dtype, flip=flip)
    means = stored_float64(dtype, flip)
    logvars = (LOGVARS.to(torch.bfloat16) if dtype == "bfloat16" else LOGVARS).double().numpy()
    logvars = np.concatenate([logvars, logvars]) if flip else logvars
    mean, variance = np.load(tmp_path / "statistics.npy")
    np.testing.assert_allclose(mean, means.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(variance, means.var(axis=0) + np.exp(logvars).mean(axis=0), rtol=1e-13)
    # A channel: E z² − (E z)² over samples and positions.
    second = (np.square(means) + np.exp(logvars)).mean(axis=(0, 2, 3))
    statistics = json.loads((tmp_path / "index.json").read_text())["statistics"]
    np.testing.assert_allclose(statistics["variance"], second - means.mean(axis=(0, 2, 3)) ** 2, rtol=1e-11)
    check_cache(tmp_path)


def test_draws_have_the_statistics_that_are_promised(tmp_path):
    cache = build_posterior(tmp_path)
    indices = np.tile(np.arange(COUNT), 400)
    draws = cache.read(indices, seeds=range(len(indices))).double()
    spread = draws.std(0, correction=0)
    # Five standard errors of a mean over 17,200 draws, and 6 % for a spread whose tails are heavy.
    assert ((draws.mean(0) - cache.mean).abs() < 5 * spread / len(indices) ** 0.5).all()
    torch.testing.assert_close(spread.float(), cache.std, rtol=0.06, atol=0)


def test_a_draw_depends_on_its_seed_alone(tmp_path):
    cache = build_posterior(tmp_path, flip=True)
    indices, seeds = np.array([4, 40, 4, 17, 4]), [3, 2**64 - 1, 3, 8, 9]
    flip = np.array([False, True, False, True, False])
    whole = cache.read(indices, flip, seeds)
    for row in range(5):  # as if every row were read by a rank of its own
        assert torch.equal(cache.read(indices[[row]], flip[[row]], [seeds[row]])[0], whole[row])
    assert torch.equal(whole[0], whole[2])
    assert not torch.equal(whole[0], whole[4])
    # By hand from the definition, with the noise that torch gives for the seed.
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(whole[3], FLIPPED[17] + (LOGVARS[17] / 2).exp() * noise)


def test_draws_need_seeds_and_other_caches_ignore_them(tmp_path):
    cache = build_posterior(tmp_path / "posterior")
    with pytest.raises(AssertionError, match="seed for each row"):
        cache.read(np.arange(3))
    build(tmp_path / "mode")
    mode = LatentCache(tmp_path / "mode")
    assert torch.equal(mode.read(np.arange(3), seeds=[1, 2, 3]), mode.read(np.arange(3)))


def test_a_draw_without_variance_is_the_mean():
    mean = values(2)
    assert torch.equal(draw_latents(mean, torch.full_like(mean, -torch.inf), [1, 2]), mean)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 200.0])
def test_a_variance_that_is_not_finite_is_refused(tmp_path, bad):
    logvars = LOGVARS.clone()
    logvars[9, 0, 1, 1] = bad  # exp(200) is infinite in float32
    with pytest.raises(DataError, match=r"'img/9\.jpeg' \(position 9\) is not finite"):
        build_posterior(tmp_path, logvars=logvars)


def test_stored_sizes():
    assert IDENTITY.stored_shape == SHAPE
    assert with_(store="sample").stored_shape == SHAPE
    assert with_(store="posterior").stored_shape == (2 * SHAPE[0], *SHAPE[1:])

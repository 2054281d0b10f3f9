"""Checks latent caches: hashes, values that are not finite, and the statistics computed anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from underpaint.data.latent_writer import finite, measure, per_channel
from underpaint.data.latents import (
    CacheIdentity,
    LatentCache,
    content_hash,
    file_names,
    open_array,
    read_json,
    read_statistics,
    to_float32,
)
from underpaint.errors import DataError
from underpaint.weights import file_hash

__all__ = ["check_cache"]

_CHUNK = 256
# Statistics may differ in their last digits between versions of NumPy.
_TOLERANCE = 1e-9


def check_cache(folder: Path | str, expect: CacheIdentity | None = None) -> LatentCache:
    """Open a cache, read all of it, and compare it with what was promised when it was written.

    Args:
        folder: Folder of the cache.
        expect: What the cache must have been made from; None accepts any.

    Returns:
        The cache.

    Raises:
        DataError: The cache cannot be opened, a file differs from its hash, a latent is not finite, or the statistics
            are not those of the latents. The sentence names what is wrong and how to mend it.
    """
    cache = LatentCache(folder, expect)
    differing = [name for name, file in cache.files.items() if file_hash(cache.folder / name) != file["sha256"]]
    if differing:
        verb = "is" if len(differing) == 1 else "are"
        raise _damaged(cache, f"{_listed(differing)} {verb} not what was written", differing)
    if content_hash(cache.records) != cache.fingerprint:
        raise _damaged(cache, "the hash in 'index.json' is not that of the shards", [])
    infinite = list(_not_finite(cache))
    if infinite:
        names = sorted({name for name, _ in infinite})
        verb = "holds" if len(names) == 1 else "hold"
        what = f"{_listed(names)} {verb} latents that are not finite, the first is that of image {infinite[0][1]}"
        raise _damaged(cache, what, names)
    computed = measure(cache.folder, cache.identity, cache.records)
    if not _close(read_statistics(cache.folder, cache.identity), computed):
        raise _damaged(cache, "the statistics of each position are not those of the latents", [])
    kept = read_json(cache.folder / "index.json")["statistics"]
    if not _close(np.array([kept["mean"], kept["variance"]]), per_channel(computed)):
        raise _damaged(cache, "the statistics of each channel are not those of the latents", [])
    return cache


def _not_finite(cache: LatentCache) -> Iterator[tuple[str, int]]:
    """Yield file and position in the data set of latents that are not finite; broken images are stored as zeros."""
    for shard, record in enumerate(cache.records):
        for name in file_names(shard, cache.identity.flip)[:-1]:
            array = open_array(cache.folder / name, cache.identity, record["count"])
            for start in range(0, len(array), _CHUNK):
                values = to_float32(np.array(array[start : start + _CHUNK]), cache.identity)
                for row in np.flatnonzero(~finite(values, cache.identity)).tolist():
                    yield name, record["start"] + start + row


def _close(kept: NDArray[np.float64], computed: NDArray[np.float64]) -> bool:
    """Compare means in units of the spread, or of themselves where there is none, and variances with each other."""
    scale = np.sqrt(computed[1]) + np.abs(computed[0])
    means = np.abs(kept[0] - computed[0]) <= _TOLERANCE * scale
    return bool(means.all() and np.allclose(kept[1], computed[1], rtol=_TOLERANCE, atol=0.0))


def _listed(names: Sequence[str]) -> str:
    # All of them, however many: they have to be deleted.
    *first, last = [f"'{name}'" for name in names]
    return f"{', '.join(first)} and {last}" if first else last


def _damaged(cache: LatentCache, what: str, files: Sequence[str]) -> DataError:
    these = "'index.json'"
    if files:
        these = f"{'that file' if len(files) == 1 else 'these files'} and {these}"
    return DataError(
        f"The latent cache '{cache.folder}' is damaged: {what}; delete {these} and run the same command without "
        "--check: only what is missing is made anew."
    )

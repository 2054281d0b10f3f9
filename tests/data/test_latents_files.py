"""How the latent cache opens its files: read ahead in pieces, and never too many at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.test_latents import SHARD, build, with_

from underpaint.data.latent_writer import LatentCacheWriter
from underpaint.data.latents import LatentCache
from underpaint.errors import DataError


def test_prefetching_covers_the_bytes_that_are_read(tmp_path, monkeypatch):
    build(tmp_path, with_(flip=True))
    cache = LatentCache(tmp_path)
    asked: dict[str, list[tuple[int, int]]] = {}
    opened: dict[int, str] = {}
    plain = os.open

    def opening(path, flags):
        file = plain(path, flags)
        opened[file] = Path(path).name
        return file

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda file, start, count, how: asked.setdefault(opened[file], []).append((start, count))
    )
    for span in (range(SHARD - 1, SHARD + 1), range(len(cache) - 2, len(cache)), range(len(cache)), range(0)):
        asked.clear()
        cache.prefetch(span)
        assert bool(asked) == bool(len(span))
        for index in span:
            shard, row = divmod(int(cache.positions[index]), SHARD)
            for name in (f"shard-{shard:05d}.npy", f"shard-{shard:05d}.flipped.npy"):
                # The last bytes of the file are the rows; what comes before them is the header.
                size = (tmp_path / name).stat().st_size
                width = (size - 128) // cache.records[shard]["count"]
                ((start, count),) = asked[name]
                assert start <= 128 + row * width
                assert 128 + (row + 1) * width <= start + count <= size
            assert asked[f"shard-{shard:05d}.arrow"] == [(0, 0)]


def test_prefetching_a_file_that_has_gone_is_no_error(tmp_path):
    build(tmp_path)
    cache = LatentCache(tmp_path)
    (tmp_path / "shard-00000.npy").unlink()
    cache.prefetch(range(len(cache)))
    with pytest.raises(DataError, match="is missing"):
        cache.read(np.arange(1))


def test_few_files_stay_open(tmp_path):
    build(tmp_path, shard_size=1)
    cache = LatentCache(tmp_path)
    every = np.arange(len(cache))
    expected = cache.read(every), cache.labels(every), cache.keys(every)
    limited = LatentCache(tmp_path)
    limited._open_files = 3
    assert torch.equal(limited.read(every), expected[0])
    assert torch.equal(limited.labels(every), expected[1])
    assert limited.keys(every) == expected[2]
    assert len(limited._arrays) == len(limited._tables) == 3
    assert len(cache._arrays) == len(every) > 3


MANY_FILES = """
import resource, sys
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
from underpaint.data.latents import LatentCache
cache = LatentCache(sys.argv[1])
every = np.arange(len(cache))
print(float(cache.read(every).sum()), int(cache.labels(every).sum()))
"""


def test_more_files_than_a_process_may_open(tmp_path):
    identity = with_(count=240, shape=(1, 1, 1))
    writer = LatentCacheWriter(tmp_path, identity, shard_size=1)
    for shard in writer.missing_shards():
        writer.write(shard, torch.full((1, 1, 1, 1), float(shard % 3)), keys=[str(shard)], labels=[shard % 5])
    writer.finish()
    done = subprocess.run(
        [sys.executable, "-c", MANY_FILES, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["240.0", "480"]

"""Writes latent caches: shards from any number of processes, and the exact statistics of all of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from underpaint.config.recipe import write_atomically
from underpaint.data.latents import (
    FORMAT,
    STATISTICS,
    CacheIdentity,
    content_hash,
    file_names,
    open_array,
    read_json,
    read_plan,
    require_same,
    require_shards,
    shard_count,
    to_float32,
)
from underpaint.errors import ConfigError, DataError

__all__ = ["LatentCacheWriter", "clear_cache", "finite", "measure", "per_channel"]

_SCHEMA = pa.schema([("key", pa.string()), ("label", pa.int64()), ("text", pa.string())])
# Samples per step of the statistics; the float64 copies of 16 common latents stay in the processor's cache.
_CHUNK = 16
_FILES = re.compile(r"(build|index)\.json|statistics\.npy|shard-\d{5,}(\.flipped)?\.(npy|arrow|json)")
_log = logging.getLogger("underpaint")


class LatentCacheWriter:
    """Builds a cache; every rank has one, and the ranks write disjoint shards.

    Args:
        folder: Folder of the cache; made if it does not exist.
        identity: What is being built.
        shard_size: Samples per shard.
        rank: This process; it writes the shards k with k mod `world_size` equal to it.
        world_size: Number of processes. It may differ from that of an interrupted build.

    Raises:
        DataError: The folder holds a cache of something else, or cannot be written.
        ConfigError: The folder holds files that are no part of a cache.
    """

    def __init__(
        self, folder: Path | str, identity: CacheIdentity, *, shard_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        assert shard_size > 0
        assert 0 <= rank < world_size
        self.folder = Path(folder)
        self.identity = identity
        self.shard_size = shard_size
        self._owned = range(rank, shard_count(identity.count, shard_size), world_size)
        self._folder_made()

    def missing_shards(self) -> list[int]:
        """Return the shards that this rank still has to write, in ascending order."""
        return [shard for shard in self._owned if self._record(shard) is None]

    def positions(self, shard: int) -> range:
        """Return the positions in the data set that a shard holds."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.identity.count))

    def write(
        self,
        shard: int,
        latents: Tensor,
        *,
        keys: Sequence[str],
        labels: Sequence[int | None] | None = None,
        texts: Sequence[str | None] | None = None,
        valid: NDArray[np.bool_] | None = None,
        flipped: Tensor | None = None,
    ) -> None:
        """Write and commit one shard; n is ``len(positions(shard))``.

        Args:
            shard: One of `missing_shards`.
            latents: n×d×h×w, floating point, on any device; n×2d×h×w where the identity stores posteriors, the means
                before the log-variances.
            keys: Names of the n samples.
            labels: Class indices; None when there are none.
            texts: Captions; None when there are none.
            valid: n booleans, False for a broken image, whose latent is never read or counted; None for all valid.
            flipped: The same of the flipped images; given exactly when the identity says `flip`.

        Raises:
            DataError: A latent or its variance is not finite, or the disk cannot be written.
        """
        count = len(self.positions(shard))
        assert shard in self._owned, f"shard {shard} belongs to another rank"
        assert len(keys) == count
        assert (flipped is not None) == self.identity.flip
        usable = np.ones(count, dtype=np.bool_) if valid is None else np.asarray(valid, dtype=np.bool_)
        assert usable.shape == (count,)
        table = pa.record_batch(
            [
                pa.array(list(keys), pa.string()),
                pa.array([None] * count if labels is None else list(labels), pa.int64()),
                pa.array([None] * count if texts is None else list(texts), pa.string()),
            ],
            schema=_SCHEMA,
        )
        names = file_names(shard, self.identity.flip)
        parts = [latents] if flipped is None else [latents, flipped]
        files = [_array_bytes(self._stored(shard, part, keys, usable)) for part in parts] + [_table_bytes(table)]
        span = self.positions(shard)
        record = {
            "build": _build_hash(self.identity, self.shard_size),
            "start": span.start,
            "count": len(span),
            "broken": [int(row) for row in np.flatnonzero(~usable)],
            "files": {name: _facts(data) for name, data in zip(names, files, strict=True)},
        }
        mark = self.folder / f"shard-{shard:05d}.json"
        with _disk_errors(self.folder):
            # From here on neither an index nor a mark of an earlier build tells the truth.
            (self.folder / "index.json").unlink(missing_ok=True)
            mark.unlink(missing_ok=True)
            for name, data in zip(names, files, strict=True):
                write_atomically(self.folder / name, data)
            write_atomically(mark, _json(record))

    def finish(self) -> str:
        """Check that every shard is there, compute the statistics and write the index. Rank 0, after a barrier.

        The statistics are those of `measure`, whatever the number of ranks was.

        Returns:
            The hash of the latents.

        Raises:
            DataError: Shards are missing, or no sample is valid.
        """
        records = [self._record(shard) for shard in range(shard_count(self.identity.count, self.shard_size))]
        missing = [shard for shard, record in enumerate(records) if record is None]
        if missing:
            raise DataError(
                f"The latent cache '{self.folder}' lacks {len(missing)} of {len(records)} shards, the first is "
                f"{missing[0]}; encode again to have them."
            )
        complete = [record for record in records if record is not None]
        content = content_hash(complete)
        path = self.folder / "index.json"
        if path.exists() and read_json(path).get("hash") == content:
            return content
        moments = measure(self.folder, self.identity, complete)
        mean, variance = per_channel(moments)
        if (variance == 0.0).any():
            _log.warning(
                "Latent channels %s are constant: the tokenizer makes no use of them.", np.flatnonzero(variance == 0.0)
            )
        data = _array_bytes(moments)
        index = {
            "format": FORMAT,
            "identity": self.identity.to_json(),
            "shard_size": self.shard_size,
            "hash": content,
            "statistics": {"mean": mean.tolist(), "variance": variance.tolist()},
            "files": {STATISTICS: _facts(data)},
            "shards": complete,
        }
        with _disk_errors(self.folder):
            for left in self.folder.glob(".*.tmp"):
                left.unlink()
            write_atomically(self.folder / STATISTICS, data)
            write_atomically(path, _json(index))
        return content

    def _folder_made(self) -> None:
        path = self.folder / "build.json"
        _require_no_others(self.folder)
        with _disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                plan = {"format": FORMAT, "identity": self.identity.to_json(), "shard_size": self.shard_size}
                write_atomically(path, _json(plan))
        identity, shard_size = read_plan(path)
        require_same(self.folder, identity, self.identity)
        require_shards(self.folder, shard_size, self.shard_size)

    def _record(self, shard: int) -> dict[str, Any] | None:
        """Return the commit mark of a shard, or None when the shard is not done."""
        try:
            record: dict[str, Any] = json.loads((self.folder / f"shard-{shard:05d}.json").read_text(encoding="utf-8"))
            found = record["build"], record["start"], record["count"], list(record["files"])
            sizes = all((self.folder / n).stat().st_size == f["size"] for n, f in record["files"].items())
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        span = self.positions(shard)
        build = _build_hash(self.identity, self.shard_size)
        expected = build, span.start, len(span), file_names(shard, self.identity.flip)
        return record if sizes and found == expected else None

    def _stored(self, shard: int, latents: Tensor, keys: Sequence[str], usable: NDArray[np.bool_]) -> NDArray[Any]:
        identity = self.identity
        assert latents.shape == (len(keys), *identity.stored_shape), f"latents are {tuple(latents.shape)}"
        values = latents.detach().cpu()
        if not usable.all():
            values = values.masked_fill(~torch.from_numpy(usable)[:, None, None, None], 0.0)
        values = values.to(torch.bfloat16 if identity.dtype == "bfloat16" else torch.float32).contiguous()
        # After rounding: a large float32 may become infinite in bfloat16.
        bad = np.flatnonzero(~finite(values, identity))
        if len(bad):
            raise DataError(
                f"The latent of sample '{keys[bad[0]]}' (position {self.positions(shard)[bad[0]]}) is not finite, like "
                f"{len(bad)} of {len(keys)} in shard {shard}; the tokenizer has diverged: go back to an earlier "
                "checkpoint of it."
            )
        bits = values.view(torch.int16) if identity.dtype == "bfloat16" else values
        stored: NDArray[Any] = bits.numpy().view(identity.stored_dtype)
        return stored


def _require_no_others(folder: Path) -> None:
    """Refuse a folder that holds more than a cache; hidden files, as systems leave them, do not count.

    Raises:
        ConfigError: It does; the message names the first file that is no part of a cache.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"'{folder}' is a file; a latent cache is a folder, so choose another place.")
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    strange = [path.name for path in visible if path.is_dir() or not _FILES.fullmatch(path.name)]
    if strange:
        raise ConfigError(
            f"'{folder}' holds '{strange[0]}', which is no part of a latent cache; choose another folder."
        )


def clear_cache(folder: Path) -> None:
    """Delete the files of a cache, and nothing else.

    Raises:
        ConfigError: The folder holds something else, or files of these names without a cache's plan or index.
    """
    _require_no_others(folder)
    files = [path for path in folder.glob("*") if _FILES.fullmatch(path.name)]
    heads = [path for path in files if path.name in ("build.json", "index.json")]
    # Even of a damaged one the beginning is there, and says what it was.
    if files and not any(b'"identity"' in path.read_bytes() for path in heads):
        raise ConfigError(f"'{folder}' holds '{files[0].name}' and no latent cache; choose another folder.")
    with _disk_errors(folder):
        for path in [*(path for path in files if path not in heads), *heads]:
            path.unlink(missing_ok=True)


def finite(values: Tensor, identity: CacheIdentity) -> NDArray[np.bool_]:
    """Return for each of n samples whether what is stored of it is finite, the variance of a posterior included."""
    good = torch.isfinite(values).flatten(1).all(1)
    if identity.store == "posterior":
        good &= torch.isfinite(values[:, identity.shape[0] :].float().exp()).flatten(1).all(1)
    return good.numpy()


def measure(folder: Path, identity: CacheIdentity, records: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """Return mean and variance of every latent value over what diffusion trains on.

    That are the stored values of all valid samples and their flipped copies. Of stored posteriors it is a draw z of
    each, whose moments are exact too: E z is the mean of the means, and Var z the variance of the means plus the mean
    of the variances (law of total variance).

    The mean and then the variance about it are summed in float64, sample by sample, in the order of the data set.

    Args:
        folder: Folder of the cache.
        identity: Its identity.
        records: Commit marks of all its shards.

    Returns:
        2×d×h×w float64: mean and variance.

    Raises:
        DataError: No sample is valid, or a file is damaged.
    """
    count = 0
    total, squares, variances = np.zeros((3, *identity.shape))
    for mean, variance in _values(folder, identity, records):
        count += len(mean)
        total += mean.sum(axis=0)
        variances += variance.sum(axis=0)
    if count == 0:
        raise DataError(f"None of the {identity.count} images could be read; check the data set.")
    centre = total / count
    for mean, _ in _values(folder, identity, records):
        squares += np.square(mean - centre).sum(axis=0)
    return np.stack([centre, (squares + variances) / count])


def per_channel(moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return mean and variance of each channel, 2×d, given those of each value, 2×d×h×w, without loss of digits."""
    means, variances = moments
    mean = means.mean(axis=(1, 2))
    # The law of total variance: every position counts as many samples.
    return np.stack([mean, (variances + np.square(means - mean[:, None, None])).mean(axis=(1, 2))])


def _values(
    folder: Path, identity: CacheIdentity, records: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Yield stored latents of the valid samples, n×d×h×w, with their variances, in a fixed order."""
    channels = identity.shape[0]
    for shard, record in enumerate(records):
        usable = np.ones(record["count"], dtype=np.bool_)
        usable[record["broken"]] = False
        for name in file_names(shard, identity.flip)[:-1]:
            array = open_array(folder / name, identity, record["count"])
            for start in range(0, len(array), _CHUNK):
                chunk = array[start : start + _CHUNK][usable[start : start + _CHUNK]]
                values = to_float32(chunk, identity).double().numpy()
                mean, logvar = values[:, :channels], values[:, channels:]
                yield mean, np.exp(logvar) if identity.store == "posterior" else np.zeros((0, *identity.shape))


def _build_hash(identity: CacheIdentity, shard_size: int) -> str:
    return hashlib.sha256(json.dumps([identity.to_json(), shard_size]).encode()).hexdigest()


def _facts(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _array_bytes(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _table_bytes(batch: Any) -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, _SCHEMA) as writer:
        writer.write_batch(batch)
    return buffer.getvalue()


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"The latent cache '{folder}' cannot be written ({error.strerror or error}); mend that and run the same "
            "command again: the shards that are done stay."
        ) from error

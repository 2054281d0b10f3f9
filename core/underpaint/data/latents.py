"""The latent cache: the latents of a whole data set, encoded once and read at random by diffusion training.

A cache is a folder of shards. Shard k holds the samples at positions [k·size, (k+1)·size) of the data set::

    build.json               what is being built; written first
    shard-00000.npy          latents n×d×h×w; bfloat16 is stored as its 16 bits
    shard-00000.flipped.npy  latents of the flipped images, when asked for
    shard-00000.arrow        key, label and text of every sample
    shard-00000.json         sizes and hashes of the files above: their commit mark
    index.json               identity, statistics, hashes of all shards; written last

A shard counts only with its commit mark and a cache only with its index, so that a build can be killed at
any moment and goes on with the shards that are missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from underpaint.config.recipe import write_atomically
from underpaint.config.structure import structure
from underpaint.errors import ConfigError, DataError
from underpaint.weights import file_hash

__all__ = ["CacheIdentity", "LatentCache", "LatentCacheWriter"]

FORMAT = 1
_STORED: dict[str, np.dtype[Any]] = {"bfloat16": np.dtype("<u2"), "float32": np.dtype("<f4")}
_SCHEMA = pa.schema([("key", pa.string()), ("label", pa.int64()), ("text", pa.string())])
# Samples per step of the statistics; the float64 copies of 16 common latents stay in the processor's cache.
_CHUNK = 16
_log = logging.getLogger("underpaint")


@attrs.frozen(kw_only=True)
class CacheIdentity:
    """What a cache was made from; two caches of the same identity hold the same latents.

    Attributes:
        tokenizer: Fingerprint of the encoder and adapter weights that were used, EMA weights if those are exported.
        data: Fingerprint of the data set.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        crop: How an image became a crop.
        flip: Whether the latents of the flipped images are stored too.
        dtype: Storage type.
        shape: d, h, w of a latent.
        count: Samples in the data set, broken ones included.
    """

    tokenizer: str
    data: str
    height: int
    width: int
    crop: str
    flip: bool
    dtype: Literal["float32", "bfloat16"]
    shape: tuple[int, int, int]
    count: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**attrs.asdict(self), "shape": list(self.shape)}

    @staticmethod
    def from_json(value: Any) -> CacheIdentity:
        """Read what `to_json` returned.

        Raises:
            ConfigError: Something is missing, unknown or of the wrong type.
        """
        return structure(value, CacheIdentity, "identity")


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
    """

    def __init__(
        self, folder: Path | str, identity: CacheIdentity, *, shard_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        assert shard_size > 0
        assert 0 <= rank < world_size
        self.folder = Path(folder)
        self.identity = identity
        self.shard_size = shard_size
        self._owned = range(rank, _shard_count(identity.count, shard_size), world_size)
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
            latents: n×d×h×w, floating point, on any device.
            keys: Names of the n samples.
            labels: Class indices; None when there are none.
            texts: Captions; None when there are none.
            valid: n booleans, False for a broken image, whose latent is never read or counted; None for all valid.
            flipped: n×d×h×w latents of the flipped images; given exactly when the identity says `flip`.

        Raises:
            DataError: A latent is not finite, or the disk cannot be written.
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
        names = _file_names(shard, self.identity.flip)
        parts = [latents] if flipped is None else [latents, flipped]
        files = [_array_bytes(self._stored(shard, part, keys, usable)) for part in parts] + [_table_bytes(table)]
        span = self.positions(shard)
        record = {
            "build": _build_hash(self.identity, self.shard_size),
            "start": span.start,
            "count": len(span),
            "broken": [int(row) for row in np.flatnonzero(~usable)],
            "files": {
                name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in zip(names, files, strict=True)
            },
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

        The statistics are exact: the mean and then the variance about it, in float64 over the stored values of
        all valid samples and their flipped copies, shard by shard, whatever the number of ranks was.

        Returns:
            The hash of the content.

        Raises:
            DataError: Shards are missing, or no sample is valid.
        """
        records = [self._record(shard) for shard in range(_shard_count(self.identity.count, self.shard_size))]
        missing = [shard for shard, record in enumerate(records) if record is None]
        if missing:
            raise DataError(
                f"The latent cache '{self.folder}' lacks {len(missing)} of {len(records)} shards, the first is "
                f"{missing[0]}; run the same command again to encode them."
            )
        complete = [record for record in records if record is not None]
        content = _content_hash(complete)
        path = self.folder / "index.json"
        if path.exists() and _read_json(path).get("hash") == content:
            return content
        index = {
            "format": FORMAT,
            "identity": self.identity.to_json(),
            "shard_size": self.shard_size,
            "hash": content,
            "statistics": self._statistics(complete),
            "shards": complete,
        }
        with _disk_errors(self.folder):
            for left in self.folder.glob(".*.tmp"):
                left.unlink()
            write_atomically(path, _json(index))
        return content

    def _folder_made(self) -> None:
        path = self.folder / "build.json"
        with _disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                plan = {"format": FORMAT, "identity": self.identity.to_json(), "shard_size": self.shard_size}
                write_atomically(path, _json(plan))
        identity, shard_size = _plan(path)
        _same(self.folder, identity, self.identity)
        if shard_size != self.shard_size:
            raise DataError(
                f"The latent cache '{self.folder}' has {shard_size} samples per shard where {self.shard_size} are "
                f"asked for; set latents.shard={shard_size}, or delete the folder or run again with --rebuild."
            )

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
        expected = build, span.start, len(span), _file_names(shard, self.identity.flip)
        return record if sizes and found == expected else None

    def _stored(self, shard: int, latents: Tensor, keys: Sequence[str], usable: NDArray[np.bool_]) -> NDArray[Any]:
        assert latents.shape == (len(keys), *self.identity.shape), f"latents are {tuple(latents.shape)}"
        values = latents.detach().cpu()
        if not usable.all():
            values = values.masked_fill(~torch.from_numpy(usable)[:, None, None, None], 0.0)
        values = values.to(torch.bfloat16 if self.identity.dtype == "bfloat16" else torch.float32).contiguous()
        # After rounding: a large float32 may become infinite in bfloat16.
        bad = torch.nonzero(~torch.isfinite(values).flatten(1).all(1)).flatten().tolist()
        if bad:
            raise DataError(
                f"The latent of sample '{keys[bad[0]]}' (position {self.positions(shard)[bad[0]]}) is not finite, like "
                f"{len(bad)} of {len(keys)} in shard {shard}; the tokenizer has diverged: go back to an earlier "
                "checkpoint of it."
            )
        bits = values.view(torch.int16) if self.identity.dtype == "bfloat16" else values
        stored: NDArray[Any] = bits.numpy().view(_STORED[self.identity.dtype])
        return stored

    def _statistics(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        channels = self.identity.shape[0]
        count = 0
        total = np.zeros(channels)
        for values in self._values(records):
            count += values.shape[0] * values.shape[2]
            total += values.sum(axis=(0, 2))
        if count == 0:
            raise DataError(f"None of the {self.identity.count} images could be read; check the data set.")
        mean = total / count
        squares = np.zeros(channels)
        for values in self._values(records):
            squares += np.square(values - mean[:, None]).sum(axis=(0, 2))
        std = np.sqrt(squares / count)
        if (std == 0.0).any():
            _log.warning(
                "Latent channels %s are constant: the tokenizer makes no use of them.", np.flatnonzero(std == 0)
            )
        return {"values_per_channel": count, "mean": mean.tolist(), "std": std.tolist()}

    def _values(self, records: Sequence[Mapping[str, Any]]) -> Iterator[NDArray[np.float64]]:
        """Yield the stored values of the valid samples, n×d×(h·w), in a fixed order."""
        for shard, record in enumerate(records):
            usable = np.ones(record["count"], dtype=np.bool_)
            usable[record["broken"]] = False
            for name in _file_names(shard, self.identity.flip)[:-1]:
                array = _open_array(self.folder / name, self.identity, record["count"])
                flat = array.reshape(*array.shape[:2], -1)
                for start in range(0, len(flat), _CHUNK):
                    chunk = flat[start : start + _CHUNK][usable[start : start + _CHUNK]]
                    if self.identity.dtype == "bfloat16":
                        chunk = (chunk.astype(np.uint32) << 16).view(np.float32)
                    yield chunk.astype(np.float64)


class LatentCache:
    """A finished cache, memory-mapped; broken images are left out of it.

    Instances are pickled into worker processes, which open the files they need for themselves.

    Args:
        folder: Folder of the cache.
        expect: What the cache must have been made from; None accepts any.

    Attributes:
        folder: Folder of the cache.
        identity: What it was made from.
        fingerprint: Hash of the content.
        positions: Position in the data set of every sample of the cache, ascending.
        mean: Mean of each channel, d values.
        std: Standard deviation of each channel, d values. It is 1 for a channel that is constant, so that
            standardising only centres such a channel.

    Raises:
        DataError: There is no cache, it is unfinished or damaged, or it was made from something else.
    """

    def __init__(self, folder: Path | str, expect: CacheIdentity | None = None) -> None:
        self.folder = Path(folder)
        index = self._index()
        try:
            self.identity = CacheIdentity.from_json(index["identity"])
            self.fingerprint: str = index["hash"]
            self._shard_size: int = index["shard_size"]
            self._records: list[dict[str, Any]] = index["shards"]
            self.mean = torch.tensor(index["statistics"]["mean"], dtype=torch.float32)
            std = torch.tensor(index["statistics"]["std"], dtype=torch.float32)
            broken = [record["start"] + local for record in self._records for local in record["broken"]]
        except (KeyError, TypeError, ConfigError) as error:
            raise DataError(
                f"The index of the latent cache '{self.folder}' is damaged ({error}); delete it."
            ) from error
        self.std = torch.where(std > 0, std, torch.ones_like(std))
        self.positions: NDArray[np.int64] = np.delete(np.arange(self.identity.count, dtype=np.int64), broken)
        if expect is not None:
            _same(self.folder, self.identity, expect)
        self._check_sizes()
        self._arrays: dict[int, NDArray[Any]] = {}
        self._tables: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, indices: NDArray[np.integer[Any]], flip: NDArray[np.bool_] | None = None) -> Tensor:
        """Read latents.

        Args:
            indices: B indices into the cache, in any order, repeats allowed.
            flip: B booleans, True for the latent of the flipped image; None for none.

        Returns:
            B×d×h×w float32.

        Raises:
            DataError: Flipped latents are asked for and not stored, or a file has gone.
        """
        shards, rows = self._located(indices)
        if flip is not None:
            if not self.identity.flip:
                raise DataError(
                    f"The latent cache '{self.folder}' holds no flipped images; set latents.flip=true and run again "
                    "with --rebuild."
                )
            assert len(flip) == len(shards)
        files = shards * 2 if flip is None else shards * 2 + np.asarray(flip, dtype=np.int64)
        out = np.empty((len(shards), *self.identity.shape), dtype=_STORED[self.identity.dtype])
        for file, where in _groups(files):
            out[where] = self._array(file)[rows[where]]
        if self.identity.dtype == "bfloat16":
            return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).float()
        return torch.from_numpy(out)

    def labels(self, indices: NDArray[np.integer[Any]]) -> Tensor:
        """Return B class indices, int64; -1 where a sample has none."""
        shards, rows = self._located(indices)
        out = np.empty(len(shards), dtype=np.int64)
        for shard, where in _groups(shards):
            out[where] = self._table(shard)["label"][rows[where]]
        return torch.from_numpy(out)

    def texts(self, indices: NDArray[np.integer[Any]]) -> list[str | None]:
        """Return B captions; None where a sample has none."""
        return self._strings("text", indices)

    def keys(self, indices: NDArray[np.integer[Any]]) -> list[str]:
        """Return the names of B samples."""
        return [key for key in self._strings("key", indices) if key is not None]

    def standardise(self, latents: Tensor) -> Tensor:
        """Give every channel of B×d×h×w latents mean 0 and standard deviation 1 over the cache (aligntok.md §2.4)."""
        return (latents - self._per_channel(self.mean, latents)) / self._per_channel(self.std, latents)

    def restore(self, latents: Tensor) -> Tensor:
        """Undo `standardise`."""
        return latents * self._per_channel(self.std, latents) + self._per_channel(self.mean, latents)

    def verify(self) -> None:
        """Read every file and compare it with its hash.

        Raises:
            DataError: A file has changed since it was written.
        """
        for record in self._records:
            for name, file in record["files"].items():
                if file_hash(self.folder / name) != file["sha256"]:
                    raise self._damaged(name, "differs from its hash")
        if _content_hash(self._records) != self.fingerprint:
            raise DataError(f"The index of the latent cache '{self.folder}' differs from its hash; delete it.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}, "_tables": {}}

    def _index(self) -> dict[str, Any]:
        path = self.folder / "index.json"
        if not path.is_file():
            if not (self.folder / "build.json").is_file():
                raise DataError(f"There is no latent cache at '{self.folder}'; encode the data set first.")
            identity, shard_size = _plan(self.folder / "build.json")
            there = len(list(self.folder.glob("shard-*.json")))
            raise DataError(
                f"The latent cache '{self.folder}' is unfinished: {there} of "
                f"{_shard_count(identity.count, shard_size)} shards are there and the index is not; run the same "
                "command again to finish it."
            )
        return _read_json(path)

    def _check_sizes(self) -> None:
        for record in self._records:
            for name, file in record["files"].items():
                try:
                    size = (self.folder / name).stat().st_size
                except OSError:
                    raise self._damaged(name, "is missing") from None
                if size != file["size"]:
                    raise self._damaged(name, f"has {size} of {file['size']} bytes")

    def _damaged(self, name: str, what: str) -> DataError:
        return DataError(
            f"'{name}' of the latent cache '{self.folder}' {what}; delete that file and 'index.json' and run the same "
            "command again: only this shard is encoded anew."
        )

    def _located(self, indices: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        shards, rows = np.divmod(self.positions[np.asarray(indices)], self._shard_size)
        return shards, rows

    def _array(self, file: int) -> NDArray[Any]:
        if file not in self._arrays:
            shard, flipped = divmod(file, 2)
            path = self.folder / _file_names(shard, self.identity.flip)[flipped]
            try:
                self._arrays[file] = _open_array(path, self.identity, self._records[shard]["count"])
            except FileNotFoundError:
                raise self._damaged(path.name, "is missing") from None
        return self._arrays[file]

    def _table(self, shard: int) -> Any:
        if shard not in self._tables:
            name = _file_names(shard, self.identity.flip)[-1]
            try:
                batch = pa.ipc.open_file(pa.memory_map(str(self.folder / name))).get_batch(0)
            except FileNotFoundError:
                raise self._damaged(name, "is missing") from None
            except (OSError, ValueError) as error:
                raise self._damaged(name, f"cannot be read ({error})") from error
            labels = batch.column("label").fill_null(-1).to_numpy(zero_copy_only=False)
            self._tables[shard] = {"label": labels, "key": batch.column("key"), "text": batch.column("text")}
        return self._tables[shard]

    def _strings(self, column: str, indices: NDArray[np.integer[Any]]) -> list[str | None]:
        shards, rows = self._located(indices)
        return [self._table(s)[column][r].as_py() for s, r in zip(shards.tolist(), rows.tolist(), strict=True)]

    def _per_channel(self, values: Tensor, latents: Tensor) -> Tensor:
        return values.to(device=latents.device, dtype=latents.dtype)[:, None, None]


def _shard_count(count: int, shard_size: int) -> int:
    return -(-count // shard_size)


def _file_names(shard: int, flip: bool) -> list[str]:
    """Return the names of a shard's latents, flipped latents when there are any, and table."""
    stem = f"shard-{shard:05d}"
    return [f"{stem}.npy", *([f"{stem}.flipped.npy"] if flip else []), f"{stem}.arrow"]


def _groups(values: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Yield every distinct value with the places where it stands."""
    order = np.argsort(values, kind="stable")
    distinct, starts = np.unique(values[order], return_index=True)
    yield from zip(distinct.tolist(), np.split(order, starts[1:]), strict=False)


def _open_array(path: Path, identity: CacheIdentity, count: int) -> NDArray[Any]:
    try:
        array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except ValueError as error:
        raise DataError(f"'{path}' cannot be read ({error}); delete it and run the same command again.") from error
    if array.shape != (count, *identity.shape) or array.dtype != _STORED[identity.dtype]:
        raise DataError(
            f"'{path}' holds {array.dtype} {array.shape} where {identity.dtype} {(count, *identity.shape)} was "
            "expected; delete it and run the same command again."
        )
    return array


def _same(folder: Path, found: CacheIdentity, wanted: CacheIdentity) -> None:
    pairs = ((f.name, getattr(found, f.name), getattr(wanted, f.name)) for f in attrs.fields(CacheIdentity))
    different = [f"{name} {was!r} where {now!r} is asked for" for name, was, now in pairs if was != now]
    if different:
        raise DataError(
            f"The latent cache '{folder}' has {', and '.join(different)}; delete the folder or run again "
            "with --rebuild."
        )


def _plan(path: Path) -> tuple[CacheIdentity, int]:
    plan = _read_json(path)
    try:
        return CacheIdentity.from_json(plan["identity"]), int(plan["shard_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"'{path}' is damaged ({error}); delete the folder of this latent cache.") from error


def _build_hash(identity: CacheIdentity, shard_size: int) -> str:
    return hashlib.sha256(json.dumps([identity.to_json(), shard_size]).encode()).hexdigest()


def _content_hash(records: Sequence[Mapping[str, Any]]) -> str:
    text = "\n".join(file["sha256"] for record in records for file in record["files"].values())
    return hashlib.sha256(text.encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        version = value["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"'{path}' is damaged ({error}); delete it and run the same command again.") from error
    if version != FORMAT:
        raise DataError(
            f"'{path}' has format {version}, this version of underpaint reads {FORMAT}; encode the data again."
        )
    return dict(value)


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

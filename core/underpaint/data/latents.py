"""The latent cache: the latents of a whole data set, encoded once and read at random by diffusion training.

A cache is a folder of shards. Shard k holds the samples at positions [k·size, (k+1)·size) of the data set::

    build.json               what is being built; written first
    shard-00000.npy          latents n×d×h×w, or n×2d×h×w means and log-variances; bfloat16 is stored as its 16 bits
    shard-00000.flipped.npy  latents of the flipped images, when asked for
    shard-00000.arrow        key, label and text of every sample
    shard-00000.json         sizes and hashes of the files above: their commit mark
    statistics.npy           mean and variance of every latent value, 2×d×h×w float64
    index.json               identity, statistics of each channel, hashes of all files; written last

A shard counts only with its commit mark and a cache only with its index, so that a build can be killed at
any moment and goes on with the shards that are missing. `latent_writer` writes caches, `latent_check` checks them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import attrs
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from underpaint.config.structure import structure
from underpaint.errors import ConfigError, DataError

__all__ = ["CacheIdentity", "LatentCache", "draw_latents"]

FORMAT = 2
STATISTICS = "statistics.npy"
_HEADER = 128
_MANY = 2**16
_T = TypeVar("_T")


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
        store: What is stored of a posterior: its ``mode``, a ``sample``, or mean and log-variance (``posterior``).
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
    store: Literal["mode", "posterior", "sample"]
    shape: tuple[int, int, int]
    count: int

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Shape of what is stored of a sample: d×h×w, or 2d×h×w for means and log-variances."""
        channels, height, width = self.shape
        return (2 * channels if self.store == "posterior" else channels, height, width)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Type of the arrays in the files; NumPy has no bfloat16, so its bits stand in an unsigned integer."""
        return np.dtype("<u2" if self.dtype == "bfloat16" else "<f4")

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


class LatentCache:
    """A finished cache, memory-mapped; broken images are left out of it.

    Instances are pickled into worker processes, which open the files they need for themselves.

    Args:
        folder: Folder of the cache.
        expect: What the cache must have been made from; None accepts any.
        statistics: What `standardise` uses: mean and standard deviation of each channel, or of each ``position`` of
            each channel. A cache holds both.

    Attributes:
        folder: Folder of the cache.
        identity: What it was made from.
        fingerprint: Hash of the latents.
        shard_size: Samples per shard.
        records: Commit mark of every shard.
        files: Size in bytes and SHA-256 of every file of the cache but the index, by name.
        positions: Position in the data set of every sample of the cache, ascending.
        statistics: As given.
        mean: Mean of what diffusion trains on, d×1×1 or d×h×w. With stored posteriors that is a draw of each.
        std: Its standard deviation, d×1×1 or d×h×w. It is 1 where there is no spread at all, so that standardising
            only centres such a channel or value.

    Raises:
        DataError: There is no cache, it is unfinished or damaged, or it was made from something else.
    """

    def __init__(
        self,
        folder: Path | str,
        expect: CacheIdentity | None = None,
        *,
        statistics: Literal["channel", "position"] = "channel",
    ) -> None:
        self.folder = Path(folder)
        self.statistics = statistics
        index = self._index()
        try:
            self.identity = CacheIdentity.from_json(index["identity"])
            self.fingerprint: str = index["hash"]
            self.shard_size: int = index["shard_size"]
            self.records: list[dict[str, Any]] = index["shards"]
            self.files: dict[str, dict[str, Any]] = {}
            for part in [*self.records, index]:
                self.files |= part["files"]
            moments = np.array([index["statistics"]["mean"], index["statistics"]["variance"]], dtype=np.float64)
            broken = [record["start"] + local for record in self.records for local in record["broken"]]
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise DataError(
                f"The index of the latent cache '{self.folder}' is damaged ({error}); delete it and encode again."
            ) from error
        self.positions: NDArray[np.int64] = np.delete(np.arange(self.identity.count, dtype=np.int64), broken)
        if expect is not None:
            require_same(self.folder, self.identity, expect)
        self._check_sizes()
        moments = moments[:, :, None, None] if statistics == "channel" else read_statistics(self.folder, self.identity)
        std = np.sqrt(moments[1])
        self.mean = torch.from_numpy(moments[0]).float()
        self.std = torch.from_numpy(np.where(std > 0.0, std, 1.0)).float()
        self._arrays: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._tables: OrderedDict[int, Any] = OrderedDict()
        self._open_files = _files_at_once() // 4

    def __len__(self) -> int:
        return len(self.positions)

    def read(
        self,
        indices: NDArray[np.integer[Any]],
        flip: NDArray[np.bool_] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Read latents.

        Args:
            indices: B indices into the cache, in any order, repeats allowed.
            flip: B booleans, True for the latent of the flipped image; None for none.
            seeds: B seeds of the draws from stored posteriors, needed for these and of no effect on other caches. A
                seed of its own for every row makes a draw independent of how a batch is divided.

        Returns:
            B×d×h×w float32.

        Raises:
            DataError: Flipped latents are asked for and not stored, or a file has gone.
        """
        shards, rows = self._located(indices)
        if flip is not None:
            if not self.identity.flip:
                raise DataError(
                    f"The latent cache '{self.folder}' holds no flipped images; set latents.flip=true and encode "
                    "into another folder."
                )
            assert len(flip) == len(shards)
        files = shards * 2 if flip is None else shards * 2 + np.asarray(flip, dtype=np.int64)
        out = np.empty((len(shards), *self.identity.stored_shape), dtype=self.identity.stored_dtype)
        for file, where in _groups(files):
            out[where] = self._array(file)[rows[where]]
        values = to_float32(out, self.identity)
        if self.identity.store != "posterior":
            return values
        assert seeds is not None, "posteriors are drawn from with a seed for each row"
        mean, logvar = values.chunk(2, dim=1)
        return draw_latents(mean, logvar, seeds)

    def prefetch(self, span: range) -> None:
        """Have the system read consecutive latents into memory, in one piece for each file, without waiting for it.

        Args:
            span: Indices into the cache; what is read of their files may hold some more.
        """
        if not len(span) or not hasattr(os, "posix_fadvise"):
            return
        shards, rows = self._located(np.array([span[0], span[-1]]))
        row_bytes = math.prod(self.identity.stored_shape) * self.identity.stored_dtype.itemsize
        for shard in range(int(shards[0]), int(shards[1]) + 1):
            start = int(rows[0]) if shard == shards[0] else 0
            stop = int(rows[1]) + 1 if shard == shards[1] else self.records[shard]["count"]
            *arrays, table = file_names(shard, self.identity.flip)
            for name in arrays:
                _advise(self.folder / name, start * row_bytes, (stop - start) * row_bytes + _HEADER)
            _advise(self.folder / table, 0, 0)

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
        """Give B×d×h×w latents mean 0 and standard deviation 1 over the cache (aligntok.md §2.4, rae.md §2.2)."""
        # In place where it can be: at large batches most of the time goes into fresh memory.
        return (latents - self.mean.to(latents)).div_(self.std.to(latents))

    def restore(self, latents: Tensor) -> Tensor:
        """Undo `standardise`."""
        return (latents * self.std.to(latents)).add_(self.mean.to(latents))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": OrderedDict(), "_tables": OrderedDict()}

    def _index(self) -> dict[str, Any]:
        path = self.folder / "index.json"
        if not path.is_file():
            if not (self.folder / "build.json").is_file():
                raise DataError(f"There is no latent cache at '{self.folder}'; encode the data set first.")
            identity, shard_size = read_plan(self.folder / "build.json")
            there = len(list(self.folder.glob("shard-*.json")))
            raise DataError(
                f"The latent cache '{self.folder}' is unfinished: {there} of "
                f"{shard_count(identity.count, shard_size)} shards are there and the index is not; encode again, "
                "by the command that began it, to finish it."
            )
        return read_json(path)

    def _check_sizes(self) -> None:
        for name, file in self.files.items():
            try:
                size = (self.folder / name).stat().st_size
            except OSError:
                raise self._damaged(name, "is missing") from None
            if size != file["size"]:
                raise self._damaged(name, f"has {size} of {file['size']} bytes")

    def _damaged(self, name: str, what: str) -> DataError:
        return DataError(
            f"'{name}' of the latent cache '{self.folder}' {what}; delete that file and 'index.json' and encode "
            "again: only what is missing is made anew."
        )

    def _located(self, indices: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        shards, rows = np.divmod(self.positions[np.asarray(indices)], self.shard_size)
        return shards, rows

    def _array(self, file: int) -> NDArray[Any]:
        if file not in self._arrays:
            shard, flipped = divmod(file, 2)
            path = self.folder / file_names(shard, self.identity.flip)[flipped]
            try:
                self._arrays[file] = open_array(path, self.identity, self.records[shard]["count"])
            except FileNotFoundError:
                raise self._damaged(path.name, "is missing") from None
        return self._latest(self._arrays, file)

    def _table(self, shard: int) -> Any:
        if shard not in self._tables:
            name = file_names(shard, self.identity.flip)[-1]
            try:
                batch = pa.ipc.open_file(pa.memory_map(str(self.folder / name))).get_batch(0)
            except FileNotFoundError:
                raise self._damaged(name, "is missing") from None
            except (OSError, ValueError) as error:
                raise self._damaged(name, f"cannot be read ({error})") from error
            labels = batch.column("label").fill_null(-1).to_numpy(zero_copy_only=False)
            self._tables[shard] = {"label": labels, "key": batch.column("key"), "text": batch.column("text")}
        return self._latest(self._tables, shard)

    def _latest(self, opened: OrderedDict[int, _T], key: int) -> _T:
        """Return an open file; those that were not used for longest are closed when there are too many."""
        opened.move_to_end(key)
        while len(opened) > self._open_files:
            opened.popitem(last=False)
        return opened[key]

    def _strings(self, column: str, indices: NDArray[np.integer[Any]]) -> list[str | None]:
        shards, rows = self._located(indices)
        return [self._table(s)[column][r].as_py() for s, r in zip(shards.tolist(), rows.tolist(), strict=True)]


def _files_at_once() -> int:
    """Raise the number of files that this process may open as far as the system lets it, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MANY if hard == resource.RLIM_INFINITY else min(hard, _MANY)
    if soft != resource.RLIM_INFINITY and soft < most:
        # Every mapped file counts, and ImageNet has nearly as many as the usual 1,024.
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def _advise(path: Path, start: int, count: int) -> None:
    """Tell the system that bytes of a file are needed soon; all to its end where `count` is 0."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return  # reading says what is wrong
    try:
        os.posix_fadvise(file, start, count, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(file)


def draw_latents(mean: Tensor, logvar: Tensor, seeds: Sequence[int]) -> Tensor:
    """Draw a latent from each of B posteriors: mean + exp(logvar / 2) · ε.

    Args:
        mean: B×d×h×w float32, on the CPU.
        logvar: Logarithm of the variance, B×d×h×w.
        seeds: B seeds; ε of a row depends on its own alone.

    Returns:
        B×d×h×w float32.
    """
    out = torch.empty(mean.shape)
    generator = torch.Generator()
    # Row by row throughout: a latent stays in the processor's cache, a batch does not.
    for row, centre, spread, seed in zip(out, mean, logvar, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed)).mul_((spread * 0.5).exp_()).add_(centre)
    return out


def shard_count(count: int, shard_size: int) -> int:
    """Return the number of shards that hold `count` samples."""
    return -(-count // shard_size)


def file_names(shard: int, flip: bool) -> list[str]:
    """Return the names of a shard's latents, flipped latents when there are any, and table."""
    stem = f"shard-{shard:05d}"
    return [f"{stem}.npy", *([f"{stem}.flipped.npy"] if flip else []), f"{stem}.arrow"]


def _groups(values: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Yield every distinct value with the places where it stands."""
    order = np.argsort(values, kind="stable")
    distinct, starts = np.unique(values[order], return_index=True)
    yield from zip(distinct.tolist(), np.split(order, starts[1:]), strict=False)


def open_array(path: Path, identity: CacheIdentity, count: int) -> NDArray[Any]:
    """Map a file of latents into memory; `count` is the number of samples it must hold.

    Raises:
        DataError: It holds something else.
        FileNotFoundError: It has gone.
    """
    return _opened(path, (count, *identity.stored_shape), identity.stored_dtype)


def read_statistics(folder: Path, identity: CacheIdentity) -> NDArray[np.float64]:
    """Return the mean and variance of every latent value, 2×d×h×w."""
    return np.array(_opened(folder / STATISTICS, (2, *identity.shape), np.dtype("<f8")))


def to_float32(stored: NDArray[Any], identity: CacheIdentity) -> Tensor:
    """Return what an array of a file, read into memory, stands for."""
    if identity.dtype == "bfloat16":
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(stored)


def _opened(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    try:
        array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except ValueError as error:
        raise DataError(f"'{path}' cannot be read ({error}); delete it and encode again.") from error
    if array.shape != shape or array.dtype != dtype:
        raise DataError(
            f"'{path}' holds {array.dtype} {array.shape} where {dtype} {shape} was expected; delete it and "
            "encode again."
        )
    return array


def require_same(folder: Path, found: CacheIdentity, wanted: CacheIdentity) -> None:
    """Raise a `DataError` that names every difference, if there is one."""
    pairs = ((f.name, getattr(found, f.name), getattr(wanted, f.name)) for f in attrs.fields(CacheIdentity))
    different = [f"{name} {was!r} where {now!r} is asked for" for name, was, now in pairs if was != now]
    if different:
        raise DataError(
            f"The latent cache '{folder}' has {', and '.join(different)}; delete that folder and encode again."
        )


def require_shards(folder: Path, found: int, wanted: int) -> None:
    """Raise a `DataError` if a cache has other samples per shard than are asked for."""
    if found != wanted:
        raise DataError(
            f"The latent cache '{folder}' has {found} samples per shard where {wanted} are asked for; set "
            f"latents.shard={found}, or --shard {found} with 'underpaint encode', or delete that folder and "
            "encode again."
        )


def read_plan(path: Path) -> tuple[CacheIdentity, int]:
    """Return what ``build.json`` says is being built, and the samples per shard."""
    plan = read_json(path)
    try:
        return CacheIdentity.from_json(plan["identity"]), int(plan["shard_size"])
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise DataError(f"'{path}' is damaged ({error}); delete the folder of this latent cache.") from error


def content_hash(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the hash of all shards."""
    text = "\n".join(file["sha256"] for record in records for file in record["files"].values())
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read an index or a plan of this format."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        version = value["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"'{path}' is damaged ({error}); delete it and encode again.") from error
    if version != FORMAT:
        raise DataError(
            f"'{path}' has format {version}, this version of underpaint reads {FORMAT}; delete the folder of this "
            "latent cache and encode the data again."
        )
    return dict(value)

"""Batches of images: endless and shuffled for training, one pass in order for everything else.

Which samples a global batch holds depends on seed and step alone, never on the number of ranks or workers.
Samples that cannot be decoded are counted and named, up to a limit.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from underpaint.data.order import Blocks, Order, sample_seed
from underpaint.data.server import start_server
from underpaint.data.shipping import Shipped
from underpaint.errors import BrokenImageError, ConfigError, DataError, UnderpaintError
from underpaint.interfaces.dataset import Dataset, Sample

__all__ = ["Batch", "ImageLoader", "ImagePass", "Transform"]

logger = logging.getLogger("underpaint")

Transform = Callable[[NDArray[np.uint8], np.random.Generator, str], NDArray[np.uint8]]
"""From an image, random numbers and the sample's name to H×W×3 uint8 of one size; `Crop` is one."""

_NAMED = 20
_MIN_READS = 100
_MAX_ATTEMPTS = 16
_END_SECONDS = 5.0


@attrs.frozen(eq=False, kw_only=True)
class Batch:
    """The images of one rank at one step.

    Attributes:
        images: B×H×W×3 uint8; `to_tensor` turns them into what networks take.
        labels: B int64, or None when the data set has no labels.
        texts: B captions, or None when it has none.
        keys: B names.
        indices: B int64, positions in the data set.
        wait_seconds: Time this rank waited for the batch.
    """

    images: Tensor
    labels: Tensor | None
    texts: tuple[str, ...] | None
    keys: tuple[str, ...]
    indices: Tensor
    wait_seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.keys)

    def split(self, parts: int) -> list[Batch]:
        """Cut the batch into equal micro-batches; the waiting time is the first one's."""
        assert len(self) % parts == 0
        size = len(self) // parts
        return [
            Batch(
                images=self.images[i : i + size],
                labels=None if self.labels is None else self.labels[i : i + size],
                texts=None if self.texts is None else self.texts[i : i + size],
                keys=self.keys[i : i + size],
                indices=self.indices[i : i + size],
                wait_seconds=self.wait_seconds if i == 0 else 0.0,
            )
            for i in range(0, len(self), size)
        ]


class ImageLoader:
    """Endless shuffled batches for training.

    Iterating yields one `Batch` per optimizer step, from `start_step` on, and never ends. Global step s holds
    the positions s·batch … (s+1)·batch − 1 of the `Order`; each rank gets its contiguous share of them. A broken
    sample is replaced by one that is a function of seed and position, so this holds with broken samples too.

    Workers are separate processes started by a fork server: a script that iterates with workers needs
    ``if __name__ == "__main__":`` around its main part.

    Args:
        dataset: Where samples come from.
        transform: Makes every image one size.
        batch: Images per step over all ranks.
        seed: Seed of order and augmentation.
        indices: Samples to use, as positions in the data set; None for all.
        rank: This process.
        world_size: Number of processes.
        workers: Reading processes; 0 reads in this one.
        start_step: Steps already done.
        accumulation: Micro-batches that `Batch.split` will be asked for.
        blocks: Blocks of the order; None shuffles all samples.
        max_broken: Share of broken samples, of this rank's reads, above which reading stops: judged from 100
            reads on, when chance no longer explains the excess (three standard deviations).

    Raises:
        ConfigError: The batch cannot be divided.
        DataError: There are no samples. While iterating: too many are broken, or a worker died.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        transform: Transform,
        batch: int,
        seed: int,
        indices: Sequence[int] | NDArray[np.int64] | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        start_step: int = 0,
        accumulation: int = 1,
        blocks: Blocks | None = None,
        max_broken: float = 0.01,
    ) -> None:
        if batch < 1 or batch % (world_size * accumulation):
            raise ConfigError(
                f"A batch of {batch} images cannot be divided by {world_size} ranks × {accumulation} micro-batches; "
                f"make it a multiple of {world_size * accumulation}."
            )
        assert 0 <= rank < world_size
        chosen = _chosen(dataset, indices)
        self._reader = _Reader(dataset, transform, chosen, seed, Order(len(chosen), seed, blocks))
        self._batch, self._rank, self._per_rank = batch, rank, batch // world_size
        self._workers = workers
        self._step = start_step
        self._ledger = _Ledger(max_broken)
        self._pool: Generator[_Read] | None = None

    @property
    def step(self) -> int:
        """The step whose batch comes next."""
        return self._step

    @property
    def broken(self) -> int:
        """Broken samples met by this rank, repeats included."""
        return self._ledger.broken

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._pool is None:
            self._pool = _reads(
                self._reader, _Steps(self._step, self._batch, self._rank, self._per_rank), self._workers
            )
        start = time.perf_counter()
        read = next(self._pool)
        wait = time.perf_counter() - start
        self._ledger.add(read)
        self._step += 1
        assert read.batch is not None
        return attrs.evolve(read.batch, wait_seconds=wait)

    def close(self) -> None:
        """Stop the workers. Iterating again starts them anew at the next step."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


class ImagePass:
    """One pass over samples in their order, for evaluation and for encoding latents.

    Rank r reads the r-th contiguous share, so the ranks' batches one after another are the whole in order;
    shares differ by one sample at most, and the last batch may be smaller. Broken samples are left out.

    Args:
        dataset: Where samples come from.
        transform: Makes every image one size.
        batch: Images at once, per rank.
        indices: Samples to use, as positions in the data set; None for all.
        seed: Seed of augmentation, if the transform has any.
        rank: This process.
        world_size: Number of processes.
        workers: Reading processes; 0 reads in this one.
        max_broken: Share of broken samples, of this rank's reads, above which reading stops: judged from 100
            reads on, when chance no longer explains the excess (three standard deviations).

    Raises:
        DataError: There are no samples. While iterating: too many are broken, or a worker died.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        transform: Transform,
        batch: int,
        indices: Sequence[int] | NDArray[np.int64] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        max_broken: float = 0.01,
    ) -> None:
        assert 0 <= rank < world_size
        assert batch > 0
        chosen = _chosen(dataset, indices)
        count = len(chosen)
        share = range(count * rank // world_size, count * (rank + 1) // world_size)
        self._reader = _Reader(dataset, transform, chosen, seed, None)
        self._slices = [range(i, min(i + batch, share.stop)) for i in range(share.start, share.stop, batch)]
        self._workers = workers
        self._ledger = _Ledger(max_broken)

    @property
    def broken(self) -> int:
        """Samples left out so far."""
        return self._ledger.broken

    @property
    def broken_names(self) -> tuple[str, ...]:
        """Names and reasons of the first 20 of them."""
        return tuple(self._ledger.named)

    def __iter__(self) -> Iterator[Batch]:
        self._ledger = _Ledger(self._ledger.limit)
        with contextlib.closing(_reads(self._reader, self._slices, self._workers)) as pool:
            for _ in self._slices:
                start = time.perf_counter()
                read = next(pool)
                wait = time.perf_counter() - start
                self._ledger.add(read)
                if read.batch is not None:
                    yield attrs.evolve(read.batch, wait_seconds=wait)
        self._ledger.finish()


def _chosen(dataset: Dataset, indices: Sequence[int] | NDArray[np.int64] | None) -> range | NDArray[np.int64]:
    count = len(dataset)
    if count == 0 or (indices is not None and len(indices) == 0):
        raise DataError(f"The data set has {count} samples and none of them is to be read; check its path and split.")
    if indices is None:
        return range(count)
    chosen = np.asarray(indices, dtype=np.int64)
    assert 0 <= chosen.min() <= chosen.max() < count, "indices outside the data set"
    return chosen


# ------------------------------------------------------------------------------------------ in the workers


@attrs.frozen(eq=False)
class _Read:
    """What a worker sends back: a batch, who was broken on the way, and what ends the reading."""

    batch: Batch | None
    reads: int
    broken: tuple[BrokenImageError, ...]
    exhausted: bool = False
    error: UnderpaintError | None = None


class _Reader(torch.utils.data.Dataset[_Read]):
    """Reads the samples at some positions: shuffled with replacements, or in order without."""

    def __init__(
        self,
        dataset: Dataset,
        transform: Transform,
        chosen: range | NDArray[np.int64],
        seed: int,
        order: Order | None,
    ) -> None:
        self._dataset = Shipped(dataset)
        self._transform = transform
        self._chosen = chosen
        self._seed = seed
        self._order = order

    def __getitem__(self, positions: range) -> _Read:
        broken: list[BrokenImageError] = []
        samples: list[Sample] = []
        indices: list[int] = []
        try:
            for position, candidates in zip(positions, self._candidates(positions), strict=True):
                for attempt, index in enumerate(candidates):
                    try:
                        samples.append(self._sample(index, sample_seed(self._seed, position, attempt)))
                    except BrokenImageError as error:
                        broken.append(error)
                    else:
                        indices.append(index)
                        break
                else:
                    if self._order is not None:
                        return _Read(None, len(samples) + len(broken), tuple(broken), exhausted=True)
            batch = _stack(samples, indices) if samples else None
            return _Read(batch, len(samples) + len(broken), tuple(broken))
        except UnderpaintError as error:  # sent as a value: torch would rewrap it with a traceback as its message
            return _Read(None, len(samples) + len(broken), tuple(broken), error=error)

    def _candidates(self, positions: range) -> Iterator[Iterator[int]]:
        """Yield, for each position, the sample to read and those that replace it when it is broken."""
        if self._order is None:
            for place in positions:
                yield iter((int(self._chosen[place]),))
            return
        for position, place in zip(positions, self._order.indices(positions), strict=True):
            others = (sample_seed(self._seed, position, i) % len(self._chosen) for i in range(1, _MAX_ATTEMPTS))
            yield (int(self._chosen[int(p)]) for p in itertools.chain((place,), others))

    def _sample(self, index: int, seed: int) -> Sample:
        sample = self._dataset.get()[index]
        image = self._transform(sample.image, np.random.default_rng(seed), sample.key)
        return attrs.evolve(sample, image=image)


def _stack(samples: list[Sample], indices: list[int]) -> Batch:
    labels = [sample.label for sample in samples if sample.label is not None]
    texts = [sample.text for sample in samples if sample.text is not None]
    for what, found in (("label", len(labels)), ("text", len(texts))):
        if 0 < found < len(samples):
            bare = next(sample.key for sample in samples if getattr(sample, what) is None)
            raise DataError(f"The sample '{bare}' has no {what} while others have one; complete it or remove it.")
    return Batch(
        images=torch.from_numpy(np.stack([sample.image for sample in samples])),
        labels=torch.tensor(labels, dtype=torch.int64) if labels else None,
        texts=tuple(texts) if texts else None,
        keys=tuple(sample.key for sample in samples),
        indices=torch.tensor(indices, dtype=torch.int64),
    )


# ------------------------------------------------------------------------------------------ in the training process


@attrs.define
class _Ledger:
    """Counts broken samples, names the first ones in the log, and stops when there are too many."""

    limit: float
    reads: int = 0
    broken: int = 0
    named: dict[str, None] = attrs.field(factory=dict)

    def add(self, read: _Read) -> None:
        self.reads += read.reads
        self.broken += len(read.broken)
        for error in read.broken:
            name = str(error)
            if len(self.named) < _NAMED and name not in self.named:
                self.named[name] = None
                last = " (further ones are counted only)" if len(self.named) == _NAMED else ""
                logger.warning("broken sample left out: %s%s", name, last)
        if read.error is not None:
            raise read.error
        if read.exhausted or (self.reads >= _MIN_READS and self.broken > self._allowed()):
            raise self._too_many()

    def _allowed(self) -> float:
        # Three standard deviations above the limit, or a data set well below it would be stopped by an unlucky start.
        expected = self.limit * self.reads
        return expected + 3.0 * math.sqrt(expected * (1.0 - self.limit))

    def finish(self) -> None:
        """Judge a pass as a whole: one without a single good sample has failed, however short."""
        if self.reads and self.broken == self.reads:
            raise self._too_many()
        if self.broken:
            logger.warning("%d of %d samples were broken and left out", self.broken, self.reads)

    def _too_many(self) -> DataError:
        counted, named = f"{self.broken} of {self.reads} samples read are broken", "; ".join(list(self.named)[:3])
        if self.broken == self.reads:  # No limit would help.
            return DataError(f"{counted}: {named}; remove or replace them.")
        return DataError(
            f"{counted}, and the limit is {self.limit:.2%}: {named}; remove or replace them, or allow more by "
            "data.max_broken in a recipe."
        )


class _Steps(Sampler[range]):
    """The positions of one rank at each step, for ever."""

    def __init__(self, step: int, batch: int, rank: int, per_rank: int) -> None:
        self._first = step * batch + rank * per_rank
        self._batch, self._per_rank = batch, per_rank

    def __iter__(self) -> Iterator[range]:
        first = self._first
        while True:
            yield range(first, first + self._per_rank)
            first += self._batch


def _same(read: Any) -> Any:
    return read


def _begin(_: int) -> None:
    # The fork server may be one that somebody else has started, in the trainer's own group.
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A training process that is killed cannot stop its workers, and they are children of the fork server, which torch's
    # own watch takes for it: they would wait for work for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _reads(reader: _Reader, positions: Sampler[range] | list[range], workers: int) -> Generator[_Read]:
    """Yield what the reader makes of each range of positions, in their order."""
    if workers == 0:
        yield from (reader[item] for item in positions)
        return
    # A fork of a process with threads (CUDA, gloo, Arrow) can hang; a server forked while it was young cannot.
    start_server(__name__)
    pool = DataLoader(
        reader,
        batch_size=None,
        sampler=positions,
        num_workers=workers,
        collate_fn=_same,
        worker_init_fn=_begin,
        multiprocessing_context="forkserver",
        generator=torch.Generator(),  # its own, or starting workers would advance the run's random numbers
    )
    others = set(multiprocessing.active_children())
    batches = iter(pool)
    processes = [process for process in multiprocessing.active_children() if process not in others]
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        if "DataLoader worker process" in str(error):  # raised by the code in a worker, not by its death
            raise
        dead = _dead(processes)
        if not dead:
            raise
        raise DataError(
            f"A process that reads images was killed ({dead}), often for lack of memory or shared memory; start "
            "again to resume, with a smaller data.workers if it recurs."
        ) from error


def _dead(processes: list[BaseProcess]) -> str:
    """Return who of the processes ended and how; a broken connection is noticed before its process's end is."""
    multiprocessing.connection.wait([process.sentinel for process in processes], timeout=_END_SECONDS)
    ends = [(process.pid, process.exitcode) for process in processes if process.exitcode is not None]
    return ", ".join(
        f"pid {pid} by {signal.Signals(-code).name}" if code < 0 else f"pid {pid} with exit code {code}"
        for pid, code in ends
    )

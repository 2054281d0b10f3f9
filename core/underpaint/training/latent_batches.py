"""Micro-batches of cached latents for diffusion training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import attrs
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from underpaint.data.latents import LatentCache
from underpaint.data.order import Order, sample_seed
from underpaint.errors import ConfigError
from underpaint.training.ranks import Ranks

__all__ = ["LatentBatch", "latent_batches"]


@attrs.frozen
class LatentBatch:
    """A micro-batch of standardised latents.

    Attributes:
        latents: B×d×h×w float32, on the CPU.
        inputs: B class indices or B captions, as the conditioner accepts.
        rows: Where the micro-batch stands in the global batch.
    """

    latents: Tensor
    inputs: Tensor | Sequence[str]
    rows: slice


def latent_batches(
    cache: LatentCache,
    *,
    accepts: Literal["label", "text"],
    batch: int,
    accumulation: int,
    ranks: Ranks,
    seed: int,
    start: int,
) -> Iterator[LatentBatch]:
    """Yield this rank's micro-batches without end, read ahead in a thread.

    The global batch at a step depends on the seed and the step only, not on ranks or accumulation.

    Raises:
        ConfigError: The batch does not divide by ranks and accumulation.
    """
    parts = ranks.world_size * accumulation
    if batch % parts:
        raise ConfigError(
            f"A batch of {batch} does not divide by {ranks.world_size} ranks × {accumulation} micro-batches; "
            f"use a multiple of {parts}."
        )
    order = Order(len(cache), seed)
    flip = cache.identity.flip
    size = batch // parts

    def produce() -> Iterator[LatentBatch]:
        step = start
        while True:
            for micro in range(accumulation):
                first = ranks.rank * size * accumulation + micro * size
                positions = range(step * batch + first, step * batch + first + size)
                indices = order.indices(positions)
                flips = np.array([sample_seed(seed, position) % 2 == 1 for position in positions]) if flip else None
                yield LatentBatch(
                    cache.standardise(cache.read(indices, flips)),
                    _inputs(cache, indices, accepts),
                    slice(first, first + size),
                )
            step += 1

    return _ahead(produce())


def _inputs(cache: LatentCache, indices: NDArray[np.int64], accepts: str) -> Tensor | list[str]:
    if accepts == "text":
        return [text or "" for text in cache.texts(indices)]
    # Unlabelled data is all of one class; its conditioner has no class to tell apart either.
    return cache.labels(indices).clamp_min(0)


def _ahead(items: Iterator[Any], depth: int = 4) -> Iterator[Any]:
    """Run an endless iterator in a daemon thread, a few items ahead."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=depth)
    done = threading.Event()

    def work() -> None:
        try:
            for item in items:
                while not done.is_set():
                    try:
                        ready.put((item, None), timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if done.is_set():
                    return
        except BaseException as error:
            ready.put((None, error))

    threading.Thread(target=work, daemon=True, name="latents").start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        done.set()

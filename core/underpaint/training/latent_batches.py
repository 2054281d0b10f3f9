"""Micro-batches of cached latents for diffusion training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from underpaint.data.latents import LatentCache
from underpaint.data.loader import Batch
from underpaint.data.order import Blocks, Order, sample_seed
from underpaint.errors import ConfigError, DataError
from underpaint.training.ranks import Ranks

__all__ = ["LatentBatch", "latent_batches"]

_PATIENCE = 10.0


@attrs.frozen(eq=False)
class LatentBatch:
    """A micro-batch of standardised latents.

    Attributes:
        latents: B×d×h×w float32, on the CPU.
        inputs: B class indices or B captions, as the conditioner accepts.
        rows: Where the micro-batch stands in the global batch.
        images: B×H×W×3 uint8 images of the latents, flipped where these are of the flipped image; None unless asked
            for. On the CPU, or where the run keeps its images.
        cache: Where the latents are from; None for made-up ones.
        indices: B indices into the cache.
    """

    latents: Tensor
    inputs: Tensor | Sequence[str]
    rows: slice
    images: Tensor | None = None
    cache: LatentCache | None = None
    indices: NDArray[np.int64] | None = None

    @property
    def keys(self) -> Sequence[str]:
        """B names; read from the cache only when asked for."""
        assert self.cache is not None
        assert self.indices is not None
        return self.cache.keys(self.indices)


def latent_batches(
    cache: LatentCache,
    *,
    accepts: Literal["label", "text"],
    batch: int,
    accumulation: int,
    ranks: Ranks,
    seed: int,
    start: int,
    blocks: Blocks | None = None,
    images: Iterator[Batch] | None = None,
    samples: NDArray[np.int64] | None = None,
) -> Iterator[LatentBatch]:
    """Yield this rank's micro-batches without end, read ahead in a thread.

    The global batch at a step depends on the seed and the step only, not on ranks or accumulation.

    Args:
        cache: The latents.
        accepts: What the conditioner accepts.
        batch: Latents per step, over all ranks.
        accumulation: Micro-batches per step.
        ranks: The processes.
        seed: Seed of the order and of flips.
        start: First step.
        blocks: Blocks of the order, each read in one piece and a window ahead; None shuffles all latents.
        images: This rank's images of the same steps, in the same order, never flipped; closed at the end.
        samples: Position in the data set of every latent of the cache, which the images are checked against.

    Raises:
        ConfigError: The batch does not divide by ranks and accumulation.
        DataError: While iterating: an image can no longer be read.
    """
    parts = ranks.world_size * accumulation
    if batch % parts:
        raise ConfigError(
            f"A batch of {batch} does not divide by {ranks.world_size} ranks × {accumulation} micro-batches; "
            f"use a multiple of {parts}."
        )
    order = Order(len(cache), seed, blocks)
    flip = cache.identity.flip
    draws = cache.identity.store == "posterior"
    size = batch // parts

    def produce() -> Iterator[LatentBatch]:
        step = start
        ahead = start * batch
        while True:
            # The windows of this step, and the one after them.
            while blocks is not None and ahead <= order.next_window((step + 1) * batch - 1):
                for span in order.spans(ahead):
                    cache.prefetch(span)
                ahead = order.next_window(ahead)
            pictures = None if images is None else next(images).split(accumulation)
            for micro in range(accumulation):
                first = ranks.rank * size * accumulation + micro * size
                positions = range(step * batch + first, step * batch + first + size)
                indices = order.indices(positions)
                flips = np.array([sample_seed(seed, position) % 2 == 1 for position in positions]) if flip else None
                # Another seed than that of the flip, or one would tell of the other.
                seeds = [sample_seed(seed, position, 1) for position in positions] if draws else None
                yield LatentBatch(
                    cache.standardise(cache.read(indices, flips, seeds)),
                    _inputs(cache, indices, accepts),
                    slice(first, first + size),
                    None if pictures is None else _pictures(pictures[micro], cache, indices, samples, flips),
                    cache,
                    indices,
                )
            step += 1

    return _ahead(produce(), images)


def _inputs(cache: LatentCache, indices: NDArray[np.int64], accepts: str) -> Tensor | list[str]:
    if accepts == "text":
        return [text or "" for text in cache.texts(indices)]
    # Unlabelled data is all of one class; its conditioner has no class to tell apart either.
    return cache.labels(indices).clamp_min(0)


def _pictures(
    found: Batch,
    cache: LatentCache,
    indices: NDArray[np.int64],
    samples: NDArray[np.int64] | None,
    flips: NDArray[np.bool_] | None,
) -> Tensor:
    assert samples is not None
    # A reader replaces an image that it cannot decode by another one.
    wrong = np.flatnonzero(found.indices.numpy() != samples[indices])
    if wrong.size:
        raise DataError(
            f"The image '{cache.keys(indices[wrong[:1]])[0]}' can no longer be read, though its latent was made from "
            "it; restore it and start again to resume, or delete the folder of the latents and start again."
        )
    if flips is None:
        return found.images
    turned = torch.from_numpy(flips).to(found.images.device).view(-1, 1, 1, 1)
    return torch.where(turned, found.images.flip(2), found.images)


def _ahead(items: Iterator[Any], source: Iterator[Any] | None, depth: int = 4) -> Iterator[Any]:
    """Run an endless iterator in a daemon thread, a few items ahead; the thread closes what the items come from."""
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
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=work, daemon=True, name="latents")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        done.set()
        # Worker processes must be gone before this one ends, and so must a thread inside of torch, or the process dies
        # of it; a read that hangs must not hold it up.
        thread.join(_PATIENCE)

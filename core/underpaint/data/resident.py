"""Training batches from images that are decoded once and kept in memory, for small images and many epochs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from underpaint.data.loader import Batch, ImagePass, Transform
from underpaint.data.order import Blocks, Order, sample_seed
from underpaint.errors import ConfigError
from underpaint.interfaces.dataset import Dataset

__all__ = ["ResidentImages"]


class ResidentImages:
    """Endless shuffled batches of images that lie decoded in the memory of the training device.

    Every rank keeps all images: N·H·W·3 bytes. Which samples a global batch holds depends on seed and step alone, as
    with `ImageLoader`; broken images are left out once and for all.

    Args:
        dataset: Where samples come from.
        transform: Makes every image one size; without randomness, since it is called once.
        indices: Samples to use, as positions in the data set.
        device: Where they are kept.
        batch: Images per step over all ranks.
        seed: Seed of order and flips.
        flip: Flip half of the images of every step.
        rank: This process.
        world_size: Number of processes.
        workers: Reading processes.
        start_step: Steps already done.
        accumulation: Micro-batches that `Batch.split` will be asked for.
        blocks: Blocks of the order; None shuffles all samples.
        max_broken: Share of broken samples above which reading stops.

    Raises:
        ConfigError: The batch cannot be divided.
        DataError: Too many images are broken.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        transform: Transform,
        indices: NDArray[np.int64],
        device: torch.device,
        batch: int,
        seed: int,
        flip: bool,
        rank: int,
        world_size: int,
        workers: int,
        start_step: int,
        accumulation: int,
        blocks: Blocks | None = None,
        max_broken: float,
    ) -> None:
        if batch % (world_size * accumulation):
            raise ConfigError(
                f"A batch of {batch} cannot be divided among {world_size} ranks with {accumulation} micro-batches each."
            )
        found = list(
            ImagePass(
                dataset,
                transform=transform,
                batch=512,
                indices=indices,
                workers=workers,
                max_broken=max_broken,
            )
        )
        self._images = torch.cat([part.images for part in found]).to(device)
        labels = [part.labels for part in found if part.labels is not None]
        self._labels = torch.cat(labels) if labels else None
        self._texts = [text for part in found for text in part.texts or ()]
        self._keys = [key for part in found for key in part.keys]
        self._indices = torch.cat([part.indices for part in found])
        self._order = Order(len(self._keys), seed, blocks)
        self._batch, self._seed, self._flip = batch, seed, flip
        self._rank, self._share = rank, batch // world_size
        self._step = start_step

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batch of each step."""
        while True:
            first = self._step * self._batch + self._rank * self._share
            chosen = self._order.indices(np.arange(first, first + self._share))
            rows = torch.from_numpy(chosen)
            images = self._images[rows.to(self._images.device)]
            if self._flip:
                generator = torch.Generator().manual_seed(sample_seed(self._seed, self._step) >> 1)
                turned = torch.rand(self._batch, generator=generator)[first % self._batch :][: self._share] < 0.5
                images = torch.where(turned.to(images.device).view(-1, 1, 1, 1), images.flip(2), images)
            yield Batch(
                images=images,
                labels=None if self._labels is None else self._labels[rows],
                texts=tuple(self._texts[row] for row in chosen) if self._texts else None,
                keys=tuple(self._keys[row] for row in chosen),
                indices=self._indices[rows],
            )
            self._step += 1

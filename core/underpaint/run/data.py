"""The data sets of a run, and the latent cache made from them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

from underpaint.config.data import DataConfig, LatentsConfig
from underpaint.data.latent_writer import LatentCacheWriter, clear_cache
from underpaint.data.latents import CacheIdentity, LatentCache, draw_latents, require_shards
from underpaint.data.loader import Batch, ImageLoader, ImagePass
from underpaint.data.order import Blocks, Order, sample_seed
from underpaint.data.resident import ResidentImages
from underpaint.data.sources import open_dataset, split
from underpaint.data.transforms import Crop, to_tensor
from underpaint.errors import BrokenImageError, ConfigError, DataError
from underpaint.interfaces.adapter import Posterior
from underpaint.interfaces.dataset import Dataset
from underpaint.models.tokenizer import LatentStatistics, Tokenizer
from underpaint.training.ranks import Ranks

__all__ = ["RunData", "build_cache", "cache_statistics", "check_sizes", "open_run_data"]

_SPREAD_SEED = 7
_DRAW_SEED = 11
_LOOKED_AT = 32
# Images that one process reads in the seconds that others take to start.
_FEW = 1000


@attrs.frozen(eq=False, kw_only=True)
class RunData:
    """Training and validation samples.

    Attributes:
        config: The recipe's data section.
        train: Data set to train on.
        train_indices: Its samples that are trained on.
        validation: Data set to measure on; may be the same.
        validation_indices: Its samples that are measured on.
        left_out: How many samples are not trained on because they are smaller than ``data.min_side``.
    """

    config: DataConfig
    train: Dataset
    train_indices: NDArray[np.int64]
    validation: Dataset
    validation_indices: NDArray[np.int64]
    left_out: int = 0

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each label."""
        return self.train.classes

    def train_crop(self) -> Crop:
        """How training images are cut."""
        config = self.config
        return Crop(config.height, config.width, config.crop, config.flip, config.resize, config.zoom)

    def plain_crop(self) -> Crop:
        """How images are cut to be measured or encoded: from the middle, never flipped."""
        return Crop(self.config.height, self.config.width)

    def fingerprint(self, part: str = "train") -> str:
        """Return a hash of the samples of ``train`` or ``validation``."""
        dataset = self.train if part == "train" else self.validation
        indices = self.train_indices if part == "train" else self.validation_indices
        return hashlib.sha256(dataset.fingerprint().encode() + indices.tobytes()).hexdigest()[:32]

    def validation_pass(self, count: int, batch: int, ranks: Ranks | None = None) -> ImagePass:
        """Read this rank's share, all without `ranks`, of the first `count` validation images."""
        return self.read_once(self.validation, self.validation_indices[:count], batch, ranks)

    def train_pass(self, count: int, batch: int, ranks: Ranks) -> ImagePass:
        """Read this rank's share of `count` training images, always the same ones, cut as the validation images are."""
        return self.read_once(self.train, _limited(self.train_indices, count), batch, ranks)

    def read_once(
        self, dataset: Dataset, indices: NDArray[np.int64], batch: int, ranks: Ranks | None = None
    ) -> ImagePass:
        """Read this rank's share (without `ranks`: all) of samples of one of the two sets, cut to be measured."""
        rank, world_size = (0, 1) if ranks is None else (ranks.rank, ranks.world_size)
        return ImagePass(
            dataset,
            transform=self.plain_crop(),
            batch=batch,
            indices=indices,
            rank=rank,
            world_size=world_size,
            workers=self.config.workers if len(indices) > _FEW * world_size else 0,
            max_broken=self.config.max_broken,
        )

    def train_batches(
        self, batch: int, *, seed: int, start: int, accumulation: int, ranks: Ranks, blocks: Blocks | None = None
    ) -> Iterator[Batch]:
        """Read this rank's share of the training images, endlessly, from step `start` on; `blocks` are the order's."""
        if self.config.memory:
            yield from ResidentImages(
                self.train,
                transform=attrs.evolve(self.train_crop(), flip=False),
                indices=self.train_indices,
                device=ranks.device,
                batch=batch,
                seed=seed,
                flip=self.config.flip,
                rank=ranks.rank,
                world_size=ranks.world_size,
                workers=self.config.workers,
                start_step=start,
                accumulation=accumulation,
                blocks=blocks,
                max_broken=self.config.max_broken,
            )
        loader = ImageLoader(
            self.train,
            transform=self.train_crop(),
            batch=batch,
            seed=seed,
            indices=self.train_indices,
            rank=ranks.rank,
            world_size=ranks.world_size,
            workers=self.config.workers,
            start_step=start,
            accumulation=accumulation,
            blocks=blocks,
            max_broken=self.config.max_broken,
        )
        try:
            yield from loader
        finally:
            loader.close()

    def facts(self) -> dict[str, object]:
        """Return what the provenance says of the data."""
        small = {} if self.config.min_side is None else {"smaller_left_out": self.left_out}
        return {
            "train": {
                "name": self.train.spec.name,
                "samples": len(self.train_indices),
                **small,
                "hash": self.fingerprint(),
            },
            "validation": {
                "name": self.validation.spec.name,
                "samples": len(self.validation_indices),
                "hash": self.fingerprint("validation"),
            },
            "classes": len(self.classes),
        }


def open_run_data(config: DataConfig) -> RunData:
    """Open the data sets of a recipe.

    Raises:
        DataError: One cannot be read or is empty.
        ConfigError: The validation set has other classes than the training set.
    """
    train = open_dataset(config.train)
    if config.validation is None:
        train_indices, held_out = split(train, config.holdout)
        return RunData(
            config=config,
            train=train,
            train_indices=_limited(train_indices, config.limit),
            validation=train,
            validation_indices=_spread(held_out),
        )
    validation = open_dataset(config.validation)
    if validation.classes and train.classes and validation.classes != train.classes:
        raise ConfigError(
            f"data.validation has {len(validation.classes)} classes, which are not the {len(train.classes)} of "
            "data.train: its labels would mean something else."
        )
    return RunData(
        config=config,
        train=train,
        train_indices=_limited(np.arange(len(train), dtype=np.int64), config.limit),
        validation=validation,
        validation_indices=_spread(np.arange(len(validation), dtype=np.int64)),
    )


def check_sizes(data: RunData, stride: int) -> None:
    """Look at some training images, and refuse a crop that most of them are smaller than.

    Args:
        data: The images.
        stride: What a side of the crop is a multiple of.

    Raises:
        DataError: They are, and the recipe does not ask for it.
    """
    height, width = data.config.height, data.config.width
    if data.config.enlarge:
        return
    sizes = []
    count = len(data.train_indices)
    for place in range(0, count, max(1, count // _LOOKED_AT)):
        # What is broken is for the loader to say.
        with contextlib.suppress(BrokenImageError):
            sizes.append(data.train[int(data.train_indices[place])].image.shape[:2])
    small = [size for size in sizes if size[0] < height or size[1] < width]
    if 2 * len(small) <= len(sizes):
        return
    typical = sorted(small, key=min)[len(small) // 2]
    fits = min(typical) // stride * stride
    raise DataError(
        f"{len(small)} of {len(sizes)} training images that were looked at are smaller than the crop of "
        f"{height}×{width} px, and typically {typical[0]}×{typical[1]} px; "
        f"{f'set data.size to {fits} or less, or' if fits else 'use larger images, or set'} data.enlarge to true."
    )


def _limited(indices: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    """Draw a part of the samples once and for all, kept in their order so that files are read from front to back."""
    return indices if limit is None else np.sort(_spread(indices)[:limit])


def _spread(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Shuffle once and for all, so that the first N validation images show every class."""
    return indices[Order(len(indices), _SPREAD_SEED).indices(np.arange(len(indices)))]


def build_cache(
    folder: Path, tokenizer: Tokenizer, data: RunData, config: LatentsConfig, ranks: Ranks, *, rebuild: bool = False
) -> LatentCache:
    """Encode the training images into a latent cache, or finish or reuse the one that is there.

    Args:
        folder: Folder of the cache.
        tokenizer: On the device it is to run on, in evaluation mode.
        data: Whose training images are encoded, cut from the middle.
        config: Storage.
        ranks: Each rank encodes its shards.
        rebuild: Delete the cache that is there first.

    Raises:
        DataError: The folder holds a cache of another tokenizer, data set, image size or size of shards.
        ConfigError: The folder holds other files than a cache's; or posteriors or samples are to be stored and the
            tokenizer's latents are points.
    """
    height, width = data.config.height, data.config.width
    rows, columns = tokenizer.grid(height, width)
    identity = CacheIdentity(
        tokenizer=tokenizer.fingerprint(),
        data=data.fingerprint(),
        height=height,
        width=width,
        crop="center",
        flip=config.flip,
        dtype=config.dtype,
        store=config.store,
        shape=(tokenizer.latent_channels, rows, columns),
        count=len(data.train_indices),
    )
    if rebuild and ranks.is_main:
        clear_cache(folder)
    ranks.barrier()
    if not (folder / "index.json").exists():
        writer = LatentCacheWriter(
            folder, identity, shard_size=config.shard, rank=ranks.rank, world_size=ranks.world_size
        )
        _encode(writer, tokenizer, data, config, ranks)
        ranks.barrier()
        if ranks.is_main:
            writer.finish()
        ranks.barrier()
    cache = LatentCache(folder, identity, statistics=config.statistics)
    require_shards(folder, cache.shard_size, config.shard)
    return cache


@torch.inference_mode()
def _encode(
    writer: LatentCacheWriter, tokenizer: Tokenizer, data: RunData, config: LatentsConfig, ranks: Ranks
) -> None:
    missing = writer.missing_shards()
    if not missing:
        return
    positions = np.concatenate([np.asarray(writer.positions(shard)) for shard in missing])
    images = data.read_once(data.train, data.train_indices[positions], config.batch)
    found = _by_sample(images, tokenizer, config, ranks.device)
    waiting = next(found, None)
    for shard in missing:
        wanted = data.train_indices[np.asarray(writer.positions(shard))]
        shape = (len(wanted), *writer.identity.stored_shape)
        latents = torch.zeros(shape)
        flipped = torch.zeros(shape) if config.flip else None
        valid = np.zeros(len(wanted), dtype=np.bool_)
        keys = ["broken image"] * len(wanted)
        labels: list[int | None] = [None] * len(wanted)
        texts: list[str | None] = [None] * len(wanted)
        for row, index in enumerate(wanted):
            if waiting is None or waiting.index != index:
                continue
            valid[row] = True
            latents[row] = waiting.latent
            if flipped is not None and waiting.flipped is not None:
                flipped[row] = waiting.flipped
            keys[row], labels[row], texts[row] = waiting.key, waiting.label, waiting.text
            waiting = next(found, None)
        writer.write(shard, latents, keys=keys, labels=labels, texts=texts, valid=valid, flipped=flipped)


@attrs.frozen(eq=False)
class _Encoded:
    index: int
    latent: torch.Tensor
    flipped: torch.Tensor | None
    key: str
    label: int | None
    text: str | None


def _by_sample(
    images: ImagePass, tokenizer: Tokenizer, config: LatentsConfig, device: torch.device
) -> Iterator[_Encoded]:
    batch: Batch
    for batch in images:
        pixels = to_tensor(batch.images.to(device))
        indices = batch.indices.tolist()
        latents = _stored(tokenizer.posterior(pixels), config, indices, 0)
        flipped = _stored(tokenizer.posterior(pixels.flip(-1)), config, indices, 1) if config.flip else None
        for row, key in enumerate(batch.keys):
            yield _Encoded(
                indices[row],
                latents[row],
                None if flipped is None else flipped[row],
                key,
                None if batch.labels is None else int(batch.labels[row]),
                None if batch.texts is None else batch.texts[row],
            )


def _stored(posterior: Posterior, config: LatentsConfig, indices: Sequence[int], flipped: int) -> torch.Tensor:
    """Return what a cache stores of the posteriors of some images, on the CPU; `indices` say which images they are."""
    if config.store == "mode":
        return posterior.mode().float().cpu()
    if posterior.logvar is None:
        raise ConfigError(
            f"latents.store is '{config.store}', and this tokenizer's latents are points without a variance; use "
            "latents.store=mode, or --store mode with 'underpaint encode'."
        )
    mean, logvar = posterior.mean.float().cpu(), posterior.logvar.float().cpu()
    if config.store == "posterior":
        return torch.cat([mean, logvar], dim=1)
    # Keyed by the image, so that ranks, batches and restarts make no difference.
    return draw_latents(mean, logvar, [sample_seed(_DRAW_SEED, index, flipped) for index in indices])


def cache_statistics(cache: LatentCache) -> LatentStatistics:
    """Return the statistics that a cache standardises with, as a tokenizer keeps them."""
    return LatentStatistics(
        mean=tuple(cache.mean.flatten().tolist()),
        std=tuple(cache.std.flatten().tolist()),
        count=len(cache),
        data=cache.identity.data,
        grid=cache.identity.shape[1:] if cache.statistics == "position" else None,
    )

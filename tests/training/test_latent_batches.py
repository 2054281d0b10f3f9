"""Batches of latents with their images: the same samples, flipped alike, for any ranks, parts and start."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.models.test_folders import make_tokenizer
from tests.run.conftest import tiny_recipe
from torch import Tensor

from underpaint import BrokenImageError
from underpaint.config.data import LatentsConfig
from underpaint.data.latents import LatentCache
from underpaint.data.order import Blocks, Order
from underpaint.data.transforms import to_tensor
from underpaint.errors import DataError
from underpaint.interfaces.dataset import Dataset, Sample
from underpaint.run.data import RunData, build_cache, open_run_data
from underpaint.run.diffusion_stage import latent_images
from underpaint.training.latent_batches import LatentBatch, latent_batches
from underpaint.training.ranks import Ranks

BATCH = 12
SEED = 5


class Spoilt(Dataset):
    """A data set of which some samples cannot be decoded."""

    def __init__(self, inner: Dataset, broken: set[int]) -> None:
        self.inner, self.broken = inner, broken
        self.classes = inner.classes

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Sample:
        if index in self.broken:
            raise BrokenImageError(f"number {index}", "it is spoilt")
        return self.inner[index]

    def fingerprint(self) -> str:
        return self.inner.fingerprint()


def run_data(*overrides: str, broken: set[int] | None = None) -> RunData:
    # The recipe's crop is random and flipped: latents are of the plain crop nevertheless.
    data = open_run_data(tiny_recipe("data.crop=random", "data.flip=true", "data.max_broken=0.5", *overrides).data)
    return attrs.evolve(data, train=Spoilt(data.train, broken or set()))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    """Latents of all samples but two, and of their flipped copies."""
    broken = {int(i) for i in run_data().train_indices[[3, 17]]}
    config = LatentsConfig(flip=True, dtype="float32", shard=7, batch=4)
    folder = tmp_path_factory.mktemp("cache") / "latents"
    with Ranks("cpu") as ranks:
        found = build_cache(folder, make_tokenizer(), run_data(broken=broken), config, ranks)
    assert len(found) == len(run_data().train_indices) - 2
    return found


Read = Callable[..., list[LatentBatch]]


@pytest.fixture
def read(cache: LatentCache) -> Read:
    """Read some micro-batches of a rank, and end the stream."""

    def read(
        count: int,
        *,
        data: RunData | None = None,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
        start: int = 0,
        blocks: Blocks | None = None,
    ) -> list[LatentBatch]:
        data = data or run_data()
        ranks: Any = SimpleNamespace(rank=rank, world_size=world, device=torch.device("cpu"))
        samples: NDArray[np.int64] = data.train_indices[cache.positions]
        images = latent_images(data, samples, BATCH, SEED, start, parts, ranks, blocks)
        stream = latent_batches(
            cache,
            accepts="label",
            batch=BATCH,
            accumulation=parts,
            ranks=ranks,
            seed=SEED,
            start=start,
            blocks=blocks,
            images=images,
            samples=samples,
        )
        found = list(islice(stream, count))
        stream.close()  # type: ignore[attr-defined]
        return found

    return read


def images(batches: list[LatentBatch]) -> Tensor:
    return torch.cat([batch.images for batch in batches if batch.images is not None])


ORDERS = pytest.mark.parametrize("blocks", [None, Blocks(4, 2)], ids=["random", "sequential"])


@ORDERS
@pytest.mark.parametrize("memory", ["false", "true"])
def test_the_images_are_those_that_the_latents_were_made_from(
    cache: LatentCache, read: Read, memory: str, blocks: Blocks | None
) -> None:
    # Three epochs of a small cache, so that every sample comes by, flipped and not.
    batches = read(9, data=run_data(f"data.memory={memory}", "data.crop=center"), blocks=blocks)
    found = images(batches)
    assert found.shape == (9 * BATCH, 32, 32, 3)
    with torch.no_grad():
        again = cache.standardise(make_tokenizer().encode(to_tensor(found)))
    latents = torch.cat([batch.latents for batch in batches])
    torch.testing.assert_close(again, latents, rtol=1e-3, atol=1e-3)
    # The test could tell a flip: other orientations have other latents.
    with torch.no_grad():
        turned = cache.standardise(make_tokenizer().encode(to_tensor(found.flip(2))))
    assert float((turned - latents).abs().flatten(1).amax(1).min()) > 0.05


def test_both_orientations_come(cache: LatentCache, read: Read) -> None:
    whole = read(9)
    plain = {image.numpy().tobytes() for image in images(whole)}
    turned = {image.numpy().tobytes() for image in images(whole).flip(2)}
    assert len(plain & turned) > 4


def test_images_come_through_workers_too(read: Read) -> None:
    assert torch.equal(images(read(2)), images(read(2, data=run_data("data.workers=1"))))


@ORDERS
@pytest.mark.parametrize(("world", "parts"), [(1, 3), (2, 1), (3, 2)])
def test_ranks_and_parts_divide_the_same_batch(read: Read, world: int, parts: int, blocks: Blocks | None) -> None:
    whole = read(3, blocks=blocks)
    size = BATCH // (world * parts)
    for rank in range(world):
        own = read(3 * parts, rank=rank, world=world, parts=parts, blocks=blocks)
        for index, batch in enumerate(own):
            step, micro = divmod(index, parts)
            first = (rank * parts + micro) * size
            assert batch.rows == slice(first, first + size)
            assert batch.images is not None
            assert whole[step].images is not None
            assert torch.equal(batch.images, whole[step].images[batch.rows])
            assert torch.equal(batch.latents, whole[step].latents[batch.rows])


@ORDERS
def test_it_goes_on_where_it_stopped(read: Read, blocks: Blocks | None) -> None:
    whole, later = read(5, blocks=blocks), read(2, start=3, blocks=blocks)
    for first, second in zip(whole[3:], later, strict=True):
        assert first.images is not None
        assert second.images is not None
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.latents, second.latents)


def test_an_image_that_has_become_unreadable_stops_it(cache: LatentCache, read: Read) -> None:
    index = int(run_data().train_indices[cache.positions[4]])
    with pytest.raises(DataError, match=r"can no longer be read, though its latent was made from it; restore it"):
        read(9, data=run_data(broken={index}))


def test_without_images_there_are_none(cache: LatentCache) -> None:
    with Ranks("cpu") as ranks:
        stream = latent_batches(cache, accepts="label", batch=4, accumulation=1, ranks=ranks, seed=0, start=0)
        assert next(stream).images is None
        stream.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("start", [0, 2])
def test_blocks_are_asked_for_before_they_are_read(
    cache: LatentCache, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    blocks, steps = Blocks(4, 2), 7
    asked: list[range] = []
    reads: list[tuple[NDArray[np.int64], int]] = []
    fetch = cache.read

    def read(indices: NDArray[np.int64], *others: Any) -> Tensor:
        reads.append((indices, len(asked)))
        return fetch(indices, *others)

    monkeypatch.setattr(cache, "prefetch", asked.append)
    monkeypatch.setattr(cache, "read", read)
    with Ranks("cpu") as ranks:
        stream = latent_batches(
            cache, accepts="label", batch=6, accumulation=1, ranks=ranks, seed=SEED, start=start, blocks=blocks
        )
        assert len(list(islice(stream, steps))) == steps
        stream.close()  # type: ignore[attr-defined]
    order = Order(len(cache), SEED, blocks)
    for step, (indices, before) in enumerate(reads[:steps], start):
        assert np.array_equal(indices, order.indices(range(step * 6, step * 6 + 6)))
        # The windows of the step's own samples, and the window after them.
        wanted, position = [], step * 6
        while position < step * 6 + 6:
            wanted += order.spans(position)
            position = order.next_window(position)
        wanted += order.spans(position)
        assert all(span in asked[:before] for span in wanted)
        assert set(indices.tolist()) <= {index for span in wanted for index in span}
    # Nothing is asked for twice in an epoch of windows, however many steps a window lasts.
    windows, position = 0, start * 6
    while position <= (start + len(reads)) * 6:
        windows, position = windows + 1, order.next_window(position)
    assert len(asked) <= (windows + 2) * (blocks.window + 1)

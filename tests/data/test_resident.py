"""Images kept in memory: the order of the loader, without reading twice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from underpaint import BrokenImageError, ConfigError, DataError, Dataset, Sample
from underpaint.config.component import ComponentConfig
from underpaint.config.data import DataConfig
from underpaint.data.loader import Batch, ImageLoader
from underpaint.data.resident import ResidentImages
from underpaint.data.transforms import Crop

CROP = Crop(8, 12)


class Counted(Dataset):
    """Image i shows the number i; some are broken; every reading is counted."""

    classes = ("even", "odd")
    has_text = True

    def __init__(self, length, broken=(), *, bare=False):
        self.length = length
        self.broken = frozenset(broken)
        self.bare = bare
        self.reads = 0

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.reads += 1
        if index in self.broken:
            raise BrokenImageError(f"n{index}", "it is torn")
        image = np.random.default_rng(index).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        facts = {} if self.bare else {"label": index % 2, "text": f"number {index}"}
        return Sample(image=image, key=f"n{index}", **facts)

    def fingerprint(self):
        return f"{self.length}"


def resident(dataset, indices=None, **changes):
    settings = {
        "batch": 4,
        "seed": 3,
        "flip": False,
        "rank": 0,
        "world_size": 1,
        "workers": 0,
        "start_step": 0,
        "accumulation": 1,
        "max_broken": 0.5,
    }
    chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    return ResidentImages(dataset, transform=CROP, indices=chosen, device=torch.device("cpu"), **(settings | changes))


def take(images, count) -> list[Batch]:
    return list(itertools.islice(iter(images), count))


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def test_an_epoch_shows_every_sample_once():
    seen = keys(take(resident(Counted(12)), 9))
    epochs = [seen[i : i + 12] for i in (0, 12, 24)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"n{i}" for i in range(12))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_batches_run_over_the_end_of_an_epoch():
    seen = keys(take(resident(Counted(10)), 5))
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(f"n{i}" for i in range(10))


def test_nothing_is_read_twice():
    dataset = Counted(12)
    images = resident(dataset)
    take(images, 9)
    assert dataset.reads == 12


def test_it_shows_what_the_loader_shows():
    indices = [7, 3, 1, 9, 4, 0, 8]
    loader = ImageLoader(Counted(12), transform=CROP, batch=4, seed=3, indices=indices)
    for ours, theirs in zip(take(resident(Counted(12), indices), 6), loader):
        assert ours.keys == theirs.keys
        assert ours.texts == theirs.texts
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.indices, theirs.indices)


@pytest.mark.parametrize("flip", [False, True])
def test_ranks_share_the_batch_of_one(flip):
    whole = take(resident(Counted(12), flip=flip), 5)
    parts = [take(resident(Counted(12), flip=flip, rank=rank, world_size=2), 5) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        assert batch.keys == parts[0][step].keys + parts[1][step].keys
        assert torch.equal(batch.images, torch.cat([parts[0][step].images, parts[1][step].images]))
        assert not set(parts[0][step].keys) & set(parts[1][step].keys)


def test_it_goes_on_at_a_step():
    straight = take(resident(Counted(12), flip=True), 8)
    resumed = take(resident(Counted(12), flip=True, start_step=5), 3)
    for ours, theirs in zip(resumed, straight[5:], strict=True):
        assert ours.keys == theirs.keys
        assert torch.equal(ours.images, theirs.images)


def test_half_of_the_images_are_flipped_others_each_time():
    dataset = Counted(8)
    original = {f"n{i}": torch.from_numpy(dataset[i].image) for i in range(8)}
    flipped = 0
    states = {}
    for batch in take(resident(dataset, flip=True), 100):
        for key, image in zip(batch.keys, batch.images, strict=True):
            mirrored = torch.equal(image, original[key].flip(1))
            assert mirrored or torch.equal(image, original[key])
            flipped += mirrored
            states.setdefault(key, set()).add(mirrored)
    # 400 draws; four standard deviations.
    assert abs(flipped - 200) < 40
    assert all(seen == {False, True} for seen in states.values())


def test_flipping_leaves_the_kept_images_as_they_are():
    images = resident(Counted(4), flip=True)
    before = images._images.clone()
    take(images, 10)
    assert torch.equal(images._images, before)


def test_broken_images_are_left_out_and_labels_stay_with_theirs():
    seen = take(resident(Counted(12, broken={2, 5, 6})), 9)
    for start in (0, 9, 18, 27):
        assert sorted(keys(seen)[start : start + 9]) == sorted(f"n{i}" for i in range(12) if i not in (2, 5, 6))
    for batch in seen:
        numbers = [int(key[1:]) for key in batch.keys]
        assert batch.labels.tolist() == [number % 2 for number in numbers]
        assert batch.indices.tolist() == numbers
        assert batch.texts == tuple(f"number {number}" for number in numbers)
        for number, image in zip(numbers, batch.images, strict=True):
            assert torch.equal(image, torch.from_numpy(Counted(12)[number].image))


def test_a_data_set_may_lack_labels_and_texts():
    (batch,) = take(resident(Counted(5, bare=True)), 1)
    assert batch.labels is None
    assert batch.texts is None
    assert len(batch.split(2)) == 2


def test_nothing_but_broken_images_is_an_error():
    with pytest.raises(DataError, match="4 of 4 samples read are broken"):
        resident(Counted(4, broken=range(4)))


def test_a_batch_that_cannot_be_divided_is_refused_before_reading():
    dataset = Counted(12)
    with pytest.raises(ConfigError, match="4 cannot be divided among 3 ranks"):
        resident(dataset, world_size=3)
    assert dataset.reads == 0


def test_random_crops_are_refused():
    with pytest.raises(ConfigError, match=r"data.memory keeps every image as one crop, and data.crop is 'random'"):
        DataConfig(train=ComponentConfig(name="scenes/shapes"), memory=True, crop="random")

"""Batches: the same for any number of ranks and workers, resumable, honest about broken samples."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from underpaint import BrokenImageError, ConfigError, DataError, Dataset, Sample
from underpaint.data.loader import Batch, ImageLoader, ImagePass
from underpaint.data.transforms import Crop

CROP = Crop(12, 12, "random", flip=True)


class Numbers(Dataset):
    """Image i shows the number i; some are broken."""

    classes = ("even", "odd")
    has_text = True

    def __init__(self, length, broken=()):
        self.length = length
        self.broken = frozenset(broken)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenImageError(f"n{index}", "it is torn")
        image = np.random.default_rng(index).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        return Sample(image=image, key=f"n{index}", label=index % 2, text=f"number {index}")

    def fingerprint(self):
        return f"{self.length} {sorted(self.broken)}"


class Faulty(Numbers):
    def __init__(self, length, error):
        super().__init__(length)
        self.error = error

    def __getitem__(self, index):
        raise self.error


class Bare(Numbers):
    """Some samples lack a label, or a text."""

    def __init__(self, what):
        super().__init__(8)
        self.what = what

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        given = {"label": sample.label, "text": sample.text}
        if index == 5:
            given[self.what] = None
        return Sample(image=sample.image, key=sample.key, **given)


class Deadly(Numbers):
    """Kills the process that reads it, as the kernel does when memory runs out."""

    def __getitem__(self, index):
        if index == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def global_steps(dataset, steps, *, world_size=1, workers=0, start_step=0, batch=8, **options):
    """The global batches: ids and a hash of the pixels, ranks joined."""
    found = [[] for _ in range(steps)]
    for rank in range(world_size):
        loader = ImageLoader(
            dataset,
            transform=CROP,
            batch=batch,
            seed=11,
            rank=rank,
            world_size=world_size,
            workers=workers,
            start_step=start_step,
            **options,
        )
        try:
            for step in range(steps):
                part = next(loader)
                assert len(part) == batch // world_size
                found[step] += list(
                    zip(part.keys, part.indices.tolist(), [hash(i.numpy().tobytes()) for i in part.images])
                )
        finally:
            loader.close()
    return found


BROKEN = Numbers(50, broken=[3, 4, 17, 30])


@pytest.fixture(scope="module")
def reference():
    return global_steps(BROKEN, 14, max_broken=0.2)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batches_are_the_same_for_any_number_of_ranks(reference, world_size):
    assert global_steps(BROKEN, 14, world_size=world_size, max_broken=0.2) == reference


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 2), (4, 1)])
def test_global_batches_are_the_same_for_any_number_of_workers(reference, world_size, workers):
    assert global_steps(BROKEN, 14, world_size=world_size, workers=workers, max_broken=0.2) == reference


@pytest.mark.parametrize("start_step", [1, 5, 9])
def test_resuming_is_skipping(reference, start_step):
    rest = global_steps(BROKEN, 14 - start_step, start_step=start_step, world_size=2, max_broken=0.2)
    assert rest == reference[start_step:]


def test_closing_keeps_the_place(reference):
    loader = ImageLoader(BROKEN, transform=CROP, batch=8, seed=11, max_broken=0.2)
    seen = []
    for _ in range(4):
        seen.append(list(next(loader).keys))
        loader.close()
    assert loader.step == 4
    assert seen == [[key for key, _, _ in step] for step in reference[:4]]


def test_an_epoch_reads_every_sample_once():
    steps = global_steps(Numbers(48), 12)
    for epoch in (steps[:6], steps[6:]):
        assert sorted(index for step in epoch for _, index, _ in step) == list(range(48))
    assert steps[:6] != steps[6:]


def test_augmentation_differs_between_epochs():
    steps = global_steps(Numbers(8), 6)
    views = {image for step in steps for _, index, image in step if index == 0}
    assert len(views) > 1


def test_only_the_chosen_samples_are_read():
    chosen = np.array([40, 3, 11, 29])
    steps = global_steps(Numbers(50), 5, indices=chosen, batch=4)
    assert all(sorted(index for _, index, _ in step) == [3, 11, 29, 40] for step in steps)


def test_a_batch_carries_what_its_samples_say():
    batch = next(ImageLoader(BROKEN, transform=CROP, batch=32, seed=0, max_broken=0.5))
    assert batch.images.shape == (32, 12, 12, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == [index % 2 for index in batch.indices.tolist()]
    assert batch.texts == tuple(f"number {index}" for index in batch.indices.tolist())
    assert batch.keys == tuple(f"n{index}" for index in batch.indices.tolist())
    assert batch.wait_seconds > 0
    assert not set(batch.indices.tolist()) & BROKEN.broken


def test_micro_batches_are_the_batch_in_pieces():
    batch = next(ImageLoader(Numbers(50), transform=CROP, batch=12, seed=0, accumulation=3))
    parts = batch.split(3)
    assert [len(part) for part in parts] == [4, 4, 4]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    assert sum((part.texts for part in parts), ()) == batch.texts
    assert sum(part.wait_seconds for part in parts) == batch.wait_seconds


def test_labels_and_texts_may_be_absent():
    class Plain(Numbers):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return Sample(image=sample.image, key=sample.key)

    batch = next(ImageLoader(Plain(9), transform=CROP, batch=3, seed=0))
    assert isinstance(batch, Batch)
    assert batch.labels is None
    assert batch.texts is None


@pytest.mark.parametrize("what", ["label", "text"])
def test_a_label_on_some_samples_only_is_an_error(what):
    with pytest.raises(DataError, match=f"'n5' has no {what} while others have one"):
        list(ImagePass(Bare(what), transform=CROP, batch=8))


@pytest.mark.parametrize(("batch", "world_size", "accumulation"), [(10, 4, 1), (8, 2, 3), (0, 1, 1)])
def test_a_batch_that_cannot_be_divided_is_refused(batch, world_size, accumulation):
    said = f"{batch} images .* {world_size} ranks × {accumulation} .* multiple of {world_size * accumulation}"
    with pytest.raises(ConfigError, match=said):
        ImageLoader(Numbers(9), transform=CROP, batch=batch, seed=0, world_size=world_size, accumulation=accumulation)


@pytest.mark.parametrize(("length", "indices"), [(0, None), (5, [])])
def test_nothing_to_read_is_an_error(length, indices):
    with pytest.raises(DataError, match=f"has {length} samples and none"):
        ImageLoader(Numbers(length), transform=CROP, batch=1, seed=0, indices=indices)


# ------------------------------------------------------------------------------------------ broken samples


def test_broken_samples_are_counted_and_named(caplog):
    caplog.set_level(logging.WARNING, "underpaint")
    loader = ImageLoader(Numbers(60, broken=range(25)), transform=CROP, batch=60, seed=0, max_broken=0.6)
    for _ in range(4):
        next(loader)
    assert loader.broken >= 100  # 25 in each epoch, and replacements that were broken too
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 20
    assert len(set(said)) == 20
    assert all("it is torn" in line for line in said)
    assert said[-1].endswith("(further ones are counted only)")


def test_too_many_broken_samples_stop_the_reading():
    loader = ImageLoader(Numbers(1000, broken=range(0, 1000, 10)), transform=CROP, batch=10, seed=0, max_broken=0.02)
    said = (
        r"of \d{3} samples read are broken, and the limit is 2.00%: n\d+: it is torn; n.* data.max_broken in a recipe"
    )
    with pytest.raises(DataError, match=said):
        for _ in range(50):
            next(loader)
    assert loader.step >= 8  # the first 100 reads are too few to judge by


@pytest.mark.parametrize("limit", [0.0, 0.01])
def test_ten_percent_are_found_out_soon(limit):
    loader = ImageLoader(Numbers(1000, broken=range(100)), transform=CROP, batch=10, seed=0, max_broken=limit)
    with pytest.raises(DataError, match="are broken"):
        for _ in range(20):
            next(loader)


def test_a_few_broken_samples_do_not():
    # 5 in 1000 at a limit of 1 %: an unlucky start, two among the first hundred, must not stop a run.
    for seed in range(10):
        loader = ImageLoader(Numbers(1000, broken=range(5)), transform=CROP, batch=100, seed=seed, max_broken=0.01)
        for _ in range(10):
            next(loader)
        assert loader.broken >= 5


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_nothing_but_broken_samples_stops_at_once(workers):
    loader = ImageLoader(Numbers(5, broken=range(5)), transform=CROP, batch=4, seed=0, workers=workers, max_broken=1.0)
    with pytest.raises(DataError, match="16 of 16 samples read are broken: .*; remove or replace them.$"):
        next(loader)
    loader.close()


# ------------------------------------------------------------------------------------------ one pass


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_one_pass_is_in_order_with_every_sample_once(world_size, workers):
    chosen = np.arange(30)[::-1]
    seen, sizes = [], []
    for rank in range(world_size):
        batches = list(
            ImagePass(
                Numbers(30),
                transform=CROP,
                batch=4,
                indices=chosen,
                rank=rank,
                world_size=world_size,
                workers=workers,
            )
        )
        assert all(len(batch) == 4 for batch in batches[:-1])
        sizes.append(sum(map(len, batches)))
        seen += [index for batch in batches for index in batch.indices.tolist()]
    assert seen == chosen.tolist()
    assert max(sizes) - min(sizes) <= 1


def test_one_pass_leaves_broken_samples_out(caplog):
    caplog.set_level(logging.WARNING, "underpaint")
    read = ImagePass(BROKEN, transform=CROP, batch=7, max_broken=0.2)
    for _ in range(2):  # a second pass counts anew
        seen = [index for batch in read for index in batch.indices.tolist()]
        assert seen == [index for index in range(50) if index not in BROKEN.broken]
        assert read.broken == 4
        assert read.broken_names == tuple(f"n{i}: it is torn" for i in (3, 4, 17, 30))
    assert "4 of 50 samples were broken and left out" in caplog.text


def test_a_pass_over_a_few_broken_samples_fails():
    with pytest.raises(DataError, match="3 of 3 samples read are broken"):
        list(ImagePass(BROKEN, transform=CROP, batch=2, indices=[3, 4, 17], max_broken=0.9))


def test_more_ranks_than_samples_leaves_some_without():
    counts = [
        sum(map(len, ImagePass(Numbers(2), transform=CROP, batch=4, rank=rank, world_size=4))) for rank in range(4)
    ]
    assert sorted(counts) == [0, 0, 1, 1]


# ------------------------------------------------------------------------------------------ workers


@pytest.mark.slow
def test_an_error_of_the_data_set_arrives_as_it_is():
    loader = ImageLoader(Faulty(9, DataError("The disk is gone.")), transform=CROP, batch=2, seed=0, workers=1)
    with pytest.raises(DataError, match=r"^The disk is gone\.$"):
        next(loader)
    loader.close()


@pytest.mark.slow
@pytest.mark.parametrize("error", [OSError("bad plumbing"), RuntimeError("bad plumbing")])
def test_a_bug_in_a_worker_is_not_called_a_death(error):
    loader = ImageLoader(Faulty(9, error), transform=CROP, batch=2, seed=0, workers=1)
    with pytest.raises(type(error), match="bad plumbing"):
        next(loader)
    loader.close()


@pytest.mark.slow
def test_a_killed_worker_is_named_within_thirty_seconds():
    loader = ImageLoader(Deadly(40), transform=CROP, batch=8, seed=0, workers=2)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"process that reads images was killed \(pid \d+ by SIGKILL\)"):
        for _ in range(10):
            next(loader)
    assert time.monotonic() - start < 30
    loader.close()


TRAINING = """
import multiprocessing
import time

import underpaint
from underpaint.data.loader import ImageLoader
from underpaint.data.transforms import Crop

if __name__ == "__main__":
    dataset = underpaint.create("dataset", "scenes/shapes", length=64, size=16)
    loader = ImageLoader(dataset, transform=Crop(16, 16), batch=8, seed=0, workers=2)
    next(loader)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
def test_workers_end_with_a_training_that_is_killed(tmp_path):
    (tmp_path / "training.py").write_text(TRAINING)
    with subprocess.Popen([sys.executable, tmp_path / "training.py"], stdout=subprocess.PIPE, text=True) as training:
        try:
            workers = [int(pid) for pid in training.stdout.readline().split()]
        finally:
            training.kill()
    assert len(workers) == 2
    end = time.monotonic() + 60
    while not all(map(ended, workers)):
        assert time.monotonic() < end, "workers live on"
        time.sleep(0.1)


@pytest.mark.slow
def test_workers_leave_the_random_numbers_of_the_run_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    loader = ImageLoader(Numbers(9), transform=CROP, batch=2, seed=0, workers=1)
    next(loader)
    loader.close()
    assert torch.equal(torch.rand(3), expected)


PLUGIN = """
import numpy as np
from underpaint import Dataset, Sample, hookimpl

class Grey(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return Sample(image=np.full((12, 12, 3), index, dtype=np.uint8), key=str(index))
    def fingerprint(self):
        return "grey"

@hookimpl
def register_datasets(register):
    register("grey", f"{__name__}:Grey")
"""


@pytest.mark.slow
def test_workers_know_data_sets_of_single_file_plugins(tmp_path):
    from underpaint.registration.discovery import Switches
    from underpaint.registration.manager import PluginManager, reset_manager

    path = tmp_path / "grey_plugin.py"
    path.write_text(PLUGIN)
    plugins = PluginManager(Switches(only=(), extra=(str(path),)))
    reset_manager(plugins)
    try:
        loader = ImageLoader(plugins.create("dataset", "grey"), transform=CROP, batch=4, seed=0, workers=1)
        assert sorted(next(loader).images[:, 0, 0, 0].tolist()) == [0, 1, 2, 3]
        loader.close()
    finally:
        reset_manager()

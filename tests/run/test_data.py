"""Which samples a run trains on and measures on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.run.conftest import tiny_recipe
from underpaint.errors import ConfigError
from underpaint.run.data import open_run_data


def test_held_out_samples_are_never_trained_on() -> None:
    data = open_run_data(tiny_recipe().data)
    assert len(data.train_indices) == 32
    assert len(data.validation_indices) == 8
    assert not set(data.train_indices) & set(data.validation_indices)


def test_a_limit_draws_the_same_part_every_time_and_never_from_what_is_held_out() -> None:
    whole, part = open_run_data(tiny_recipe().data), open_run_data(tiny_recipe("data.limit=10").data)
    again = open_run_data(tiny_recipe("data.limit=10").data)
    assert len(part.train_indices) == 10
    assert set(part.train_indices) < set(whole.train_indices)
    np.testing.assert_array_equal(part.train_indices, again.train_indices)
    np.testing.assert_array_equal(part.validation_indices, whole.validation_indices)
    assert part.fingerprint() == again.fingerprint() != whole.fingerprint()
    assert part.fingerprint("validation") == whole.fingerprint("validation")


def test_many_images_are_read_once_by_workers_and_few_in_the_process_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from underpaint.data import loader

    used = []
    reads = loader._reads

    def noted(reader: Any, positions: Any, workers: int) -> Any:
        used.append(workers)
        return reads(reader, positions, workers)

    monkeypatch.setattr(loader, "_reads", noted)
    data = open_run_data(tiny_recipe("data.train.length=1200", "data.workers=1", "data.holdout=0.02").data)
    few = list(data.validation_pass(8, 4))
    many = list(data.train_pass(1100, 100, SimpleNamespace(rank=0, world_size=1)))  # type: ignore[arg-type]
    share = list(data.train_pass(1100, 100, SimpleNamespace(rank=1, world_size=2)))  # type: ignore[arg-type]
    assert used == [0, 1, 0]
    assert [sum(map(len, batches)) for batches in (few, many, share)] == [8, 1100, 550]
    whole, half = (torch.cat([batch.images for batch in batches]) for batches in (many, share))
    assert torch.equal(whole[550:], half)


def test_a_limit_above_the_number_of_samples_takes_all() -> None:
    assert len(open_run_data(tiny_recipe("data.limit=1000").data).train_indices) == 32


def test_validation_of_other_classes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe("data.validation={name: scenes/shapes, length: 5, size: 32, seed: 9}")
    data = open_run_data(recipe.data)
    assert len(data.validation_indices) == 5
    from underpaint.run import data as module

    opened = module.open_dataset

    def other(config: object) -> object:
        dataset = opened(config)  # type: ignore[arg-type]
        if config is recipe.data.validation:
            dataset.classes = ("something", "else")
        return dataset

    monkeypatch.setattr(module, "open_dataset", other)
    with pytest.raises(ConfigError, match="2 classes"):
        open_run_data(recipe.data)

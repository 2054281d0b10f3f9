"""What the training tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from underpaint.training.ranks import Ranks


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute as the ranks of the tests do: the number of threads changes the order of additions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def alone() -> Iterator[Ranks]:
    """A world of one process on the CPU."""
    with Ranks("cpu") as ranks:
        yield ranks

"""What the training tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from underpaint.training.ranks import Ranks


@pytest.fixture
def alone() -> Iterator[Ranks]:
    """A world of one process on the CPU."""
    with Ranks("cpu") as ranks:
        yield ranks

"""Leaves out training images that are too small, found once for a run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from underpaint.config.recipe import write_atomically
from underpaint.errors import BrokenImageError, DataError
from underpaint.interfaces.dataset import Dataset
from underpaint.run.data import RunData
from underpaint.training.ranks import Ranks

__all__ = ["leave_out_small"]


def leave_out_small(data: RunData, path: Path, ranks: Ranks) -> RunData:
    """Return the data without training images whose short side is below ``data.min_side``. Every rank calls it.

    Each rank looks at the headers of its share of the images. Which ones are small is kept in a file, and read from
    there as long as data and setting are the same.

    Args:
        data: All images.
        path: The file.
        ranks: The processes.

    Raises:
        DataError: No image is left.
    """
    least = data.config.min_side
    if least is None:
        return data
    origin = {"data": data.fingerprint(), "min_side": least}
    small = ranks.broadcast_object(_known(path, origin) if ranks.is_main else None)
    if small is None:
        share = np.array_split(data.train_indices, ranks.world_size)[ranks.rank]
        small = [index for part in ranks.all_gather_object(_smaller(data.train, share, least)) for index in part]
        if ranks.is_main:
            write_atomically(path, json.dumps({**origin, "small": small}) + "\n")
    kept = data.train_indices[~np.isin(data.train_indices, np.array(small, dtype=np.int64))]
    if not len(kept):
        raise DataError(
            f"All {len(small)} training images have a short side below {least} px; lower data.min_side, set it to "
            "null, or give larger images."
        )
    return attrs.evolve(data, train_indices=kept, left_out=len(small))


def _known(path: Path, origin: dict[str, Any]) -> list[int] | None:
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    small: list[int] = found.pop("small")
    return small if found == origin else None


def _smaller(dataset: Dataset, indices: NDArray[np.int64], least: int) -> list[int]:
    small = []
    for index in indices.tolist():
        # What is broken is for the loader to say and to count.
        with contextlib.suppress(BrokenImageError):
            if dataset.short_side(index) < least:
                small.append(index)
    return small

"""The order of samples, as a pure function of seed and position.

Nothing is kept between calls, so the state of a data stream is one integer, valid for any number of
ranks and workers.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Order", "sample_seed"]

_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8
_MIN_BITS = 6


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea, Flood 2014, figure 17): a bijection of 64-bit words."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _hash(*numbers: int) -> int:
    text = "/".join(map(str, numbers))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Order:
    """A shuffled order that repeats for ever, another one in each epoch.

    Position p belongs to epoch p // length. Within an epoch the order is a keyed permutation: a Feistel
    network on the next power of two, walked until it falls below the length (Black and Rogaway 2002).

    Args:
        length: Number of samples, at least 1.
        seed: Any integer.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError(f"An order needs at least one sample, not {length}.")
        self.length = length
        self.seed = seed
        # Very small networks permute badly; below 64 it is cheaper to walk than to add rounds.
        bits = max((length - 1).bit_length(), _MIN_BITS)
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64(2 ** (bits // 2) - 1)
        self._high_mask = np.uint64(2 ** (bits - bits // 2) - 1)
        self._key = np.uint64(_hash(seed))

    def index(self, position: int) -> int:
        """Return the sample at a position.

        Args:
            position: 0 or above, over all epochs.

        Returns:
            Between 0 and length − 1.
        """
        return int(self.indices([position])[0])

    def indices(self, positions: Any) -> NDArray[np.int64]:
        """Return the samples at several positions.

        Args:
            positions: Integers of any order and number, 0 or above.

        Returns:
            As many indices between 0 and length − 1.
        """
        position = np.asarray(positions, dtype=np.int64).reshape(-1)
        assert position.size == 0 or position.min() >= 0, "positions start at 0"
        epoch, place = np.divmod(position.astype(np.uint64), np.uint64(self.length))
        keys = _mix(self._key ^ _mix(epoch + np.uint64(_GOLDEN)))
        result = self._permute(place, keys)
        while (outside := result >= self.length).any():
            result[outside] = self._permute(result[outside], keys[outside])
        return result.astype(np.int64)

    def _permute(self, value: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = value >> self._low_bits, value & self._low_mask
        for turn in range(0, _ROUNDS, 2):
            high = high ^ (_mix(keys + low * np.uint64(_GOLDEN) + np.uint64(turn)) & self._high_mask)
            low = low ^ (_mix(keys + high * np.uint64(_GOLDEN) + np.uint64(turn + 1)) & self._low_mask)
        return (high << self._low_bits) | low


def sample_seed(seed: int, position: int, attempt: int = 0) -> int:
    """Return the seed of one sample's random numbers, the same in whichever process it is read.

    Args:
        seed: Seed of the run.
        position: Position of the sample, over all epochs.
        attempt: How many broken samples this one replaces.

    Returns:
        Between 0 and 2^64 − 1.
    """
    return _hash(seed, position, attempt)

"""The order of samples, as a pure function of seed and position.

Nothing is kept between calls, so the state of a data stream is one integer, valid for any number of
ranks and workers.
"""

from __future__ import annotations

import hashlib
from typing import Any

import attrs
import numpy as np
from attrs import validators as v
from numpy.typing import NDArray

__all__ = ["Blocks", "Order", "sample_seed"]

_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8
_MIN_BITS = 6
# What tells the random numbers of an epoch apart.
_BLOCKS, _ROTATION = 1, 2


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea, Flood 2014, figure 17): a bijection of 64-bit words."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _hash(*numbers: int) -> int:
    text = "/".join(map(str, numbers))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@attrs.frozen
class Blocks:
    """Shuffling for reading from front to back.

    Attributes:
        size: Consecutive samples of a block, which is read in one piece.
        window: Blocks whose samples are mixed with each other.
    """

    size: int = attrs.field(validator=v.gt(0))
    window: int = attrs.field(validator=v.gt(0))


class _Permutation:
    """Keyed permutations of 0 … length − 1.

    A Feistel network on the next power of two, walked until it falls below the length (Black and Rogaway 2002).
    """

    def __init__(self, length: int) -> None:
        self.length = length
        # Very small networks permute badly; below 64 it is cheaper to walk than to add rounds.
        bits = max((length - 1).bit_length(), _MIN_BITS)
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64(2 ** (bits // 2) - 1)
        self._high_mask = np.uint64(2 ** (bits - bits // 2) - 1)

    def __call__(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        result = self._network(values, keys)
        while (outside := result >= self.length).any():
            result[outside] = self._network(result[outside], keys[outside])
        return result

    def _network(self, value: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = value >> self._low_bits, value & self._low_mask
        for turn in range(0, _ROUNDS, 2):
            high = high ^ (_mix(keys + low * np.uint64(_GOLDEN) + np.uint64(turn)) & self._high_mask)
            low = low ^ (_mix(keys + high * np.uint64(_GOLDEN) + np.uint64(turn + 1)) & self._low_mask)
        return (high << self._low_bits) | low


class Order:
    """A shuffled order that repeats for ever, another one in each epoch.

    Position p belongs to epoch p // length. Within an epoch the order is a keyed permutation of all samples. With
    `blocks` it is that of blocks of consecutive samples, and of the samples within each window of blocks: every
    window's samples lie in a few pieces, its `spans`. Where the first block begins is drawn for each epoch, so that
    other samples are neighbours, and the shorter rest, which comes last, is another one.

    Args:
        length: Number of samples, at least 1.
        seed: Any integer.
        blocks: Blocks and window; None shuffles all samples.
    """

    def __init__(self, length: int, seed: int, blocks: Blocks | None = None) -> None:
        if length < 1:
            raise ValueError(f"An order needs at least one sample, not {length}.")
        self.length = length
        self.seed = seed
        self.blocks = blocks
        self._key = np.uint64(_hash(seed))
        self._all = _Permutation(length)
        if blocks is not None:
            self._reach = min(blocks.size * blocks.window, length)
            self._whole = length // blocks.size
            self._slots = _Permutation(max(self._whole, 1))
            self._inside = _Permutation(self._reach)
            self._last = _Permutation(length % self._reach or self._reach)

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
        found = self._all(place, keys) if self.blocks is None else self._by_blocks(place, keys)
        return found.astype(np.int64)

    def spans(self, position: int) -> list[range]:
        """Return the pieces that the samples of a position's window lie in, of an order with blocks."""
        assert self.blocks is not None
        epoch, place = divmod(position, self.length)
        keys = _mix(self._key ^ _mix(np.array([epoch], dtype=np.uint64) + np.uint64(_GOLDEN)))
        start = place // self._reach * self._reach
        firsts = np.arange(start, min(start + self._reach, self.length), self.blocks.size, dtype=np.uint64)
        begins = self._begin(firsts, np.broadcast_to(keys, firsts.shape)).astype(np.int64)
        found = []
        for first, begin in zip(firsts.tolist(), begins.tolist(), strict=True):
            end = begin + min(self.blocks.size, self.length - first)
            # The rotation may cut a block in two.
            found += [range(begin, min(end, self.length)), *([range(end - self.length)] if end > self.length else [])]
        return found

    def next_window(self, position: int) -> int:
        """Return the first position of the window after that of a position, of an order with blocks."""
        epoch, place = divmod(position, self.length)
        return epoch * self.length + min((place // self._reach + 1) * self._reach, self.length)

    def _by_blocks(self, place: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        assert self.blocks is not None
        window, inside = np.divmod(place, np.uint64(self._reach))
        own = _mix(keys + (window + np.uint64(1)) * np.uint64(_GOLDEN))
        cut = window == self.length // self._reach
        inside[~cut] = self._inside(inside[~cut], own[~cut])
        inside[cut] = self._last(inside[cut], own[cut])
        mixed = window * np.uint64(self._reach) + inside
        row = mixed % np.uint64(self.blocks.size)
        return (self._begin(mixed - row, keys) + row) % np.uint64(self.length)

    def _begin(self, first: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return the sample with which the block begins whose first place in the epoch is given."""
        assert self.blocks is not None
        slot = first // np.uint64(self.blocks.size)
        whole = slot < self._whole
        slot[whole] = self._slots(slot[whole], _mix(keys[whole] ^ np.uint64(_BLOCKS)))
        rotation = _mix(keys ^ np.uint64(_ROTATION)) % np.uint64(self.length)
        return (slot * np.uint64(self.blocks.size) + rotation) % np.uint64(self.length)


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

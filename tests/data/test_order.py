"""The stateless order: a permutation in every epoch, a pure function of seed and position."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from underpaint.data.order import Blocks, Order, sample_seed

SEEDS = st.integers(-(2**70), 2**70)


@settings(max_examples=200)
@given(length=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_every_epoch_holds_every_sample_once(length, seed, epoch):
    order = Order(length, seed).indices(np.arange(epoch * length, (epoch + 1) * length))
    assert np.array_equal(np.sort(order), np.arange(length))


@settings(max_examples=100)
@given(length=st.integers(1, 10**12), seed=SEEDS, positions=st.lists(st.integers(0, 2**61), max_size=20))
def test_one_position_and_many_agree(length, seed, positions):
    order = Order(length, seed)
    many = order.indices(positions)
    assert [order.index(position) for position in positions] == many.tolist()
    assert all(0 <= index < length for index in many)


def test_epochs_and_seeds_differ():
    epochs = {tuple(Order(100, 0).indices(np.arange(100) + 100 * epoch)) for epoch in range(50)}
    seeds = {tuple(Order(100, seed).indices(np.arange(100))) for seed in range(50)}
    assert len(epochs) == len(seeds) == 50
    assert tuple(range(100)) not in epochs | seeds


def test_four_samples_come_in_all_orders_equally_often():
    # χ² over the 24 orders has mean 23 and variance 46 when all are equally likely.
    epochs, seeds = 6000, 25
    statistics = []
    for seed in range(seeds):
        orders = Order(4, seed).indices(np.arange(4 * epochs)).reshape(epochs, 4)
        counts = Counter(map(tuple, orders.tolist()))
        assert len(counts) == math.factorial(4)
        statistics.append(sum((count - epochs / 24) ** 2 / (epochs / 24) for count in counts.values()))
    assert abs(np.mean(statistics) - 23) < 4 * math.sqrt(46 / seeds)


@pytest.mark.parametrize("length", [50, 64, 300])
def test_neighbours_are_unrelated(length):
    # The distance of successive samples is uniform on 1 … n−1; the statistic has mean 1 and σ = √(2/df).
    epochs = 600
    order = Order(length, 5).indices(np.arange(length * epochs)).reshape(epochs, length)
    gaps = np.bincount((np.diff(order, axis=1) % length).ravel(), minlength=length)[1:]
    expected = gaps.sum() / len(gaps)
    freedom = len(gaps) - 1
    assert ((gaps - expected) ** 2 / expected).sum() / freedom < 1 + 4 * math.sqrt(2 / freedom)


def test_an_empty_order_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        Order(0, 0)


@given(seed=SEEDS, position=st.integers(0, 2**62), attempt=st.integers(0, 20))
def test_sample_seeds_are_words_that_repeat(seed, position, attempt):
    value = sample_seed(seed, position, attempt)
    assert 0 <= value < 2**64
    assert value == sample_seed(seed, position, attempt)


def test_sample_seeds_differ_in_each_argument():
    values = {sample_seed(a, b, c) for a in range(20) for b in range(20) for c in range(5)}
    assert len(values) == 2000
    assert sample_seed(1, 23) != sample_seed(12, 3)


# ------------------------------------------------------------------------------------------------------ by blocks

BLOCKS = st.builds(Blocks, size=st.integers(1, 300), window=st.integers(1, 9))


@settings(max_examples=150)
@given(length=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**6), blocks=BLOCKS)
def test_every_epoch_by_blocks_holds_every_sample_once(length, seed, epoch, blocks):
    order = Order(length, seed, blocks).indices(np.arange(epoch * length, (epoch + 1) * length))
    assert np.array_equal(np.sort(order), np.arange(length))


@settings(max_examples=100)
@given(length=st.integers(1, 10**12), seed=SEEDS, positions=st.lists(st.integers(0, 2**61), max_size=20), blocks=BLOCKS)
def test_one_position_and_many_agree_by_blocks(length, seed, positions, blocks):
    order = Order(length, seed, blocks)
    many = order.indices(positions)
    assert [order.index(position) for position in positions] == many.tolist()
    assert all(0 <= index < length for index in many)


@settings(max_examples=60)
@given(
    length=st.integers(1, 120),
    seed=SEEDS,
    epoch=st.integers(0, 1000),
    blocks=st.builds(Blocks, size=st.integers(4, 60), window=st.integers(1, 5)),
)
def test_a_window_is_read_in_as_many_pieces_as_it_has_blocks(length, seed, epoch, blocks):
    order = Order(length, seed, blocks)
    position, end, pieces = epoch * length, (epoch + 1) * length, 0
    while position < end:
        following = order.next_window(position)
        assert position < following <= end
        spans = order.spans(position)
        assert order.spans(following - 1) == spans
        # The rotation of the epoch cuts one block in two at most.
        assert len(spans) <= blocks.window + 1
        pieces += len(spans)
        inside = order.indices(np.arange(position, following))
        assert np.array_equal(np.sort(inside), np.sort(np.concatenate([np.asarray(span) for span in spans])))
        position = following
    assert pieces <= -(-length // blocks.size) + 1


@settings(max_examples=200)
@given(seed=SEEDS, start=st.integers(0, 10**9), count=st.integers(1, 400), size=st.integers(1, 200))
def test_consecutive_positions_touch_few_blocks(seed, start, count, size):
    # Far more samples than a window holds: without blocks, nearly every position would touch a block of its own.
    length, window = 10**8, 4
    found = np.sort(Order(length, seed, Blocks(size, window)).indices(np.arange(start, start + count)))
    # Samples of one block are less than a block apart; the run reaches into one window more than it fills, and the
    # end of an epoch may cut off a window and a block.
    pieces = 1 + int((np.diff(found) >= size).sum())
    windows = -(-(count - 1) // (size * window)) + 1
    assert pieces <= window * (windows + 1) + 1


def test_epochs_seeds_and_windows_differ_by_blocks():
    blocks = Blocks(10, 3)
    epochs = {tuple(Order(100, 0, blocks).indices(np.arange(100) + 100 * epoch)) for epoch in range(50)}
    seeds = {tuple(Order(100, seed, blocks).indices(np.arange(100))) for seed in range(50)}
    assert len(epochs) == len(seeds) == 50
    order = Order(90, 0, blocks).indices(np.arange(90)).reshape(3, 30)
    # The way in which a window is shuffled is its own, or every window would repeat the first.
    assert len({tuple(np.argsort(window)) for window in order}) == 3


def test_samples_come_at_every_place_equally_often_by_blocks():
    # Blocks of 3 of 7 samples, in windows of 2: the rest of one sample comes last, and is another one each time.
    epochs = 7000
    order = Order(7, 3, Blocks(3, 2)).indices(np.arange(7 * epochs)).reshape(epochs, 7)
    counts = np.stack([np.bincount(order[:, place], minlength=7) for place in range(7)])
    # χ² with 6 degrees of freedom at each place: 35 is passed by chance once in 200,000.
    assert (((counts - epochs / 7) ** 2) / (epochs / 7)).sum(axis=1).max() < 35


@given(length=st.integers(1, 500), seed=SEEDS)
@settings(max_examples=50)
def test_one_window_of_everything_shuffles_as_well(length, seed):
    # The block is larger than the data: one piece, in another order than it lies in.
    order = Order(length, seed, Blocks(1000, 4))
    assert np.array_equal(np.sort(order.indices(np.arange(length))), np.arange(length))
    assert sum(map(len, order.spans(0))) == length
    assert order.next_window(0) == length

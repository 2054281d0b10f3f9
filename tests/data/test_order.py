"""The stateless order: a permutation in every epoch, a pure function of seed and position."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from underpaint.data.order import Order, sample_seed

SEEDS = st.integers(-(2**70), 2**70)


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_every_epoch_holds_every_sample_once(length, seed, epoch):
    order = Order(length, seed).indices(np.arange(epoch * length, (epoch + 1) * length))
    assert np.array_equal(np.sort(order), np.arange(length))


@settings(max_examples=100, deadline=None)
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

"""Probes of a representation: neighbours worked out by hand, and classes that a plane separates or does not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from underpaint.evaluation.probe import linear_probe, nearest_neighbours


def direction(*degrees: float) -> Tensor:
    """Vectors of several lengths: only their angle counts."""
    angles = [math.radians(angle) for angle in degrees]
    return torch.tensor([[(i + 1) * math.cos(a), (i + 1) * math.sin(a)] for i, a in enumerate(angles)])


def test_a_vote_worked_out_by_hand() -> None:
    # From 0°, class 0 lies at 10° and class 1 at 30°, −30° and 180°.
    features, labels = direction(10, 30, -30, 180), torch.tensor([0, 1, 1, 1])
    query = direction(0)

    def answered(right: int, k: int, temperature: float) -> float:
        return nearest_neighbours(features, labels, query, torch.tensor([right]), k=k, temperature=temperature)

    # The nearest alone is of class 0.
    assert answered(0, 1, 0.07) == 1.0
    # cos 10° = 0.985, cos 30° = 0.866. At 0.07 the votes are exp(14.07) = 1.29e6 and 2·exp(12.37) = 0.47e6.
    assert answered(0, 3, 0.07) == 1.0
    # At 1 they are 2.68 and 2·2.38 = 4.75.
    assert answered(1, 3, 1.0) == 1.0
    # More neighbours than there are: all of them.
    assert answered(1, 50, 1.0) == 1.0
    assert answered(0, 50, 1.0) == 0.0


def test_the_share_of_right_answers() -> None:
    features, labels = direction(0, 90, 180), torch.tensor([0, 1, 2])
    queries = direction(5, 85, 95, 175).repeat(600, 1)
    answers = torch.tensor([0, 1, 0, 2]).repeat(600)
    assert nearest_neighbours(features, labels, queries, answers, k=1) == 0.75


def clouds(count: int, seed: int, centres: Tensor, spread: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, len(centres), (count,), generator=generator)
    return centres[labels] + spread * torch.randn(count, centres.shape[1], generator=generator), labels


def test_a_plane_separates_what_is_separable() -> None:
    # Centres far from zero and of very different scales, which standardising takes away.
    centres = torch.tensor([[100.0, 0.0, 0.01], [101.0, 0.0, 0.01], [100.0, 50.0, 0.01], [100.0, 0.0, 0.02]])
    spread = torch.tensor([0.05, 2.0, 0.0005])
    train, queries = clouds(400, 0, centres, spread), clouds(200, 1, centres, spread)
    assert linear_probe(*train, *queries, batch=64, lr=0.05) > 0.98


def test_no_plane_separates_the_exclusive_or() -> None:
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    (x, corner), (queries, other) = clouds(400, 0, corners, 0.05), clouds(400, 1, corners, 0.05)
    accuracy = linear_probe(x, corner // 2, queries, other // 2, batch=64, lr=0.05)
    assert accuracy < 0.8
    assert nearest_neighbours(x - 0.5, corner // 2, queries - 0.5, other // 2) > 0.98


def test_labels_that_mean_nothing_are_guessed() -> None:
    generator = torch.Generator().manual_seed(0)
    features, queries = torch.randn(300, 8, generator=generator), torch.randn(1000, 8, generator=generator)
    labels = torch.randint(0, 4, (300,), generator=generator)
    answers = torch.randint(0, 4, (1000,), generator=generator)
    # A quarter; five standard deviations.
    assert linear_probe(features, labels, queries, answers, batch=64) == pytest.approx(0.25, abs=0.07)


def test_the_seed_decides() -> None:
    train, queries = clouds(100, 0, torch.eye(3), 0.6), clouds(100, 1, torch.eye(3), 0.6)
    first = linear_probe(*train, *queries, epochs=5, batch=16, lr=0.05)
    torch.manual_seed(5)
    assert linear_probe(*train, *queries, epochs=5, batch=16, lr=0.05) == first

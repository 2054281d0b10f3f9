"""The table of class embeddings."""

from __future__ import annotations

import pytest
import torch

import underpaint
from underpaint import Condition, Conditioner, DataError

CPU = torch.device("cpu")


def make(classes: int = 5, width: int = 8) -> Conditioner:
    torch.manual_seed(0)
    return underpaint.create("conditioner", "labels", width=width, classes=classes)


def pooled(condition: Condition) -> torch.Tensor:
    assert condition.tokens is None
    assert condition.mask is None
    assert condition.pooled is not None
    return condition.pooled


def test_shapes_and_declarations() -> None:
    labels = make()
    assert labels.accepts == "label"
    assert (labels.pooled_dim, labels.token_dim) == (8, 0)
    assert sum(p.numel() for p in labels.parameters()) == (5 + 1) * 8
    assert pooled(labels(torch.tensor([0, 4, 2]))).shape == (3, 8)


def test_every_class_and_none_has_its_own_vector() -> None:
    labels = make()
    rows = torch.cat((pooled(labels(torch.arange(5))), pooled(labels.null(1, CPU))))
    assert len(torch.unique(rows, dim=0)) == 6


def test_dropped_samples_get_the_null_condition() -> None:
    labels = make()
    given = torch.tensor([1, 2, 3])
    kept = pooled(labels(given))
    mixed = pooled(labels(given, drop=torch.tensor([False, True, False])))
    null = pooled(labels.null(3, CPU))
    assert torch.equal(mixed[[0, 2]], kept[[0, 2]])
    assert torch.equal(mixed[1], null[1])
    assert not torch.equal(kept[1], null[1])
    assert torch.equal(given, torch.tensor([1, 2, 3]))


def test_null_and_labels_are_both_learned() -> None:
    labels = make()
    pooled(labels(torch.tensor([3, 3]), drop=torch.tensor([False, True]))).sum().backward()
    (gradient,) = [p.grad for p in labels.parameters()]
    assert gradient is not None
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("wrong", [-1, 5, 1000])
def test_label_out_of_range_is_named(wrong: int) -> None:
    with pytest.raises(DataError, match=f"The label {wrong} was given to a model of 5 classes; labels are 0 to 4"):
        make()(torch.tensor([0, wrong, 1]))


def test_texts_are_refused() -> None:
    with pytest.raises(DataError, match="was given texts"):
        make()(["a red square"])


def test_without_classes_everything_is_null() -> None:
    labels = make(classes=0)
    assert torch.equal(pooled(labels(torch.zeros(4, dtype=torch.long))), pooled(labels.null(4, CPU)))

"""Checks of conditioners."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from underpaint.interfaces.conditioner import Condition, Conditioner
from underpaint.testing.kit import Subject, check, expect
from underpaint.testing.modules import PROBES, close, convert, disturb, tensors

__all__: list[str] = []

_TEXTS = ["a red fox", "two boats on a lake at dawn", "", "snow"]


def _given(subject: Subject, component: Conditioner, batch: int) -> Tensor | list[str]:
    if component.accepts == "text":
        return [_TEXTS[index % len(_TEXTS)] for index in range(batch)]
    return torch.arange(batch).remainder(int(subject.context["classes"]))


def _probe(subject: Subject, component: Conditioner, batch: int) -> tuple[Any, ...]:
    return _given(subject, component, batch), torch.arange(batch) % 2 == 1


PROBES["conditioner"] = _probe


@check("conditioner")
def condition_as_declared(subject: Subject) -> None:
    """Tokens, mask and pooled vector have the declared widths, for inputs and for the null condition."""
    conditioner = subject.make()
    expect(conditioner.accepts in ("label", "text"), f"accepts is '{conditioner.accepts}', not 'label' or 'text'")
    expect(conditioner.pooled_dim > 0 or conditioner.token_dim > 0, "it declares neither pooled_dim nor token_dim")
    with torch.no_grad():
        given = conditioner(_given(subject, conditioner, 3))
        null = conditioner.null(3, torch.device("cpu"))
    for what, condition in (("inputs", given), ("null", null)):
        expect(isinstance(condition, Condition), f"{what}: made a {type(condition).__name__}, not a Condition")
        pooled = None if condition.pooled is None else tuple(condition.pooled.shape)
        wanted = (3, conditioner.pooled_dim) if conditioner.pooled_dim else None
        expect(pooled == wanted, f"{what}: pooled has shape {pooled}; pooled_dim declares {wanted}")
        tokens = None if condition.tokens is None else (len(condition.tokens), condition.tokens.shape[-1])
        wanted = (3, conditioner.token_dim) if conditioner.token_dim else None
        expect(tokens == wanted, f"{what}: tokens have (batch, width) {tokens}; token_dim declares {wanted}")
        if condition.mask is not None:
            expect(
                condition.tokens is not None and condition.mask.shape == condition.tokens.shape[:2],
                f"{what}: the mask does not cover the tokens",
            )


@check("conditioner")
def dropped_is_null(subject: Subject) -> None:
    """Dropped samples get the null condition, the others keep their own, and the two differ."""
    conditioner = subject.make()
    disturb(conditioner)
    inputs = _given(subject, conditioner, 4)
    drop = torch.tensor([True, False, True, False])
    with torch.no_grad():
        mixed, plain = conditioner(inputs, drop), conditioner(inputs)
        null = conditioner.null(4, torch.device("cpu"))
    close(convert(mixed, lambda v: v[drop]), convert(null, lambda v: v[drop]), "dropped samples and null", 1e-6)
    close(convert(mixed, lambda v: v[~drop]), convert(plain, lambda v: v[~drop]), "samples not dropped", 1e-6)
    same = all(
        torch.allclose(a[1].double(), b[1].double())
        for (_, a), (_, b) in zip(tensors(plain), tensors(null), strict=True)
        if a.is_floating_point()
    )
    expect(not same, "the null condition equals that of an input")


@check("conditioner")
def joins_with_null(subject: Subject) -> None:
    """Inputs and null condition stack into one batch, as guidance evaluates them."""
    conditioner = subject.make()
    with torch.no_grad():
        joined = Condition.join(conditioner(_given(subject, conditioner, 2)), conditioner.null(2, torch.device("cpu")))
    for path, value in tensors(joined):
        expect(len(value) == 4, f"{path} has a batch of {len(value)}, not 4")


@check("conditioner")
def inputs_matter(subject: Subject) -> None:
    """Different inputs give different conditions."""
    conditioner = subject.make()
    disturb(conditioner)
    with torch.no_grad():
        condition = conditioner(_given(subject, conditioner, 2))
    floats = [value for _, value in tensors(condition) if value.is_floating_point()]
    expect(any(not torch.allclose(value[0], value[1]) for value in floats), "two inputs give one condition")

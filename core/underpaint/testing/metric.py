"""Checks of metrics."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import torch
from torch import Tensor

from underpaint.interfaces.metric import Metric
from underpaint.testing.kit import NotApplicable, Subject, check, expect
from underpaint.testing.modules import generator

__all__: list[str] = []

_COUNT = 12


def _images(subject: Subject, seed: int) -> Tensor:
    """Smooth random images: noise would be far from anything a feature extractor was made for."""
    height, width = subject.size or (64, 64)
    coarse = torch.rand((_COUNT, 3, 8, 8), generator=generator(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)


def _pair(subject: Subject, component: Metric) -> tuple[Tensor, Tensor]:
    references = _images(subject, 0)
    if not component.paired:
        return _images(subject, 1), references
    # Each image is noisier than the one before, so that a mean of batches is not the mean of their images.
    scale = torch.linspace(0.02, 0.3, _COUNT).view(-1, 1, 1, 1)
    noise = torch.randn(references.shape, generator=generator(2))
    return (references + scale * noise).clamp(-1, 1), references


def _value(metric: Metric, *updates: tuple[Tensor | None, Tensor | None]) -> dict[str, float]:
    for images, references in updates:
        metric.update(images, references)
    return metric.compute()


def _same(first: dict[str, float], second: dict[str, float], what: str, tolerance: float = 1e-3) -> None:
    expect(list(first) == list(second), f"{what}: values are {list(first)} and {list(second)}")
    for name, value in first.items():
        equal = value == second[name] or math.isclose(value, second[name], rel_tol=tolerance, abs_tol=1e-5)
        expect(equal, f"{what}: '{name}' is {value:.6g} and {second[name]:.6g}")


@check("metric")
def values_are_numbers(subject: Subject) -> None:
    """``compute`` returns named Python floats, finite for images that differ."""
    metric = subject.make()
    values = _value(metric, _pair(subject, metric))
    expect(isinstance(values, dict) and len(values) > 0, f"compute returned {values!r}, not a dict of floats")
    for name, value in values.items():
        expect(isinstance(name, str) and type(value) is float, f"'{name}' is a {type(value).__name__}, not a float")
        expect(math.isfinite(value), f"'{name}' is {value}")


@check("metric")
def declares_direction(subject: Subject) -> None:
    """``paired`` and ``higher_is_better`` are stated."""
    metric = subject.make()
    expect(isinstance(metric.paired, bool), f"paired is {metric.paired!r}, not True or False")
    better = metric.higher_is_better
    expect(isinstance(better, bool), f"higher_is_better is {better!r}, not True or False")


@check("metric")
def updates_add_up(subject: Subject) -> None:
    """Two updates of unequal size give what one update with all images gives."""
    metric = subject.make()
    images, references = _pair(subject, metric)
    whole = _value(subject.make(), (images, references))
    parts = _value(metric, (images[:5], references[:5]), (images[5:], references[5:]))
    _same(parts, whole, "in two updates and in one")


@check("metric")
def reset_forgets(subject: Subject) -> None:
    """After ``reset`` nothing of earlier images is left, and what is loaded stays."""
    metric = subject.make()
    pair = _pair(subject, metric)
    first = _value(metric, pair)
    metric.reset()
    _value(metric, (_images(subject, 8), _images(subject, 9)))
    metric.reset()
    _same(_value(metric, pair), first, "before and after reset", 1e-6)


@check("metric")
def identical_is_best(subject: Subject) -> None:
    """Images equal to their references give a better value than images that are not."""
    metric = subject.make()
    if not metric.paired:
        raise NotApplicable("It compares distributions, not pairs.")
    images, references = _pair(subject, metric)
    perfect = _value(subject.make(), (references, references.clone()))
    noisy = _value(metric, (images, references))
    for name, value in perfect.items():
        better = value > noisy[name] if metric.higher_is_better else value < noisy[name]
        expect(better, f"'{name}' is {value:.6g} for identical images and {noisy[name]:.6g} for noisy ones")


@check("metric")
def sides_in_any_order(subject: Subject) -> None:
    """A metric of distributions accepts either side alone, in any order."""
    metric = subject.make()
    if metric.paired:
        raise NotApplicable("It compares pairs.")
    images, references = _pair(subject, metric)
    apart = _value(metric, (None, references), (images, None))
    _same(apart, _value(subject.make(), (images, references)), "with both sides apart and together")


@check("metric")
def ranks_merge(subject: Subject) -> None:
    """Two ranks with half of the images each, reduced as torchmetrics does, agree with one that saw all."""
    first, second = subject.make(), subject.make()
    images, references = _pair(subject, first)
    whole = _value(subject.make(), (images, references))
    first.update(images[:5], references[:5])
    second.update(images[5:], references[5:])
    expect(bool(first.metric_state), "it has no state declared with add_state, so ranks cannot agree")
    _reduce(first, second)
    _same(first.compute(), whole, "reduced over two ranks and on one")


def _reduce(first: Metric, second: Metric) -> None:
    """Bring the states of two ranks together in the way of ``Metric.sync``, without processes."""
    reductions: dict[str, Any] = dict(first._reductions)
    for name, reduce in reductions.items():
        sides: list[Any] = [metric.metric_state[name] for metric in (first, second)]
        if isinstance(sides[0], list):
            gathered: Any = [
                torch.cat([item.reshape(-1) if item.ndim == 0 else item for item in side]) for side in sides
            ]
        else:
            gathered = torch.stack(sides)
        setattr(first, name, gathered if reduce is None else reduce(gathered))


@check("metric")
def pickles_with_state(subject: Subject) -> None:
    """It can be pickled half way, and goes on from there."""
    metric = subject.make()
    images, references = _pair(subject, metric)
    metric.update(images[:5], references[:5])
    again = pickle.loads(pickle.dumps(metric))  # noqa: S301 - what we pickled ourselves
    _same(
        _value(again, (images[5:], references[5:])),
        _value(metric, (images[5:], references[5:])),
        "with and without pickling",
        1e-6,
    )


@check("metric")
def protocol_tells_enough(subject: Subject) -> None:
    """The protocol is JSON, the same for equal metrics, and names the weights of a network if there is one."""
    metric = subject.make()
    protocol = dict(metric.protocol())
    expect(bool(protocol), "the protocol is empty; numbers without one cannot be compared")
    expect(all(isinstance(key, str) for key in protocol), "a key of the protocol is not a text")
    again = json.loads(json.dumps(protocol))
    other = json.loads(json.dumps(dict(subject.make().protocol())))
    expect(again == other, f"two equal metrics have the protocols {again} and {other}")
    if any(True for _ in metric.parameters()):
        named = any("weights" in key or "hash" in key for key in protocol)
        expect(named, f"it measures with a network, and the protocol {list(protocol)} has no hash of its weights")


@check("metric")
def leaves_images_alone(subject: Subject) -> None:
    """It changes neither images nor references."""
    metric = subject.make()
    images, references = _pair(subject, metric)
    before = images.clone(), references.clone()
    metric.update(images, references)
    expect(torch.equal(images, before[0]) and torch.equal(references, before[1]), "update changed its inputs in place")

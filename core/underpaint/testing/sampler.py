"""Checks of samplers, on flows whose solution is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from underpaint.interfaces.sampler import FreshNoise, Sampler, VelocityField
from underpaint.testing.kit import Subject, check, expect
from underpaint.testing.modules import generator

__all__: list[str] = []

_SHAPE = (2, 4, 3, 5)


def _noise() -> Tensor:
    return torch.randn(_SHAPE, generator=generator())


def _watched(field: VelocityField) -> tuple[list[float], VelocityField]:
    """Return a list that fills with the times at which the field is evaluated, and the field."""
    times: list[float] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        expect(tuple(t.shape) == (x.shape[0],), f"the field was called with t of shape {tuple(t.shape)}, not B")
        expect(bool((t == t[0]).all()), "the samples of a batch were at different times")
        times.append(float(t[0]))
        return field(x, t)

    return times, watched


def _fresh(noise: Tensor, first: int = 0) -> FreshNoise:
    """Return a source of noise whose samples have the seeds `first`, `first` + 1 and so on."""
    sources = [generator(100 + first + index) for index in range(len(noise))]
    return lambda: torch.stack([torch.randn(noise.shape[1:], generator=source) for source in sources]).to(noise)


def _sample(sampler: Sampler, field: VelocityField) -> Tensor:
    with torch.no_grad():
        return sampler.sample(field, _noise(), _fresh(_noise()))


@check("sampler")
def constant_flow_is_exact(subject: Subject) -> None:
    """A constant velocity v carries noise ε to ε − v exactly."""
    velocity = torch.randn(_SHAPE, generator=generator(1))
    result = _sample(subject.make(), lambda x, t: velocity)
    gap = float((result - (_noise() - velocity)).abs().max())
    expect(tuple(result.shape) == _SHAPE, f"noise of {_SHAPE} became {tuple(result.shape)}")
    expect(gap < 1e-4, f"it ends {gap:.3g} away from noise − velocity")


@check("sampler")
def linear_flow_converges(subject: Subject) -> None:
    """On dx/dt = x, whose solution is x(0) = x(1)/e, it is at least as exact as Euler's method on its grid."""
    times, field = _watched(lambda x, t: x)
    result = _sample(subject.make(), field)
    gap = float((result - _noise() * math.exp(-1)).abs().max() / _noise().abs().max())
    points = sorted({*times, 0.0, 1.0})
    # Euler's local error is h²/2 · |x''| and |x''| ≤ |x(1)| here, so that its global error stays below h.
    bound = max(b - a for a, b in pairwise(points))
    expect(gap <= bound, f"its relative error is {gap:.3g}, with steps of at most {bound:.3g}")


@check("sampler")
def time_runs_down(subject: Subject) -> None:
    """The field is evaluated from t = 1 downwards, within [0, 1]."""
    times, field = _watched(lambda x, t: torch.ones_like(x))
    _sample(subject.make(), field)
    expect(bool(times), "the field was never evaluated")
    expect(abs(times[0] - 1.0) < 1e-6, f"the first evaluation is at t = {times[0]}, not 1")
    expect(all(0.0 <= t <= 1.0 for t in times), f"evaluations leave [0, 1]: {times}")
    expect(all(b <= a + 1e-9 for a, b in pairwise(times)), f"the time goes back up: {times}")


@check("sampler")
def repeats_with_seed(subject: Subject) -> None:
    """The same noise, at the start and on the way, gives the same latents, bit by bit."""
    field: Callable[[Tensor, Tensor], Tensor] = lambda x, t: x * t.view(-1, 1, 1, 1)  # noqa: E731
    sampler = subject.make()
    torch.manual_seed(1)
    first = _sample(sampler, field)
    torch.manual_seed(2)
    expect(
        torch.equal(first, _sample(sampler, field)), "two runs differ; is randomness drawn that `fresh` does not give?"
    )


@check("sampler")
def samples_are_independent(subject: Subject) -> None:
    """A sample's latent follows from its own noise, at the start and on the way, not from the others of the batch."""
    sampler = subject.make()
    whole = _sample(sampler, lambda x, t: x)
    for index in range(len(whole)):
        noise = _noise()[index : index + 1]
        with torch.no_grad():
            alone = sampler.sample(lambda x, t: x, noise, _fresh(noise, first=index))
        gap = float((whole[index] - alone[0]).abs().max())
        expect(gap < 1e-5, f"latent {index} is another one when it is sampled alone, by {gap:.3g}")


@check("sampler")
def keeps_noise_and_type(subject: Subject) -> None:
    """It leaves the noise as it was, and gives latents of its type and device."""
    noise = _noise().double()
    before = noise.clone()
    with torch.no_grad():
        result = subject.make().sample(lambda x, t: torch.ones_like(x), noise, _fresh(noise))
    expect(torch.equal(noise, before), "it changed the noise in place")
    expect(result.dtype == noise.dtype, f"float64 noise became {result.dtype}")


@check("sampler")
def protocol_counts_evaluations(subject: Subject) -> None:
    """The protocol is JSON and has solver and evaluations; fixed grids evaluate as often as they say."""
    sampler = subject.make()
    protocol = json.loads(json.dumps(dict(sampler.protocol())))
    expect(bool(protocol.get("solver")), f"the protocol {protocol} has no 'solver'")
    expect("evaluations" in protocol, f"the protocol {protocol} has no 'evaluations' (null where it adapts)")
    times, field = _watched(lambda x, t: torch.ones_like(x))
    _sample(sampler, field)
    declared = protocol["evaluations"]
    expect(
        declared in (None, len(times)),
        f"the protocol says {declared} evaluations, and the field was evaluated {len(times)} times",
    )

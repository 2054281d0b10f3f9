"""Checks of adapters."""

from __future__ import annotations

from typing import Any

import torch

from underpaint.interfaces.adapter import Adapter, Posterior
from underpaint.interfaces.encoder import Features
from underpaint.testing.kit import Subject, check, expect
from underpaint.testing.modules import PROBES, close, disturb, generator

__all__: list[str] = []


def _features(subject: Subject, batch: int, grid: tuple[int, int], seed: int = 0) -> Features:
    noise = generator(seed)
    channels = subject.context["in_channels"]
    maps = tuple(torch.randn((batch, count, *grid), generator=noise) for count in channels)
    return Features(maps=maps, pooled=torch.randn((batch, channels[-1]), generator=noise))


def _probe(subject: Subject, component: Adapter, batch: int) -> tuple[Any, ...]:
    return (_features(subject, batch, (4, 4)),)


PROBES["adapter"] = _probe


@check("adapter")
def posterior_as_declared(subject: Subject) -> None:
    """Latents have the channels asked for and the grid that the stride gives, also when it is not square."""
    adapter = subject.make()
    wanted = subject.context["latent_channels"]
    expect(adapter.latent_channels == wanted, f"latent_channels is {adapter.latent_channels}, and {wanted} was asked")
    stride = adapter.stride
    for rows, columns in ((4, 4), (4, 8), (8, 4)):
        with torch.no_grad():
            posterior = adapter(_features(subject, 2, (rows, columns)))
        expect(isinstance(posterior, Posterior), f"forward returned {type(posterior).__name__}, not Posterior")
        shape = (2, wanted, rows // stride, columns // stride)
        got = tuple(posterior.mean.shape)
        expect(got == shape, f"a {rows}×{columns} grid gave latents of shape {got}, not {shape}")
        if posterior.logvar is not None:
            expect(posterior.logvar.shape == posterior.mean.shape, "logvar has another shape than mean")


@check("adapter")
def posterior_is_a_distribution(subject: Subject) -> None:
    """Samples are finite and repeat with the generator's seed; the KL divergence is finite and not negative."""
    adapter = subject.make()
    disturb(adapter)
    with torch.no_grad():
        posterior = adapter(*_probe(subject, adapter, 2))
    first, second = posterior.sample(generator(5)), posterior.sample(generator(5))
    close(first, second, "two samples with one seed", 0.0)
    kl = posterior.kl()
    expect(bool(torch.isfinite(first).all() and torch.isfinite(kl).all()), "a sample or the KL is not finite")
    expect(bool((kl >= -1e-4).all()), f"the KL divergence is negative: {kl.tolist()}")


@check("adapter")
def latents_follow_features(subject: Subject) -> None:
    """Other features give other latents."""
    adapter = subject.make()
    disturb(adapter)
    with torch.no_grad():
        one = adapter(_features(subject, 1, (4, 4), seed=0)).mean
        other = adapter(_features(subject, 1, (4, 4), seed=1)).mean
    expect(not torch.allclose(one, other), "two different images have the same latent")

"""Checks of losses."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from underpaint.interfaces.adapter import Posterior
from underpaint.interfaces.backbone import Prediction
from underpaint.interfaces.decoder import Reconstruction
from underpaint.interfaces.encoder import Features
from underpaint.interfaces.loss import Loss, StepTensors
from underpaint.testing.kit import Subject, check, expect
from underpaint.testing.modules import convert, generator, tensors

__all__: list[str] = []

LEARNED = ("features", "posterior", "reconstruction", "prediction")
"""Fields that come out of networks in training; all others are given."""

_CHANNELS = (24, 40)
_LATENT = (8, 4, 4)
_WIDTH = 16
_LAYERS = 12


def _step(subject: Subject, batch: int = 2) -> StepTensors:
    """Return a step with every field filled, in float32 as the engine hands them over."""
    noise = generator()
    height, width = subject.size or (32, 32)

    def draw(*shape: int) -> Tensor:
        return torch.randn((batch, *shape), generator=noise)

    def image(divisor: int = 1) -> Tensor:
        return torch.rand((batch, 3, height // divisor, width // divisor), generator=noise) * 2 - 1

    def features() -> Features:
        return Features(tuple(draw(count, *_LATENT[1:]) for count in _CHANNELS), draw(_CHANNELS[-1]))

    def posterior() -> Posterior:
        return Posterior(draw(*_LATENT), draw(*_LATENT) * 0.1 - 1.0)

    x0, epsilon = draw(*_LATENT), draw(*_LATENT)
    t = torch.linspace(0.2, 0.8, batch)
    scale = t.view(-1, 1, 1, 1)
    return StepTensors(
        step=0,
        images=image(),
        features=features(),
        posterior=posterior(),
        reconstruction=Reconstruction(image(), (image(4), image(2))),
        reference_features=features(),
        reference_posterior=posterior(),
        x0=x0,
        noise=epsilon,
        t=t,
        x_t=(1 - scale) * x0 + scale * epsilon,
        target=epsilon - x0,
        prediction=Prediction(
            draw(*_LATENT), {layer: draw(_LATENT[1] * _LATENT[2], _WIDTH) for layer in range(_LAYERS)}
        ),
    )


def _only(step: StepTensors, loss: Loss) -> StepTensors:
    return StepTensors(step=step.step, **{name: getattr(step, name) for name in loss.needs if name != "step"})


def _learning(step: StepTensors) -> StepTensors:
    return attrs.evolve(
        step, **{name: convert(getattr(step, name), lambda v: v.requires_grad_(True)) for name in LEARNED}
    )


def _total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.float() for value in terms.values()]).sum()


@check("loss")
def terms_as_declared(subject: Subject) -> None:
    """Terms are named, scalar and finite."""
    terms = subject.make()(_step(subject))
    expect(isinstance(terms, dict) and len(terms) > 0, f"forward returned {terms!r}, not a dict of terms")
    for name, value in terms.items():
        expect(isinstance(name, str) and bool(name), f"a term has the name {name!r}")
        expect(isinstance(value, Tensor) and value.ndim == 0, f"the term '{name}' is not a scalar tensor")
        expect(bool(torch.isfinite(value)), f"the term '{name}' is {value.item()}")


@check("loss")
def reads_only_what_it_needs(subject: Subject) -> None:
    """``needs`` names fields of StepTensors, and with all others None the terms are the same."""
    loss = subject.make()
    fields = {field.name for field in attrs.fields(StepTensors)}
    unknown = sorted(set(loss.needs) - fields)
    expect(not unknown, f"needs names {', '.join(unknown)}, which are no fields of StepTensors")
    whole, part = loss(_step(subject)), loss(_only(_step(subject), loss))
    expect(list(whole) == list(part), f"with only the needed fields the terms are {list(part)}, not {list(whole)}")
    for name, value in whole.items():
        expect(torch.allclose(value, part[name]), f"the term '{name}' depends on fields that needs does not name")


@check("loss")
def mean_over_batch(subject: Subject) -> None:
    """Every term is a mean over the batch: the batch given twice has the same terms."""
    loss = subject.make()
    step = _step(subject)
    double = convert(step, lambda value: torch.cat((value, value)))
    once, twice = loss(step), loss(double)
    for name, value in once.items():
        expect(
            torch.allclose(value, twice[name], rtol=1e-4, atol=1e-6),
            f"the term '{name}' is {value.item():.6g}, and {twice[name].item():.6g} when the batch is given twice",
        )


@check("loss")
def gradients_reach_outputs(subject: Subject) -> None:
    """A finite gradient, not zero, reaches an output of the networks that it needs."""
    loss = subject.make().requires_grad_(False)
    step = _learning(_step(subject))
    needed = [name for name in LEARNED if name in loss.needs]
    expect(bool(needed), f"it needs {sorted(loss.needs)}, and none of these is learned")
    _total(loss(step)).backward()  # type: ignore[no-untyped-call]
    found = [value.grad for name in needed for _, value in tensors(getattr(step, name)) if value.grad is not None]
    expect(any(bool(gradient.abs().sum() > 0) for gradient in found), f"no gradient reaches {' or '.join(needed)}")
    expect(all(bool(torch.isfinite(gradient).all()) for gradient in found), "a gradient is not finite")


@check("loss")
def finite_at_the_optimum(subject: Subject) -> None:
    """Where outputs equal their references exactly, terms and gradients are finite."""
    # The root of a distance of zero has no finite slope; a reconstruction of padding is exact sooner or later.
    loss = subject.make().requires_grad_(False)
    step = _step(subject)
    assert step.images is not None
    assert step.target is not None
    assert step.prediction is not None
    perfect = attrs.evolve(
        step,
        features=convert(step.reference_features, torch.clone),
        posterior=convert(step.reference_posterior, torch.clone),
        reconstruction=Reconstruction(step.images.clone()),
        prediction=Prediction(step.target.clone(), step.prediction.hidden),
    )
    learning = _learning(perfect)
    terms = loss(learning)
    for name, value in terms.items():
        expect(bool(torch.isfinite(value)), f"the term '{name}' is {value.item()} at its optimum")
    total = _total(terms)
    if not total.requires_grad:
        return
    total.backward()  # type: ignore[no-untyped-call]
    for name in LEARNED:
        for path, value in tensors(getattr(learning, name), name):
            bad = value.grad is not None and not bool(torch.isfinite(value.grad).all())
            expect(not bad, f"the gradient at {path} is not finite where it equals its reference")


@check("loss")
def leaves_inputs_alone(subject: Subject) -> None:
    """It changes none of the step's tensors."""
    step = _step(subject)
    before: Any = {path: value.clone() for path, value in tensors(step)}
    subject.make()(step)
    changed = [path for path, value in tensors(step) if not torch.equal(value, before[path])]
    expect(not changed, f"it changed {', '.join(changed)} in place")

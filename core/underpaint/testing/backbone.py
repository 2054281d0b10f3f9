"""Checks of backbones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from underpaint.errors import UnderpaintError
from underpaint.interfaces.backbone import Backbone, Prediction
from underpaint.interfaces.conditioner import Condition
from underpaint.registration.manager import manager
from underpaint.testing.kit import NotApplicable, Subject, check, expect
from underpaint.testing.modules import PROBES, close, disturb, generator, tensors

__all__: list[str] = []

TOKENS = 5


def condition(pooled_dim: int, token_dim: int, batch: int, seed: int = 0) -> Condition:
    """Return a random condition; the last token of each sample is masked."""
    noise = generator(seed + 100)
    pooled = torch.randn((batch, pooled_dim), generator=noise) if pooled_dim else None
    if not token_dim:
        return Condition(pooled=pooled)
    mask = torch.ones((batch, TOKENS), dtype=torch.bool)
    mask[:, -1] = False
    return Condition(tokens=torch.randn((batch, TOKENS, token_dim), generator=noise), mask=mask, pooled=pooled)


def _inputs(subject: Subject, batch: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Condition]:
    context, noise = subject.context, generator()
    latents = torch.randn((batch, context["latent_channels"], *grid), generator=noise)
    return latents, torch.linspace(0.1, 0.9, batch), condition(context["pooled_dim"], context["token_dim"], batch)


def _probe(subject: Subject, component: Backbone, batch: int) -> tuple[Any, ...]:
    return _with_companion(component, _inputs(subject, batch, tuple(subject.context["grid"])))


def _with_companion(
    backbone: Backbone, inputs: tuple[Tensor, Tensor, Condition], layers: Sequence[int] = (), seed: int = 0
) -> tuple[Any, ...]:
    """Add the layers that are asked for, and a companion where the backbone has one."""
    if not backbone.companion:
        return (*inputs, layers)
    return (*inputs, layers, torch.randn((len(inputs[0]), backbone.companion), generator=generator(seed + 200)))


PROBES["backbone"] = _probe


@check("backbone")
def velocity_as_declared(subject: Subject) -> None:
    """Velocity and variance have the shape of the latent, also when it is not square; a companion's velocity is B×C."""
    rows, columns = subject.context["grid"]
    for grid in ((rows, columns), (rows, 2 * columns), (2 * rows, columns)):
        backbone = subject.make(grid=grid)
        inputs = _with_companion(backbone, _inputs(subject, 2, grid))
        with torch.no_grad():
            result = backbone(*inputs)
        expect(isinstance(result, Prediction), f"forward returned {type(result).__name__}, not Prediction")
        shape, got = tuple(inputs[0].shape), tuple(result.velocity.shape)
        expect(got == shape, f"a latent of {shape} gave a velocity of {got}")
        expect(not result.hidden, "hidden states were returned though no layer was asked for")
        vector = None if result.companion is None else tuple(result.companion.shape)
        told = (2, backbone.companion) if backbone.companion else None
        expect(vector == told, f"'companion' is {backbone.companion}, and its velocity has shape {vector}")
        fractions = None if result.variance is None else tuple(result.variance.shape)
        expect(
            fractions == (shape if backbone.variance else None),
            f"'variance' is {backbone.variance}, and that of a latent of {shape} has shape {fractions}",
        )


@check("backbone")
def hidden_as_asked(subject: Subject) -> None:
    """Hidden states come for exactly the layers asked for, a companion's token first, and asking changes nothing."""
    # An oblong grid, so that the number of tokens and the width are unlikely to be equal.
    rows, columns = subject.context["grid"][0], 2 * subject.context["grid"][1]
    backbone = subject.make(grid=(rows, columns))
    disturb(backbone)
    inputs = _inputs(subject, 2, (rows, columns))
    layers = sorted({0, max(len(backbone.blocks()) - 1, 0)})
    with torch.no_grad():
        result = backbone(*_with_companion(backbone, inputs, layers))
        plain = backbone(*_with_companion(backbone, inputs))
    expect(sorted(result.hidden) == layers, f"layers {layers} were asked for, {sorted(result.hidden)} came")
    tokens = (rows // backbone.patch) * (columns // backbone.patch) + bool(backbone.companion)
    wanted = (2, tokens, backbone.width)
    for layer, hidden in result.hidden.items():
        expect(tuple(hidden.shape) == wanted, f"layer {layer} has shape {tuple(hidden.shape)}, not {wanted}")
    close(result.velocity, plain.velocity, "with and without hidden states", 1e-6)


@check("backbone")
def time_and_condition_matter(subject: Subject) -> None:
    """The velocity depends on the latent, the time, every part of the condition and the companion."""
    backbone = subject.make()
    disturb(backbone)
    latents, t, given, *rest = _probe(subject, backbone, 2)
    pooled_dim, token_dim = subject.context["pooled_dim"], subject.context["token_dim"]
    other = condition(pooled_dim, token_dim, 2, seed=1)
    changes = {"latent": (latents + 1.0, t, given), "time": (latents, 1.0 - t * 0.5, given)}
    if pooled_dim:
        mixed = Condition(tokens=given.tokens, mask=given.mask, pooled=other.pooled)
        changes["pooled condition"] = (latents, t, mixed)
    if token_dim:
        mixed = Condition(tokens=other.tokens, mask=given.mask, pooled=given.pooled)
        changes["condition's tokens"] = (latents, t, mixed)
    changed = {what: (*inputs, *rest) for what, inputs in changes.items()}
    if backbone.companion:
        changed["companion"] = _with_companion(backbone, (latents, t, given), seed=1)
    with torch.no_grad():
        before = backbone(latents, t, given, *rest)
        for what, arguments in changed.items():
            after = backbone(*arguments)
            expect(
                not torch.allclose(after.velocity, before.velocity, atol=1e-7),
                f"another {what} gives the same velocity",
            )
            if backbone.companion:
                expect(
                    not torch.allclose(after.companion, before.companion, atol=1e-7),
                    f"another {what} gives the same velocity of the companion",
                )


@check("backbone")
def masked_tokens_do_not_matter(subject: Subject) -> None:
    """A token that the mask hides has no influence."""
    token_dim = subject.context["token_dim"] or 8
    try:
        backbone = subject.make(token_dim=token_dim)
    except UnderpaintError as error:
        raise NotApplicable(str(error)) from None
    latents, t, _, *rest = _probe(subject, backbone, 2)
    given = condition(subject.context["pooled_dim"], token_dim, 2)
    assert given.tokens is not None
    disturb(backbone)
    tokens = given.tokens.clone()
    tokens[:, -1] += 3.0
    with torch.no_grad():
        before = backbone(latents, t, given, *rest)
        after = backbone(latents, t, Condition(tokens=tokens, mask=given.mask, pooled=given.pooled), *rest)
    close(after.velocity, before.velocity, "with another masked token", 1e-5)


@check("backbone")
def ends_of_time_are_finite(subject: Subject) -> None:
    """At t = 0 and at t = 1 the velocity is finite."""
    backbone = subject.make()
    disturb(backbone)
    latents, _, *rest = _probe(subject, backbone, 2)
    with torch.no_grad():
        result = backbone(latents, torch.tensor([0.0, 1.0]), *rest)
    for path, value in tensors(result):
        expect(bool(torch.isfinite(value).all()), f"{path} is not finite at t = 0 or t = 1")


@check("backbone")
def width_as_configured(subject: Subject) -> None:
    """The config class has a ``width``, which is that of the network."""
    config = manager().catalogue.config("backbone", subject.name, subject.resolved_options())
    wanted = getattr(config, "width", None)
    expect(isinstance(wanted, int), "its config has no integer 'width'; conditioners are made for it")
    width = subject.make().width
    expect(width == wanted, f"the config says width {wanted}, the network {width}")


@check("backbone")
def accepts_condition_as_wide(subject: Subject) -> None:
    """It can be made for a pooled condition of its own width, which class labels have."""
    width = subject.make().width
    backbone = subject.make(pooled_dim=width)
    latents, t, _, *rest = _probe(subject, backbone, 2)
    with torch.no_grad():
        result = backbone(latents, t, condition(width, subject.context["token_dim"], 2), *rest)
    expect(result.velocity.shape == latents.shape, f"the velocity has shape {tuple(result.velocity.shape)}")

"""Checks of losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from underpaint.interfaces.adapter import Posterior
from underpaint.interfaces.backbone import Prediction
from underpaint.interfaces.decoder import Reconstruction
from underpaint.interfaces.encoder import Encoder, EncoderInfo, Features
from underpaint.interfaces.loss import AdversarialLoss, Loss, StepSizes, StepTensors
from underpaint.registration.registrar import load_target
from underpaint.testing.kit import NotApplicable, Subject, check, expect
from underpaint.testing.modules import convert, generator, tensors

__all__: list[str] = []

LEARNED = ("features", "posterior", "latents", "reconstruction", "prediction")
"""Fields that come out of networks in training; all others but the encoder itself are given."""

Side = Callable[[StepTensors], dict[str, Tensor]]
"""What a step asks of a loss: the model's terms, or the critic's."""

_CHANNELS = (24, 40)
_LATENT = (8, 4, 4)
_WIDTH = 16
_LAYERS = 12
_COMPANION = 6


class _Encoder(Encoder):
    """The encoder of the stage: two maps that are linear in the image."""

    info = EncoderInfo(
        channels=_CHANNELS,
        stride=1,
        patch=1,
        native_size=(32, 32),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        layers=(0, 1),
        licence="none",
        source="the conformance kit",
    )

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Conv2d(3, count, 1) for count in _CHANNELS)

    def forward(self, images: Tensor) -> Features:
        cells = F.adaptive_avg_pool2d(images, _LATENT[1:])
        maps = tuple(layer(cells) for layer in self.maps)
        return Features(maps, maps[-1].mean((2, 3)))


def _step(subject: Subject, batch: int = 2) -> StepTensors:
    """Return a step with every field filled, a companion's where it is needed, in float32 as the engine gives them."""
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

    torch.manual_seed(1)
    x0, epsilon, images = draw(*_LATENT), draw(*_LATENT), image()
    t = torch.linspace(0.2, 0.8, batch)
    scale = t.view(-1, 1, 1, 1)
    # A companion makes the hidden states longer by its token, which other losses need not expect.
    paired = "companion_target" in load_target(subject.registration.target).needs
    tokens = _LATENT[1] * _LATENT[2] + paired
    return StepTensors(
        step=0,
        inputs=images.clone(),
        images=images,
        labels=torch.arange(batch),
        encoder=_Encoder().eval(),
        features=features(),
        posterior=posterior(),
        latents=draw(*_LATENT),
        reconstruction=Reconstruction(image(), (image(4), image(2))),
        reference_features=features(),
        reference_posterior=posterior(),
        x0=x0,
        noise=epsilon,
        t=t,
        x_t=(1 - scale) * x0 + scale * epsilon,
        target=epsilon - x0,
        prediction=Prediction(
            draw(*_LATENT),
            {layer: draw(tokens, _WIDTH) for layer in range(_LAYERS)},
            draw(_COMPANION) if paired else None,
            draw(*_LATENT).sigmoid(),
        ),
        companion_target=draw(_COMPANION) if paired else None,
    )


def _loss(subject: Subject) -> Loss:
    """Make the loss as a stage does: prepared for its model, and frozen unless it trains."""
    loss: Loss = subject.make()
    loss.prepare(
        StepSizes(
            image=subject.size or (32, 32),
            latent_channels=_LATENT[0],
            grid=(_LATENT[1], _LATENT[2]),
            feature_channels=_CHANNELS,
            hidden_width=_WIDTH,
        )
    )
    if not loss.trains and not isinstance(loss, AdversarialLoss):
        loss.requires_grad_(False)
    return loss.eval()


def _adversary(subject: Subject) -> AdversarialLoss:
    """Make an adversarial loss in training mode, in which a critic may change its state."""
    loss = _loss(subject)
    if not isinstance(loss, AdversarialLoss):
        raise NotApplicable("It has no critic.")
    return loss.train()


def _seeded(side: Side, seed: int = 7) -> Side:
    """Let all calls draw the same random numbers."""

    def call(step: StepTensors) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return side(step)

    return call


def _sides(loss: Loss, seed: int = 7) -> dict[str, Side]:
    """Return what can be asked of a loss, by the name of the method."""
    sides: dict[str, Side] = {"forward": _seeded(loss, seed)}
    if isinstance(loss, AdversarialLoss):
        sides["criticise"] = _seeded(loss.criticise, seed)
    return sides


def _only(step: StepTensors, loss: Loss) -> StepTensors:
    return StepTensors(step=step.step, **{name: getattr(step, name) for name in loss.needs if name != "step"})


def _learning(step: StepTensors) -> StepTensors:
    return attrs.evolve(
        step, **{name: convert(getattr(step, name), lambda v: v.requires_grad_(True)) for name in LEARNED}
    )


def _total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.float() for value in terms.values()]).sum()


def _backward(terms: dict[str, Tensor]) -> None:
    _total(terms).backward()  # type: ignore[no-untyped-call]


def _learned(step: StepTensors, names: Collection[str] = (*LEARNED, "encoder")) -> list[tuple[str, Tensor]]:
    """Return what a gradient may reach, by path."""
    found = [item for name in LEARNED if name in names for item in tensors(getattr(step, name), name)]
    if step.encoder is not None and "encoder" in names:
        found += [(f"encoder.{name}", parameter) for name, parameter in step.encoder.named_parameters()]
    return found


@check("loss")
def terms_as_declared(subject: Subject) -> None:
    """Terms are named, scalar and finite."""
    for method, side in _sides(_loss(subject)).items():
        terms = side(_step(subject))
        expect(isinstance(terms, dict) and len(terms) > 0, f"{method} returned {terms!r}, not a dict of terms")
        for name, value in terms.items():
            expect(isinstance(name, str) and bool(name), f"a term has the name {name!r}")
            expect(isinstance(value, Tensor) and value.ndim == 0, f"the term '{name}' is not a scalar tensor")
            expect(bool(torch.isfinite(value)), f"the term '{name}' is {value.item()}")


@check("loss")
def reads_only_what_it_needs(subject: Subject) -> None:
    """``needs`` names fields of StepTensors, and with all others None the terms are the same."""
    loss = _loss(subject)
    fields = {field.name for field in attrs.fields(StepTensors)}
    unknown = sorted(set(loss.needs) - fields)
    expect(not unknown, f"needs names {', '.join(unknown)}, which are no fields of StepTensors")
    for side in _sides(loss).values():
        whole, part = side(_step(subject)), side(_only(_step(subject), loss))
        expect(list(whole) == list(part), f"with only the needed fields the terms are {list(part)}, not {list(whole)}")
        for name, value in whole.items():
            expect(torch.allclose(value, part[name]), f"the term '{name}' depends on fields that needs does not name")


@check("loss", since="1.1")
def repeats_with_seed(subject: Subject) -> None:
    """Made and asked again with the same seed, it gives the same terms."""
    first, second = _sides(_loss(subject)), _sides(_loss(subject))
    for method, side in first.items():
        once, again = side(_step(subject)), second[method](_step(subject))
        changed = [name for name, value in once.items() if not torch.equal(value, again[name])]
        expect(not changed, f"with torch's generators seeded alike, {', '.join(changed)} differs from run to run")


@check("loss")
def mean_over_batch(subject: Subject) -> None:
    """Every term is a mean over the batch: the batch given twice has the same terms."""
    step = _step(subject)
    double = convert(step, lambda value: torch.cat((value, value)))
    loss = _loss(subject)
    for method, side in _sides(loss).items():
        once, other, twice = side(step), _sides(loss, seed=8)[method](step), side(double)
        if any(not torch.equal(value, other[name]) for name, value in once.items()):
            raise NotApplicable("It draws random numbers, so that no two batches have the same terms.")
        for name, value in once.items():
            expect(
                torch.allclose(value, twice[name], rtol=1e-4, atol=1e-6),
                f"the term '{name}' is {value.item():.6g}, and {twice[name].item():.6g} when the batch is given twice",
            )


@check("loss")
def gradients_reach_outputs(subject: Subject) -> None:
    """A finite gradient, not zero, reaches an output of the networks that it needs, or the encoder that it runs."""
    loss = _loss(subject)
    step = _learning(_step(subject))
    needed = [name for name in (*LEARNED, "encoder") if name in loss.needs]
    expect(bool(needed), f"it needs {sorted(loss.needs)}, and none of these is learned")
    _backward(_seeded(loss)(step))
    found = [value.grad for _, value in _learned(step, needed) if value.grad is not None]
    expect(any(bool(gradient.abs().sum() > 0) for gradient in found), f"no gradient reaches {' or '.join(needed)}")
    expect(all(bool(torch.isfinite(gradient).all()) for gradient in found), "a gradient is not finite")


@check("loss", since="1.1")
def trains_as_declared(subject: Subject) -> None:
    """Where ``trains`` is set it has parameters, and a finite gradient reaches each of them."""
    loss = _loss(subject)
    if not loss.trains:
        raise NotApplicable("It does not train.")
    learning = {name: p for name, p in loss.named_parameters() if p.requires_grad}
    expect(bool(learning), "'trains' is set, and no parameter requires a gradient after 'prepare'")
    _backward(_seeded(loss)(_step(subject)))
    idle = [name for name, p in learning.items() if p.grad is None]
    expect(not idle, f"no gradient reaches {', '.join(idle[:3])}; leave out what takes no part")
    bad = [name for name, p in learning.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    expect(not bad, f"the gradient of {', '.join(bad[:3])} is not finite")


@check("loss")
def finite_at_the_optimum(subject: Subject) -> None:
    """Where outputs equal their references exactly, terms and gradients are finite."""
    # The root of a distance of zero has no finite slope; a reconstruction of padding is exact sooner or later.
    step = _step(subject)
    assert step.images is not None
    assert step.target is not None
    assert step.prediction is not None
    perfect = attrs.evolve(
        step,
        features=convert(step.reference_features, torch.clone),
        posterior=convert(step.reference_posterior, torch.clone),
        reconstruction=Reconstruction(step.images.clone()),
        prediction=Prediction(
            step.target.clone(),
            step.prediction.hidden,
            convert(step.companion_target, torch.clone),
            convert(step.prediction.variance, torch.clone),
        ),
    )
    learning = _learning(perfect)
    terms = _seeded(_loss(subject))(learning)
    for name, value in terms.items():
        expect(bool(torch.isfinite(value)), f"the term '{name}' is {value.item()} at its optimum")
    if not _total(terms).requires_grad:
        return
    _backward(terms)
    for path, value in _learned(learning):
        bad = value.grad is not None and not bool(torch.isfinite(value.grad).all())
        expect(not bad, f"the gradient at {path} is not finite where it equals its reference")


@check("loss", since="1.1")
def finite_in_autocast(subject: Subject) -> None:
    """Under bfloat16 autocast, as the engine trains, terms and gradients are finite."""
    for side in _sides(_loss(subject)).values():
        step = _learning(_step(subject))
        with torch.autocast("cpu", torch.bfloat16):
            terms = side(step)
        for name, value in terms.items():
            expect(bool(torch.isfinite(value)), f"the term '{name}' is {value.item()} under autocast")
        if not _total(terms).requires_grad:
            continue
        _backward(terms)
        for path, value in _learned(step):
            bad = value.grad is not None and not bool(torch.isfinite(value.grad).all())
            expect(not bad, f"the gradient at {path} is not finite under autocast")


@check("loss", since="1.1")
def compiles_as_declared(subject: Subject) -> None:
    """Each of ``units`` is called as a whole, and compiled by torch they leave terms and gradients as they are."""
    loss = _loss(subject)
    if not loss.units():
        raise NotApplicable("It names nothing to compile.")
    called: set[int] = set()
    hooks = [unit.register_forward_hook(lambda module, _, __: called.add(id(module))) for unit in loss.units()]
    plain = {method: _slopes(side, subject) for method, side in _sides(loss).items()}
    for hook in hooks:
        hook.remove()
    idle = [type(unit).__name__ for unit in loss.units() if id(unit) not in called]
    expect(not idle, f"units names {', '.join(idle)}, which is never called: compiling it has no effect")
    for unit in loss.units():
        unit.compile(backend="aot_eager", dynamic=False)
    for method, side in _sides(loss).items():
        with warnings.catch_warnings():
            # Dynamo looks at the gradient of everything that it meets, and torch warns where that is no leaf.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            found = _slopes(side, subject)
        wrong = [n for n, value in plain[method].items() if not torch.allclose(value, found[n], rtol=1e-3, atol=1e-5)]
        expect(not wrong, f"compiled, {method} gives another {' and '.join(wrong)}")


def _slopes(side: Side, subject: Subject) -> dict[str, Tensor]:
    """Return terms, and the gradients of their sum, by name."""
    step = _learning(_step(subject))
    terms = side(step)
    if _total(terms).requires_grad:
        _backward(terms)
    slopes = {f"gradient at {path}": value.grad for path, value in _learned(step) if value.grad is not None}
    return {**{name: value.detach() for name, value in terms.items()}, **slopes}


@check("loss")
def leaves_inputs_alone(subject: Subject) -> None:
    """It changes none of the step's tensors."""
    step = _step(subject)
    before: Any = {path: value.clone() for path, value in tensors(step)}
    for side in _sides(_loss(subject)).values():
        side(step)
        changed = [path for path, value in tensors(step) if not torch.equal(value, before[path])]
        expect(not changed, f"it changed {', '.join(changed)} in place")


@check("loss", since="1.1")
def critic_learns(subject: Subject) -> None:
    """The critic's terms give a finite gradient to all that trains, and all that trains is in ``critic``."""
    loss = _adversary(subject)
    learning = {name: p for name, p in loss.critic.named_parameters() if p.requires_grad}
    expect(bool(learning), "no parameter of 'critic' requires a gradient")
    inside = {id(p) for p in loss.critic.parameters()}
    outside = [name for name, p in loss.named_parameters() if p.requires_grad and id(p) not in inside]
    expect(not outside, f"{', '.join(outside[:3])} requires a gradient outside of 'critic', where nothing trains it")
    _backward(_seeded(loss.criticise)(_step(subject)))
    idle = [name for name, p in learning.items() if p.grad is None]
    expect(not idle, f"no gradient of 'criticise' reaches {', '.join(idle[:3])}")
    bad = [name for name, p in learning.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    expect(not bad, f"the gradient of {', '.join(bad[:3])} is not finite")


@check("loss", since="1.1")
def model_spares_critic(subject: Subject) -> None:
    """The model's terms give the critic no gradient, and leave its parameters, buffers and flags as they are."""
    loss = _adversary(subject)
    flags = {name: p.requires_grad for name, p in loss.critic.named_parameters()}
    before = {name: value.clone() for name, value in loss.critic.state_dict().items()}
    _backward(_seeded(loss)(_learning(_step(subject))))
    for name, parameter in loss.critic.named_parameters():
        expect(parameter.grad is None, f"the model's terms give a gradient to the critic's '{name}'")
        expect(parameter.requires_grad == flags[name], f"forward leaves requires_grad of '{name}' changed")
    changed = [name for name, value in loss.critic.state_dict().items() if not torch.equal(value, before[name])]
    expect(not changed, f"forward changes the critic's {', '.join(changed[:3])}")


@check("loss", since="1.1")
def critic_spares_model(subject: Subject) -> None:
    """The critic's terms give no gradient to what the model made."""
    loss = _adversary(subject)
    step = _learning(_step(subject))
    _backward(_seeded(loss.criticise)(step))
    reached = [path for path, value in _learned(step) if value.grad is not None]
    expect(not reached, f"the critic's terms give a gradient to {', '.join(reached)}; detach it")

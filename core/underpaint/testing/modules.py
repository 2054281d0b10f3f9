"""Checks of the kinds that are networks: encoder, adapter, decoder, backbone, conditioner.

Each of these kinds gives a `Probe`: inputs for its forward pass. Everything else here is common to them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from underpaint.registration.manager import manager
from underpaint.testing.kit import NotApplicable, Subject, check, expect

__all__ = ["PROBES", "close", "convert", "disturb", "generator", "run", "tensors"]

NETWORKS = ("encoder", "adapter", "decoder", "backbone", "conditioner")

Probe = Callable[[Subject, Any, int], tuple[Any, ...]]
"""(subject, component, batch size) to the arguments of the component, on the CPU, in float32."""

PROBES: dict[str, Probe] = {}


def generator(seed: int = 0) -> torch.Generator:
    """Return a seeded generator."""
    return torch.Generator().manual_seed(seed)


def convert(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor within sequences and attrs objects."""
    if isinstance(value, Tensor):
        return change(value)
    if attrs.has(type(value)):
        fields = {f.name: convert(getattr(value, f.name), change) for f in attrs.fields(type(value))}
        return attrs.evolve(value, **fields)
    if isinstance(value, Mapping):
        return {key: convert(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(convert(item, change) for item in value)
    return value


def tensors(value: Any, path: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor within sequences and attrs objects, with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif attrs.has(type(value)):
        for field in attrs.fields(type(value)):
            yield from tensors(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{path}[{key}]")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            yield from tensors(item, f"{path}[{index}]")


def close(got: Any, wanted: Any, what: str, tolerance: float = 1e-4) -> None:
    """Expect equal structures whose tensors differ by at most `tolerance` of the largest value."""
    first, second = dict(tensors(got)), dict(tensors(wanted))
    expect(list(first) == list(second), f"{what}: outputs are {list(first)} and {list(second)}")
    for path, value in first.items():
        other = second[path]
        expect(value.shape == other.shape, f"{what}: {path} has shape {list(value.shape)}, not {list(other.shape)}")
        if value.numel() == 0:
            continue
        scale = max(float(other.detach().double().abs().max()), 1e-6)
        gap = float((value.detach().double() - other.detach().double()).abs().max())
        expect(gap <= tolerance * scale, f"{what}: {path} differs by {gap:.3g}, with values up to {scale:.3g}")


def disturb(module: nn.Module, seed: int = 1) -> None:
    """Add noise to every parameter, so that nothing sits at a special initial value such as zero."""
    noise = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise).to(parameter))


def run(subject: Subject, component: Any, batch: int = 2) -> Any:
    """Run the kit's inputs through a component."""
    return component(*PROBES[subject.kind](subject, component, batch))


def _float_parameters(component: nn.Module) -> list[nn.Parameter]:
    found = [p for p in component.parameters() if p.is_floating_point()]
    if not found:
        raise NotApplicable("It has no parameters.")
    return found


@check(*NETWORKS)
def learns_when_made(subject: Subject) -> None:
    """Every parameter requires a gradient when the component is made; what is frozen, a stage freezes."""
    frozen = [name for name, p in subject.make().named_parameters() if not p.requires_grad]
    expect(not frozen, f"made with frozen parameters: {', '.join(frozen[:3])}; register constants as buffers")


@check(*NETWORKS)
def deterministic_in_eval(subject: Subject) -> None:
    """In evaluation mode the same inputs give the same outputs, bit by bit."""
    component = subject.make()
    disturb(component)
    with torch.no_grad():
        close(run(subject, component), run(subject, component), "two equal calls", 0.0)


@check(*NETWORKS)
def batch_independent(subject: Subject) -> None:
    """A sample gives the same output alone and within a batch of four."""
    component = subject.make()
    disturb(component)
    arguments = PROBES[subject.kind](subject, component, 4)
    single = tuple(
        item[2:3] if isinstance(item, (Tensor, list)) else convert(item, lambda value: value[2:3]) for item in arguments
    )
    with torch.no_grad():
        whole, alone = component(*arguments), component(*single)
    close(alone, convert(whole, lambda value: value[2:3]), "alone and within a batch")


@check(*NETWORKS)
def finite(subject: Subject) -> None:
    """Outputs are finite."""
    component = subject.make()
    disturb(component)
    with torch.no_grad():
        for path, value in tensors(run(subject, component)):
            expect(bool(torch.isfinite(value).all()), f"{path} has values that are not finite")


@check(*NETWORKS)
def dtype_follows(subject: Subject) -> None:
    """In float64, parameters, inputs and outputs are all float64."""
    component = subject.make()
    _float_parameters(component)
    arguments = convert(
        PROBES[subject.kind](subject, component, 2), lambda v: v.double() if v.is_floating_point() else v
    )
    with torch.no_grad():
        result = component.double()(*arguments)
    for path, value in tensors(result):
        if value.is_floating_point():
            expect(value.dtype == torch.float64, f"{path} is {value.dtype} in a float64 network")


@check(*NETWORKS)
def finite_in_bfloat16(subject: Subject) -> None:
    """In bfloat16, as the engine trains, outputs are finite and bfloat16."""
    component = subject.make().bfloat16()
    arguments = convert(
        PROBES[subject.kind](subject, component, 2), lambda v: v.bfloat16() if v.is_floating_point() else v
    )
    with torch.no_grad():
        result = component(*arguments)
    for path, value in tensors(result):
        if not value.is_floating_point():
            continue
        expect(value.dtype == torch.bfloat16, f"{path} is {value.dtype} in a bfloat16 network")
        expect(bool(torch.isfinite(value).all()), f"{path} has values that are not finite")


@check(*NETWORKS)
def device_follows(subject: Subject) -> None:
    """Moved to another device with its inputs, it makes nothing on the old one."""
    # The meta device computes shapes only, exists everywhere, and refuses to mix with the CPU.
    component = subject.make()
    arguments = convert(PROBES[subject.kind](subject, component, 2), lambda value: value.to("meta"))
    with torch.no_grad():
        result = component.to("meta")(*arguments)
    for path, value in tensors(result):
        expect(value.device.type == "meta", f"{path} is on {value.device} when network and inputs are on 'meta'")


@check(*NETWORKS)
def constructs_on_meta(subject: Subject) -> None:
    """It can be made without memory, under ``torch.device("meta")``, with the same parameters."""
    real = {name: p.shape for name, p in subject.make().named_parameters()}
    with torch.device("meta"):
        light = subject.make()
    shapes = {name: p.shape for name, p in light.named_parameters()}
    expect(shapes == real, "its parameters have other names or shapes on the meta device")
    heavy = [name for name, p in light.named_parameters() if p.device.type != "meta"]
    expect(not heavy, f"made on the CPU in spite of the device: {', '.join(heavy[:3])}")


@check("decoder", "backbone", since="1.2", every_name=True)
def makes_full_size(subject: Subject) -> None:
    """With the options of its name alone, not those that make it tiny, it can be made on the meta device."""
    with torch.device("meta"):
        manager().create(subject.kind, subject.name, **subject.context)


@check(*NETWORKS)
def unchanged_by_forward(subject: Subject) -> None:
    """Frozen and in evaluation mode, a forward pass changes no parameter or buffer and records no gradient."""
    component = subject.make().requires_grad_(False)
    before = {name: value.clone() for name, value in component.state_dict().items()}
    result = run(subject, component)
    for path, value in tensors(result):
        expect(not value.requires_grad, f"{path} requires a gradient though every parameter is frozen")
    for name, value in component.state_dict().items():
        expect(torch.equal(value, before[name]), f"'{name}' was changed by a forward pass in evaluation mode")


@check(*NETWORKS)
def state_round_trip(subject: Subject) -> None:
    """The state dict goes through safetensors into a second instance, which then gives the same outputs."""
    first, second = subject.make(0), subject.make(1)
    disturb(first)
    state = {name: value.clone().contiguous() for name, value in first.state_dict().items()}
    second.load_state_dict(load_safetensors(save_safetensors(state)))
    with torch.no_grad():
        close(run(subject, second), run(subject, first), "after the state dict was copied", 1e-6)


@check(*NETWORKS)
def pickles(subject: Subject) -> None:
    """It can be pickled, and then gives the same outputs."""
    component = subject.make()
    again = pickle.loads(pickle.dumps(component))  # noqa: S301 - what we pickled ourselves
    with torch.no_grad():
        close(run(subject, again), run(subject, component), "after pickling", 0.0)


def _gradients(subject: Subject, component: nn.Module) -> None:
    noise = generator(3)
    found = [value for _, value in tensors(run(subject, component)) if value.is_floating_point()]
    total = sum((value * torch.randn(value.shape, generator=noise)).sum() for value in found if value.requires_grad)
    expect(isinstance(total, Tensor), "no output requires a gradient though the parameters do")
    assert isinstance(total, Tensor)
    total.backward()  # type: ignore[no-untyped-call]
    for name, parameter in component.named_parameters():
        bad = parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
        expect(not bad, f"the gradient of '{name}' is not finite")


@check("adapter", "decoder", "backbone", "conditioner")
def gradients_reach_all(subject: Subject) -> None:
    """Every parameter takes part in the outputs and receives a gradient."""
    component = subject.make()
    _float_parameters(component)
    disturb(component)
    _gradients(subject, component)
    idle = [name for name, p in component.named_parameters() if p.grad is None]
    expect(not idle, f"no gradient reaches {', '.join(idle[:3])}; leave out what takes no part")


@check("encoder")
def gradients_reach_some(subject: Subject) -> None:
    """Parameters receive gradients, so that a stage may train the encoder; unused layers may not."""
    component = subject.make()
    _float_parameters(component)
    _gradients(subject, component)
    expect(
        any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in component.parameters()),
        "no parameter receives a gradient; does the encoder run under no_grad?",
    )

"""Group normalisation in the type of its input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from underpaint import GroupNorm


def made(kind: type[nn.GroupNorm] = GroupNorm, *, affine: bool = True) -> nn.GroupNorm:
    layer = kind(4, 24, eps=1e-6, affine=affine)
    if affine:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(24, generator=generator))
            layer.bias.copy_(torch.randn(24, generator=generator))
    return layer


def maps(*, spread: float = 1.0, offset: float = 0.0) -> Tensor:
    return torch.randn(3, 24, 5, 7, generator=torch.Generator().manual_seed(0)) * spread + offset


def formula(x: Tensor, layer: nn.GroupNorm) -> Tensor:
    """Wu and He 2018, equations 1, 2, 6 and 7, in float64."""
    groups = x.double().unflatten(1, (4, -1))
    mean = groups.mean((2, 3, 4), keepdim=True)
    variance = (groups - mean).square().mean((2, 3, 4), keepdim=True)
    unit = ((groups - mean) / (variance + layer.eps).sqrt()).flatten(1, 2)
    if layer.weight is None:
        return unit
    return unit * layer.weight.double()[:, None, None] + layer.bias.double()[:, None, None]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("spread", "offset"), [(1.0, 0.0), (1e-3, 0.5), (1e3, -1e4)])
def test_in_fp32_it_is_the_formula(affine: bool, spread: float, offset: float) -> None:
    layer, x = made(affine=affine), maps(spread=spread, offset=offset)
    torch.testing.assert_close(layer(x).double(), formula(x, layer), rtol=1e-3, atol=1e-3)
    assert torch.equal(layer(x), made(nn.GroupNorm, affine=affine)(x))


def test_in_bf16_sums_are_not() -> None:
    layer = made()
    # A mean of 8 and a spread of 1: bf16 has steps of 1/32 there, and sums in it would be worth nothing.
    x = maps(offset=8.0).bfloat16()
    found = layer(x)
    assert found.dtype == torch.bfloat16
    wanted = formula(x, made(affine=False))
    gain, shift = (p.bfloat16().double()[:, None, None] for p in (layer.weight, layer.bias))
    wanted = wanted * gain + shift
    # One rounding of the output.
    assert bool(((found.double() - wanted).abs() <= wanted.abs() * 2**-8 + 1e-4).all())


def test_gradients_are_those_of_the_formula() -> None:
    layer = made().double()
    x = maps().double().requires_grad_(True)
    weight = torch.randn(3, 24, 5, 7, generator=torch.Generator().manual_seed(2)).double()
    found = torch.autograd.grad((layer(x) * weight).sum(), [x, layer.weight, layer.bias])
    wanted = torch.autograd.grad((formula(x, layer) * weight).sum(), [x, layer.weight, layer.bias])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@contextlib.contextmanager
def autocast_of_a_gpu() -> Iterator[None]:
    # torch.autocast turns itself off where there is no GPU.
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_gpus_autocast_does_not_widen_it(weights: torch.dtype) -> None:
    with FakeTensorMode(), autocast_of_a_gpu():
        x = torch.empty(2, 24, 8, 8, device="cuda", dtype=torch.bfloat16)
        assert nn.GroupNorm(4, 24, device="cuda", dtype=weights)(x).dtype == torch.float32
        assert GroupNorm(4, 24, device="cuda", dtype=weights)(x).dtype == torch.bfloat16
        assert GroupNorm(4, 24, device="cuda", dtype=weights)(x.float()).dtype == torch.float32
        # What follows is under autocast again.
        assert nn.Linear(8, 8, device="cuda")(x.float()).dtype == torch.bfloat16


def test_shapes_can_be_worked_out_without_data() -> None:
    assert GroupNorm(4, 24, device="meta")(torch.empty(2, 24, 8, 8, device="meta")).shape == (2, 24, 8, 8)


def test_it_compiles_whole() -> None:
    layer = made()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(maps().bfloat16()), layer(maps().bfloat16()))


def test_weights_have_the_names_of_torchs() -> None:
    assert list(made().state_dict()) == list(made(nn.GroupNorm).state_dict())

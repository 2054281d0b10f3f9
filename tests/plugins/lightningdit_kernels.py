"""The kernels of LightningDiT's block, run by Triton's interpreter; test_lightningdit_fused starts this.

Bounds: a kernel computes in fp32 from what it reads and rounds once, so a result is off by its type's rounding, and by
fp32's own errors relative to the terms. The interpreter cuts numbers off where it makes bf16 of them: 2⁻⁷, not 2⁻⁸.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.plugins.backbones import disturbed
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from underpaint_lightningdit import kernels
from underpaint_lightningdit.block import Block
from underpaint_lightningdit.kernels import fused_available, gated_sum, modulated_norm, rotated_heads, swiglu
from underpaint_lightningdit.positions import grid_rotations
from underpaint_lightningdit.tokens import run_block

ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
FP32 = 1e-5
TYPES = pytest.mark.parametrize("dtype", list(ROUNDING), ids=lambda d: str(d)[6:])
# Rows that fill no tile, widths that are no powers of two and widths of several programs.
SIZES = pytest.mark.parametrize(("b", "n", "heads", "channels"), [(2, 37, 4, 24), (3, 1, 2, 4), (1, 5, 16, 72)])


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that sums have several parts, and the interpreter, which is slow, few rows.
    for name, (_, *rest) in kernels.TILES.items():
        monkeypatch.setitem(kernels.TILES, name, (16, *rest))


class Draw:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator).to(dtype or self.dtype)
        return drawn.requires_grad_()


class Calls(TorchDispatchMode):
    """Counts the kernels' operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "underpaint":
            self.found[func.__name__.removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


class Graph:
    """Runs a compiled graph as it is, and counts the kernels' operators in it."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        targets = (n.target for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload))
        self.found.update(t.__name__.removesuffix(".default") for t in targets if t.namespace == "underpaint")
        return make_boxed_func(graph)


def compare(
    name: str, ours: Callable[..., Any], plain: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor]
) -> None:
    """Compare gradients with float64's of the plain formula, and run twice."""
    with Calls() as calls:
        found, again = (torch.autograd.grad(ours(*inputs), inputs, grads) for _ in range(2))
    assert calls.found == {f"{name}_backward": 2}
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(plain(*exact), exact, [g.double() for g in grads])
    for x, one, other, wanted in zip(inputs, found, again, expected):
        assert one.dtype == x.dtype
        assert one.shape == x.shape
        assert torch.equal(one, other)
        # Sums are as large as their terms, of order 1, are many.
        size = 10.0 * max(1.0, grads[0].numel() / x.numel())
        torch.testing.assert_close(one.double(), wanted, rtol=ROUNDING[x.dtype] + FP32, atol=FP32 * size)


@TYPES
@SIZES
def test_swiglu(b: int, n: int, heads: int, channels: int, dtype: torch.dtype) -> None:
    draw, hidden = Draw(dtype), heads * channels - 1
    product, bias = draw(b, n, 2 * hidden), draw(2 * hidden, dtype=torch.float32)
    product, bias = product.detach(), bias.detach()
    h = (product + bias).to(dtype).requires_grad_()

    def plain(h: Tensor, bias: Tensor) -> Tensor:
        one, two = (h - bias.detach() + bias).split(hidden, -1)
        return one / (1 + torch.exp(-one)) * two

    compare("swiglu", swiglu, plain, [h, bias.requires_grad_()], [draw(b, n, hidden).detach()])


@TYPES
@SIZES
@pytest.mark.parametrize("layout", ["attention", "dense", "mixed"])
def test_heads(b: int, n: int, heads: int, channels: int, dtype: torch.dtype, layout: str) -> None:
    draw, width = Draw(dtype), heads * channels
    rotation = grid_rotations(1, n, channels).float()

    def plain(qkv: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        parts = (qkv - bias.detach() + bias).view(b, n, 3, heads, channels).unbind(2)
        c, s = rotation[0, ..., ::2].double(), rotation[1, ..., 1::2].double()
        turned = (
            torch.stack((p[..., ::2] * c - p[..., 1::2] * s, p[..., 1::2] * c + p[..., ::2] * s), -1).flatten(-2)
            for p in parts[:2]
        )
        return *turned, parts[2]

    dense = [draw(b, n, heads, channels).detach() for _ in range(3)]
    strided = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in dense]
    grads = {"dense": dense, "attention": strided, "mixed": [dense[0], strided[1], dense[2].flip(-1)]}[layout]
    bias = draw(3 * width, dtype=torch.float32)
    compare("heads", lambda h, w: rotated_heads(h, w, rotation), plain, [draw(b, n, 3 * width), bias], grads)


@TYPES
@SIZES
@pytest.mark.parametrize("shifted", [False, True])
def test_norm(b: int, n: int, heads: int, channels: int, dtype: torch.dtype, shifted: bool) -> None:
    draw, width = Draw(dtype), heads * channels

    def plain(x: Tensor, scale: Tensor, *shift: Tensor) -> tuple[Tensor, Tensor]:
        normed = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale
        return sum(shift, normed), x

    inputs = [draw(b, n, width), *(draw(b, 1, width, dtype=torch.float32) for _ in range(1 + shifted))]
    outputs = torch.promote_types(dtype, torch.float32)
    grads = [draw(b, n, width, dtype=outputs).detach(), draw(b, n, width).detach()]
    ours = modulated_norm if shifted else lambda x, scale: modulated_norm(x, scale, None)
    compare("norm", ours, plain, inputs, grads)


@TYPES
@SIZES
def test_gate(b: int, n: int, heads: int, channels: int, dtype: torch.dtype) -> None:
    draw, width = Draw(dtype), heads * channels
    inputs = [draw(b, n, width), draw(b, n, width), draw(b, 6, width)[:, 2:3].detach().requires_grad_(), draw(width)]
    compare(
        "gate",
        gated_sum,
        lambda x, out, gate, bias: x + gate * (out + bias),
        inputs,
        [draw(b, n, width).detach()],
    )


def test_operators_give_what_they_promise_the_compiler() -> None:
    draw = Draw(torch.bfloat16)
    x, y, z, vector = (draw(2, 5, 24), draw(2, 5, 24), draw(2, 5, 24), draw(2, 1, 24))
    heads = [t.detach().view(2, 5, 2, 12) for t in (x, y, z)]
    for operator, arguments in (
        (kernels._swiglu_backward, (draw(2, 5, 48), x)),
        (kernels._heads_backward, (*heads, grid_rotations(1, 5, 12).float())),
        (kernels._norm_backward, (x, y, z, vector)),
        (kernels._gate_backward, (x, y, vector)),
    ):
        given = tuple(t.detach() for t in arguments)
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


# --------------------------------------------------------------------------------------------------- the block


def block(dtype: torch.dtype = torch.float32, **options: Any) -> Block:
    torch.manual_seed(0)
    made: Block = disturbed(Block(48, 4, 4.0, **{"qk_norm": False, **options}))
    return made.to(dtype)


def given(dtype: torch.dtype = torch.float32, per_token: bool = False) -> list[Tensor]:
    draw = Draw(dtype)
    return [draw(2, 6, 48), draw(2, 6 if per_token else 1, 48)]


def gradients(call: Callable[..., Tensor], module: Block, inputs: list[Tensor]) -> dict[str, Tensor]:
    exact = torch.promote_types(inputs[0].dtype, torch.float32)
    out = call(*inputs, grid_rotations(2, 3, 12).to(exact))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out)
    names = ["x", "condition", *(name for name, _ in module.named_parameters())]
    return dict(zip(names, torch.autograd.grad((out * weight).sum(), [*inputs, *module.parameters()])))


ALL = {"swiglu_backward": 1, "heads_backward": 1, "norm_backward": 2, "gate_backward": 2}


@pytest.mark.parametrize(
    ("options", "per_token", "kinds"),
    [
        ({}, False, ALL),
        ({"shift": False}, False, ALL),
        ({"qk_norm": True}, False, {k: v for k, v in ALL.items() if k != "heads_backward"}),
        ({}, True, {"swiglu_backward": 1, "heads_backward": 1}),
    ],
    ids=["", "unshifted", "qk_norm", "per_token"],
)
@pytest.mark.parametrize("way", ["called", "compiled", "recomputed"])
def test_block(options: dict[str, Any], per_token: bool, kinds: dict[str, int], way: str) -> None:
    module = block(**options)
    if way == "compiled":
        forward, backward = Graph(), Graph()
        backend = aot_autograd(fw_compiler=forward, bw_compiler=backward)
        found = gradients(
            torch.compile(module, fullgraph=True, backend=backend, dynamic=False), module, given(per_token=per_token)
        )
        assert not forward.found
        assert backward.found == kinds
    else:
        call = module if way == "called" else partial(run_block, module, True)
        with Calls() as calls:
            found = gradients(call, module, given(per_token=per_token))
        assert calls.found == kinds
    plain = block(**options).double()
    with Calls() as calls:
        expected = gradients(plain, plain, [x.detach().double().requires_grad_() for x in given(per_token=per_token)])
    assert not calls.found
    for name, wanted in expected.items():
        error = torch.linalg.vector_norm(found[name].double() - wanted) / torch.linalg.vector_norm(wanted)
        assert error < 2e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_their_parameters_types_under_autocast(dtype: torch.dtype) -> None:
    module, inputs = block(dtype), given(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), Calls() as calls:
        found = gradients(module, module, inputs)
    assert calls.found == ALL
    assert {found[name].dtype for name, _ in module.named_parameters()} == {dtype}
    assert {found[name].dtype for name in ("x", "condition")} == {torch.bfloat16}


class Whole(nn.Linear):
    """A layer with a forward pass of its own, as adapters and 8-bit products make them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2.0 * self.weight, 3.0 * self.bias)


def test_layers_that_are_more_than_they_seem_are_called() -> None:
    plain, changed, hooked = block(), block(), block()
    for name in ("qkv", "up"):
        layer = getattr(changed, name)
        layer.__class__ = Whole
        with torch.no_grad():
            layer.weight /= 2
            layer.bias /= 3
    seen = []
    hooked.qkv.register_forward_pre_hook(lambda *_: seen.append("before"))
    hooked.up.register_forward_hook(lambda *_: seen.append("after"))
    expected, other, third = (gradients(m, m, given()) for m in (plain, changed, hooked))
    assert seen == ["before", "after"]
    for name, wanted in expected.items():
        torch.testing.assert_close(third[name], wanted, rtol=1e-4, atol=1e-5)
        times = {"weight": 2.0, "bias": 3.0}[name.split(".")[1]] if name.startswith(("qkv", "up")) else 1.0
        torch.testing.assert_close(other[name], times * wanted, rtol=1e-4, atol=1e-4)


def test_gradients_can_be_differentiated() -> None:
    def slope(module: Block, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        out = module(*inputs, grid_rotations(2, 3, 12).to(inputs[0]))
        (dx,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [*inputs, *module.parameters()])

    exact = [x.detach().double().requires_grad_() for x in given()]
    with sdpa_kernel(SDPBackend.MATH):
        found, expected = slope(block(), given()), slope(block(torch.float64), exact)
    for one, wanted in zip(found, expected):
        assert torch.linalg.vector_norm(one - wanted) < 2e-5 * torch.linalg.vector_norm(wanted)


def test_inputs_may_depend_on_each_other() -> None:
    def slope(dtype: torch.dtype) -> tuple[Tensor, ...]:
        draw = Draw(torch.float32)
        x, gate, bias = (t.detach().to(dtype).requires_grad_() for t in (draw(2, 3, 8), draw(2, 1, 8), draw(8)))
        (dx,) = torch.autograd.grad(gated_sum(x, x.sin(), gate, bias).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, gate, bias])

    for one, wanted in zip(slope(torch.float32), slope(torch.float64)):
        torch.testing.assert_close(one.double(), wanted, rtol=1e-4, atol=1e-4)


def test_where_there_are_no_kernels() -> None:
    x, vector = torch.zeros(2, 3, 4), torch.zeros(2, 1, 4)
    assert fused_available(x)
    assert fused_available(x, vector)
    assert not fused_available(x, torch.zeros(2, 3, 4))
    assert not fused_available(x.double())
    assert not fused_available(x.to("meta"))
    with torch.no_grad():
        assert not fused_available(x)

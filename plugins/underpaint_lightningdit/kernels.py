"""Backward passes of the block's elementwise parts, each a single pass over memory by a Triton kernel.

What stands between two matrix products is bound by memory. A compiler makes one pass forward of it, but several
backward: gradients of biases, gates, scales and shifts are sums over tokens, for which it reads the tokens again. Here
each kernel walks over rows, keeps the sums of its columns in fp32 and writes them once; the few partial sums are added
afterwards, in a fixed order, so that results repeat exactly. The forward passes are plain formulas.

Kernels read any of the types of `fused_available`, compute in fp32 and round once.
"""

# What Triton compiles has no types that mypy knows.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-any-return"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from underpaint_lightningdit.positions import rotate

try:
    import triton
    import triton.language as tl
except ImportError:  # There is none for some systems; torch then comes without it.
    triton = None

__all__ = ["EPS", "fused_available", "gated_sum", "modulated_norm", "rotated_heads", "swiglu"]

EPS = 1e-6

_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_INTERPRETED = triton is not None and triton.knobs.runtime.interpret

# Rows of a program, rows and columns of a tile (a norm's is as wide as its rows), tiles read ahead, warps.
TILES: dict[str, tuple[int, int, int, int, int]] = {
    "swiglu": (128, 8, 128, 1, 4),
    "heads": (256, 8, 128, 1, 4),
    "norm": (32, 1, 0, 4, 4),
    "gate": (256, 8, 128, 1, 4),
}


def fused_available(x: Tensor, vector: Tensor | None = None) -> bool:
    """Whether kernels go backward from what is computed of `x`, B×N×C, and of a condition's `vector`, if any.

    They need a GPU, or Triton's interpreter on the CPU, and one vector a sample: with one a token nothing is summed
    over the tokens, and a compiler has its single pass.
    """
    return (
        triton is not None
        and (x.is_cuda or (_INTERPRETED and x.device.type == "cpu"))
        and x.dtype in _TYPES
        and torch.is_grad_enabled()
        and (vector is None or vector.shape == (x.shape[0], 1, x.shape[2]))
    )


class _Fused(torch.autograd.Function):
    """A formula whose gradients come from a kernel."""

    @staticmethod
    def forward(ctx: Any, formula: Callable[..., Any], gradients: Callable[..., Any], *inputs: Tensor | None) -> Any:
        ctx.formula, ctx.gradients = formula, gradients
        ctx.save_for_backward(*inputs)
        return formula(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return None, None, *ctx.gradients(ctx.saved_tensors, grads)
        # These gradients are to be differentiated: the formula's own can be. Views, since inputs may depend on others.
        inputs = [None if x is None else x.view_as(x) for x in ctx.saved_tensors]
        needed = ctx.needs_input_grad[2:]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
        found = iter(torch.autograd.grad(ctx.formula(*inputs), wanted, grads, create_graph=True))
        return None, None, *(next(found) if need else None for need in needed)


# ---------------------------------------------------------------------------------------------------- formulas
#
# The compiler's first half must not look into these: torch 2.11's loses gradients of an autograd function's outputs
# where two of its tensors are one, as after a cast to the type at hand. Its second half traces them, and fuses forward.


@torch.compiler.allow_in_graph
def swiglu(h: Tensor, bias: Tensor | None) -> Tensor:
    """Return silu(a)·b of h = [a|b], B×N×2H.

    Args:
        h: The output of a linear layer, its bias added.
        bias: The layer's bias where this is to find its gradient, and the layer does not.
    """
    return _apply(fused_available(h), _swiglu_formula, _swiglu_gradients, h, bias)


def _swiglu_formula(h: Tensor, bias: Tensor | None) -> Tensor:
    a, b = _depending(h, bias).chunk(2, dim=-1)
    return F.silu(a) * b


def _swiglu_gradients(inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    h, bias = inputs
    dh, sums = _swiglu_backward(h.contiguous(), grads[0].contiguous())
    return dh, _total(sums, 0, bias)


@torch.compiler.allow_in_graph
def rotated_heads(qkv: Tensor, bias: Tensor | None, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return turned queries, turned keys, and values, B×N×heads×channels, of B×N×3C.

    Args:
        qkv: The output of a linear layer, its bias added.
        bias: The layer's bias where this is to find its gradient, and the layer does not.
        rotation: From `grid_rotations`.
    """
    return _apply(fused_available(qkv), _heads_formula, _heads_gradients, qkv, bias, rotation)


def _heads_formula(qkv: Tensor, bias: Tensor | None, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _depending(qkv, bias).view(*qkv.shape[:2], 3, -1, rotation.shape[-1]).unbind(2)
    return rotate(q, rotation), rotate(k, rotation), v


def _heads_gradients(inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    _, bias, rotation = inputs
    dqkv, sums = _heads_backward(*grads, rotation.contiguous())
    return dqkv, _total(sums, 0, bias), None


@torch.compiler.allow_in_graph
def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return rms_norm(x)·scale + shift, and `x` for what is added to it later.

    All that is added to `x` is to be added to the second result: the gradients of both then meet in one pass.
    """
    return _apply(fused_available(x, scale), _norm_formula, _norm_gradients, x, scale, shift)


def _norm_formula(x: Tensor, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    normed = F.rms_norm(x, (x.shape[-1],), eps=EPS) * scale
    return normed if shift is None else normed + shift, x.view_as(x)


def _norm_gradients(inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    x, scale, shift = inputs
    dx, sums = _norm_backward(grads[1].contiguous(), grads[0].contiguous(), x.contiguous(), scale.contiguous())
    return dx, _total(sums[0], 1, scale), _total(sums[1], 1, shift)


@torch.compiler.allow_in_graph
def gated_sum(x: Tensor, out: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """Return x + gate·(out + bias), in the type of `x`."""
    return _apply(fused_available(x, gate), _gate_formula, _gate_gradients, x, out, gate, bias)


def _gate_formula(x: Tensor, out: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    # The bias is gated by itself: its gradient and the gate's then come from the same pass over the tokens.
    return torch.addcmul(x + (gate * bias).to(x.dtype), gate, out)


def _gate_gradients(inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    _, out, gate, bias = inputs
    dout, sums = _gate_backward(grads[0].contiguous(), out.contiguous(), gate.contiguous())
    of_out, of_ones = sums.sum(2)[:, :, None]
    dgate = of_out + bias * of_ones
    return grads[0], dout, dgate.to(gate.dtype), (gate * of_ones).sum((0, 1)).to(bias.dtype)


def _apply(fused: bool, formula: Callable[..., Any], gradients: Callable[..., Any], *inputs: Tensor | None) -> Any:
    return _Fused.apply(formula, gradients, *inputs) if fused else formula(*inputs)


def _depending(product: Tensor, bias: Tensor | None) -> Tensor:
    """Return a layer's output, depending on the layer's bias too where autograd looks."""
    return product if bias is None or not torch.is_grad_enabled() else product + (bias - bias.detach())


def _total(sums: Tensor, dim: int, like: Tensor | None) -> Tensor | None:
    """Add partial sums, and return them as the gradient of `like`."""
    return None if like is None else sums.sum(dim).reshape(like.shape).to(like.dtype)


# --------------------------------------------------------------------------------------------------- operators
# Opaque to the compiler, which neither splits nor recomputes them.


@torch.library.custom_op("underpaint::swiglu_backward", mutates_args=())
def _swiglu_backward(h: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dh, sums = _swiglu_results(h, dy)
    chunk, rows, columns, stages, warps = TILES["swiglu"]
    hidden = dy.shape[-1]
    grid = (len(sums), triton.cdiv(hidden, columns))
    _swiglu_kernel[grid](h, dy, dh, sums, dy.numel() // hidden, hidden, chunk, rows, columns, stages, num_warps=warps)
    return dh, sums


@_swiglu_backward.register_fake
def _swiglu_results(h: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    chunks = -(-dy.numel() // dy.shape[-1] // TILES["swiglu"][0])
    return torch.empty_like(h), h.new_empty(chunks, h.shape[-1], dtype=torch.float32)


@torch.library.custom_op("underpaint::heads_backward", mutates_args=())
def _heads_backward(dq: Tensor, dk: Tensor, dv: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    if not (dq.stride() == dk.stride() == dv.stride() and dq.stride(-1) == 1):
        dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
    dqkv, sums = _heads_results(dq, dk, dv, rotation)
    chunk, rows, columns, stages, warps = TILES["heads"]
    b, n, heads, channels = dq.shape
    strides = dq.stride()[:3]
    grid = (len(sums), 3 * triton.cdiv(heads * channels, columns))
    # So many neighbours lie side by side and begin where a wide read may.
    aligned = next(k for k in (8, 4, 2, 1) if not any(s % k for s in (channels, *strides)))
    _heads_kernel[grid](
        *(dq, dk, dv, rotation, dqkv, sums, *strides, b * n, n, heads * channels, channels),
        *(aligned, chunk, rows, columns, stages),
        num_warps=warps,
    )
    return dqkv, sums


@_heads_backward.register_fake
def _heads_results(dq: Tensor, dk: Tensor, dv: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    b, n, heads, channels = dq.shape
    width, chunks = 3 * heads * channels, -(-b * n // TILES["heads"][0])
    return dq.new_empty(b, n, width), dq.new_empty(chunks, width, dtype=torch.float32)


@torch.library.custom_op("underpaint::norm_backward", mutates_args=())
def _norm_backward(dx: Tensor, dn: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    result, sums = _norm_results(dx, dn, x, scale)
    chunk, rows, _, stages, warps = TILES["norm"]
    b, n, c = x.shape
    chunks, columns = sums.shape[2], triton.next_power_of_2(c)
    _norm_kernel[b, chunks](dx, dn, x, scale, result, sums, n, c, EPS, chunk, rows, columns, stages, num_warps=warps)
    return result, sums


@_norm_backward.register_fake
def _norm_results(dx: Tensor, dn: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    b, n, c = x.shape
    return torch.empty_like(x), x.new_empty(2, b, -(-n // TILES["norm"][0]), c, dtype=torch.float32)


@torch.library.custom_op("underpaint::gate_backward", mutates_args=())
def _gate_backward(dx: Tensor, out: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    dout, sums = _gate_results(dx, out, gate)
    chunk, rows, columns, stages, warps = TILES["gate"]
    b, n, c = out.shape
    grid = (b, sums.shape[2], triton.cdiv(c, columns))
    _gate_kernel[grid](dx, out, gate, dout, sums, n, c, chunk, rows, columns, stages, num_warps=warps)
    return dout, sums


@_gate_backward.register_fake
def _gate_results(dx: Tensor, out: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    b, n, c = out.shape
    return torch.empty_like(out), out.new_empty(2, b, -(-n // TILES["gate"][0]), c, dtype=torch.float32)


# ----------------------------------------------------------------------------------------------------- kernels
# A program adds up tile by tile and sums over the rows of a tile at its end: one exchange between threads, not many.

if triton is not None:

    @triton.jit
    def _swiglu_kernel(
        h,
        dy,
        dh,
        sums,
        tokens,
        hidden,
        CHUNK: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < hidden
        sum_a = tl.zeros([ROWS, COLUMNS], tl.float32)
        sum_b = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in tl.range(0, CHUNK, ROWS, num_stages=STAGES):
            rows = tl.program_id(0) * CHUNK + start + tl.arange(0, ROWS)
            mask = (rows < tokens)[:, None] & inside[None, :]
            rows = rows.to(tl.int64)[:, None]
            at = rows * (2 * hidden) + columns[None, :]
            a = tl.load(h + at, mask, 0.0).to(tl.float32)
            b = tl.load(h + at + hidden, mask, 0.0).to(tl.float32)
            g = tl.load(dy + rows * hidden + columns[None, :], mask, 0.0).to(tl.float32)
            s = tl.sigmoid(a)
            da = g * b * s * (1.0 + a * (1.0 - s))
            db = g * a * s
            tl.store(dh + at, da, mask)
            tl.store(dh + at + hidden, db, mask)
            sum_a += da
            sum_b += db
        at = tl.program_id(0) * (2 * hidden) + columns
        tl.store(sums + at, tl.sum(sum_a, 0), inside)
        tl.store(sums + at + hidden, tl.sum(sum_b, 0), inside)

    @triton.jit
    def _heads_kernel(
        dq, dk, dv, rotation, dqkv, sums, stride_b, stride_n, stride_h, tokens, n, width, channels,
        ALIGNED: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        blocks = tl.cdiv(width, COLUMNS)
        part = tl.program_id(1) // blocks
        columns = tl.program_id(1) % blocks * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < width
        channel = columns % channels
        source = columns // channels * stride_h + channel
        # The compiler cannot see through the division that so many neighbours stay neighbours.
        source = tl.max_contiguous(tl.multiple_of(source, ALIGNED), ALIGNED)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in tl.range(0, CHUNK, ROWS, num_stages=STAGES):
            rows = tl.program_id(0) * CHUNK + start + tl.arange(0, ROWS)
            mask = (rows < tokens)[:, None] & inside[None, :]
            place = rows % n
            at = ((rows // n).to(tl.int64) * stride_b + place * stride_n)[:, None] + source[None, :]
            if part == 0:
                g = tl.load(dq + at, mask, 0.0).to(tl.float32)
            elif part == 1:
                g = tl.load(dk + at, mask, 0.0).to(tl.float32)
            else:
                g = tl.load(dv + at, mask, 0.0).to(tl.float32)
            if part < 2:
                angle = place[:, None] * channels + channel[None, :]
                angle = tl.max_contiguous(tl.multiple_of(angle, (1, ALIGNED)), (1, ALIGNED))
                cosine = tl.load(rotation + angle, mask, 0.0)
                sine = tl.load(rotation + n * channels + angle, mask, 0.0)
                first, second = tl.split(tl.reshape(g * sine, [ROWS, COLUMNS // 2, 2]))
                g = g * cosine + tl.reshape(tl.join(second, first), [ROWS, COLUMNS])
            tl.store(dqkv + rows.to(tl.int64)[:, None] * (3 * width) + part * width + columns[None, :], g, mask)
            total += g
        tl.store(sums + tl.program_id(0) * (3 * width) + part * width + columns, tl.sum(total, 0), inside)

    @triton.jit
    def _norm_kernel(
        dx, dn, x, scale, result, sums, n, width, EPS: tl.constexpr,
        CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
        columns = tl.arange(0, COLUMNS)
        inside = columns < width
        factor = tl.load(scale + sample * width + columns, inside, 0.0).to(tl.float32)[None, :]
        sum_scale = tl.zeros([ROWS, COLUMNS], tl.float32)
        sum_shift = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in tl.range(0, CHUNK, ROWS, num_stages=STAGES):
            rows = chunk * CHUNK + start + tl.arange(0, ROWS)
            mask = (rows < n)[:, None] & inside[None, :]
            at = (sample * n + rows)[:, None] * width + columns[None, :]
            value = tl.load(x + at, mask, 0.0).to(tl.float32)
            g = tl.load(dn + at, mask, 0.0).to(tl.float32)
            passed = tl.load(dx + at, mask, 0.0).to(tl.float32)
            inverse = tl.rsqrt(tl.sum(value * value, 1) / width + EPS)[:, None]
            inner = tl.sum(value * (g * factor), 1)[:, None] / width
            normed = value * inverse
            tl.store(result + at, passed + inverse * (g * factor - normed * (inverse * inner)), mask)
            sum_scale += g * normed
            sum_shift += g
        at = (sample * tl.num_programs(1) + chunk) * width + columns
        tl.store(sums + at, tl.sum(sum_scale, 0), inside)
        tl.store(sums + tl.num_programs(0) * tl.num_programs(1) * width + at, tl.sum(sum_shift, 0), inside)

    @triton.jit
    def _gate_kernel(
        dx,
        out,
        gate,
        dout,
        sums,
        n,
        width,
        CHUNK: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
        columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < width
        factor = tl.load(gate + sample * width + columns, inside, 0.0).to(tl.float32)[None, :]
        sum_out = tl.zeros([ROWS, COLUMNS], tl.float32)
        sum_ones = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in tl.range(0, CHUNK, ROWS, num_stages=STAGES):
            rows = chunk * CHUNK + start + tl.arange(0, ROWS)
            mask = (rows < n)[:, None] & inside[None, :]
            at = (sample * n + rows)[:, None] * width + columns[None, :]
            g = tl.load(dx + at, mask, 0.0).to(tl.float32)
            tl.store(dout + at, g * factor, mask)
            sum_out += g * tl.load(out + at, mask, 0.0).to(tl.float32)
            sum_ones += g
        at = (sample * tl.num_programs(1) + chunk) * width + columns
        tl.store(sums + at, tl.sum(sum_out, 0), inside)
        tl.store(sums + tl.num_programs(0) * tl.num_programs(1) * width + at, tl.sum(sum_ones, 0), inside)

"""Rows of float8 numbers (e4m3) with a scale each, and linear layers that multiply them.

A layer's weights are rounded once. Its inputs are rounded every time, by a kernel that reads a row once: compiled
reductions over rows this long read them twice, which costs most of what 8-bit products save.
"""

# What Triton compiles has no types that mypy knows.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # There is none for some systems; torch then comes without it.
    triton = None

__all__ = ["Fp8Linear", "round_gated_rows", "round_rows", "swiglu_linear"]

LARGEST = 448.0
"""The largest number of e4m3 (Micikevicius et al. 2022, table 1)."""

_SMALLEST_SCALE = 1e-12
_TILE = 4096


class Fp8Linear(nn.Module):
    """A linear layer with frozen weights that multiplies in 8 bits; on a CPU, it computes what such products give.

    Rows of the inputs, and of the weights, which make one output each, are rounded with scales of their own. So what
    becomes of a row does not depend on the others of a batch.

    Args:
        layer: Whose weights are taken.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight, scale = round_rows(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """Return …×outputs in bf16, of …×inputs of any type."""
        # In bf16 first, as an ordinary layer has its inputs under autocast: half of what fp32 would have to be written.
        return self._multiply(x, *round_rows(x.to(torch.bfloat16).reshape(-1, x.shape[-1])))

    def of_gated(self, h: Tensor) -> Tensor:
        """Return what `forward` makes of silu(a)·b, …×outputs in bf16, of h = [a|b], …×2·inputs."""
        return self._multiply(h, *round_gated_rows(h.reshape(-1, h.shape[-1])))

    def _multiply(self, x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
        if x.is_cuda:
            # The fast sums of Hopper's tensor cores keep about 14 bits: sums of 3,072 terms are up to 2 % off then
            # (DeepSeek-AI 2024, section 3.3.2).
            out = torch._scaled_mm(
                rows, self.weight.T, scale, self.scale, self.bias, out_dtype=torch.bfloat16, use_fast_accum=False
            )
        else:
            out = (rows.float() @ self.weight.float().T * scale * self.scale).to(torch.bfloat16)
            out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], -1)


def swiglu_linear(layer: nn.Module, h: Tensor) -> Tensor:
    """Return what a linear layer makes of silu(a)·b, for MLPs with gated units (SwiGLU, Shazeer 2020).

    A layer that multiplies in 8 bits rounds the units while they are made, in one pass over memory.

    Args:
        layer: Of so many inputs as there are units.
        h: [a|b], …×2·units.
    """
    if isinstance(layer, Fp8Linear):
        return layer.of_gated(h)
    a, b = h.chunk(2, dim=-1)
    out: Tensor = layer(F.silu(a) * b)
    return out


@torch.library.custom_op("underpaint::round_rows", mutates_args=())
def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to e4m3, the largest number of each becoming the format's largest.

    A row with a number that is not finite gives numbers that are not: nothing is cut off.

    Args:
        x: N×C.

    Returns:
        N×C rounded numbers, and N×1 scales in fp32 by which to multiply them.
    """
    scale = (x.abs().amax(1, keepdim=True).float() / LARGEST).clamp(min=_SMALLEST_SCALE)
    return (x.float() / scale).to(torch.float8_e4m3fn).contiguous(), scale


@round_rows.register_fake
def _results(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(len(x), 1, dtype=torch.float32)


@torch.library.custom_op("underpaint::round_gated_rows", mutates_args=())
def round_gated_rows(h: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows of silu(a)·b to e4m3 as `round_rows` does.

    Args:
        h: [a|b], N×2C.

    Returns:
        N×C rounded numbers, and N×1 scales in fp32 by which to multiply them.
    """
    a, b = h.float().chunk(2, dim=1)
    rounded, scale = round_rows(F.silu(a) * b)
    return rounded, scale


@round_gated_rows.register_fake
def _gated_results(h: Tensor) -> tuple[Tensor, Tensor]:
    rounded = h.new_empty(len(h), h.shape[1] // 2, dtype=torch.float8_e4m3fn)
    return rounded, h.new_empty(len(h), 1, dtype=torch.float32)


if triton is not None:

    def round_rows_by_kernel(x: Tensor) -> tuple[Tensor, Tensor]:
        """Do the same in one pass over memory."""
        return _round_by_kernel(x.contiguous(), *_results(x), gated=False)

    def round_gated_rows_by_kernel(h: Tensor) -> tuple[Tensor, Tensor]:
        """Do the same in one pass over memory."""
        return _round_by_kernel(h.contiguous(), *_gated_results(h), gated=True)

    def _round_by_kernel(x: Tensor, rounded: Tensor, scale: Tensor, *, gated: bool) -> tuple[Tensor, Tensor]:
        columns = triton.next_power_of_2(rounded.shape[1])
        rows = max(1, _TILE // columns)
        grid = (triton.cdiv(len(x), rows),)
        # Triton launches on the device that is current, wherever the tensors are.
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            _round_rows_kernel[grid](x, rounded, scale, *rounded.shape, LARGEST, _SMALLEST_SCALE, gated, rows, columns)
        return rounded, scale

    round_rows.register_kernel("cuda")(round_rows_by_kernel)
    round_gated_rows.register_kernel("cuda")(round_gated_rows_by_kernel)

    @triton.jit
    def _round_rows_kernel(
        x, rounded, scale, count, width, largest, smallest_scale, GATED: tl.constexpr, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, COLUMNS)
        mask = (rows < count)[:, None] & (columns < width)[None, :]
        row = rows.to(tl.int64)[:, None]
        if GATED:
            at = row * (2 * width) + columns[None, :]
            gate = tl.load(x + at, mask, 0.0).to(tl.float32)
            values = gate * tl.sigmoid(gate) * tl.load(x + at + width, mask, 0.0).to(tl.float32)
        else:
            values = tl.load(x + row * width + columns[None, :], mask, 0.0).to(tl.float32)
        # Triton divides about to the last bit. Where a row's largest number is 7·2^k times a short one, many of the
        # quotients lie half-way between two numbers of e4m3, and all of them would go to the other than on a CPU.
        scales = tl.maximum(tl.div_rn(tl.max(tl.abs(values), 1), largest), smallest_scale)
        inverse = tl.div_rn(1.0, scales)[:, None]
        near = values * inverse
        quotients = tl.fma(tl.fma(-near, scales[:, None], values), inverse, near)
        at = row * width + columns[None, :]
        tl.store(rounded + at, quotients.to(tl.float8e4nv), mask)
        tl.store(scale + rows, scales, rows < count)

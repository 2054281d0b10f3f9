"""Rows of float8 numbers (e4m3) with a scale each, and linear layers that multiply them.

A layer's weights are rounded once. Its inputs are rounded every time, by a kernel that reads a row once: compiled
reductions over rows this long read them twice, which costs most of what 8-bit products save.
"""

# What Triton compiles has no types that mypy knows.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # There is none for some systems; torch then comes without it.
    triton = None

__all__ = ["Fp8Linear", "round_rows"]

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
        rows, scale = round_rows(x.to(torch.bfloat16).reshape(-1, x.shape[-1]))
        if x.is_cuda:
            out = torch._scaled_mm(
                rows, self.weight.T, scale, self.scale, self.bias, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        else:
            out = (rows.float() @ self.weight.float().T * scale * self.scale).to(torch.bfloat16)
            out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], -1)


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


if triton is not None:

    def round_rows_by_kernel(x: Tensor) -> tuple[Tensor, Tensor]:
        """Do the same in one pass over memory."""
        x = x.contiguous()
        rounded, scale = _results(x)
        columns = triton.next_power_of_2(x.shape[1])
        rows = max(1, _TILE // columns)
        grid = (triton.cdiv(len(x), rows),)
        # Triton launches on the device that is current, wherever the tensors are.
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            _round_rows_kernel[grid](x, rounded, scale, *x.shape, LARGEST, _SMALLEST_SCALE, rows, columns)
        return rounded, scale

    round_rows.register_kernel("cuda")(round_rows_by_kernel)

    @triton.jit
    def _round_rows_kernel(
        x, rounded, scale, count, width, largest, smallest_scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr
    ):  # fmt: skip
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, COLUMNS)
        mask = (rows < count)[:, None] & (columns < width)[None, :]
        at = rows.to(tl.int64)[:, None] * width + columns[None, :]
        values = tl.load(x + at, mask, 0.0).to(tl.float32)
        scales = tl.maximum(tl.max(tl.abs(values), 1) / largest, smallest_scale)
        tl.store(rounded + at, (values / scales[:, None]).to(tl.float8e4nv), mask)
        tl.store(scale + rows, scales, rows < count)

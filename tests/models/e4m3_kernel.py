"""The kernel that rounds rows, run by Triton's interpreter; test_e4m3 starts this."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from underpaint.models.e4m3 import round_gated_rows, round_gated_rows_by_kernel, round_rows, round_rows_by_kernel

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
# Rows that fill no tile, several rows a program and one, widths that are no powers of two.
SIZES = pytest.mark.parametrize(("n", "c"), [(5, 72), (33, 1152), (3, 3072), (2, 5000), (1, 1)])


@DTYPES
@SIZES
def test_it_rounds_as_the_formula_does(n: int, c: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(n, c, generator=generator) * torch.logspace(-3, 3, n)[:, None]).to(dtype)
    found, scale = round_rows_by_kernel(x)
    expected, same = round_rows(x)
    assert torch.equal(scale, same)
    compare(found, expected)


def compare(found: Tensor, expected: Tensor, tied: bool = False) -> None:
    assert found.dtype == expected.dtype
    # The interpreter's own rounding to float8 may be a step below, and forgets what is carried into the exponent: where
    # a power of two is the nearest it may give the half. The hardware does neither. Where the last bit of what is
    # rounded differs too, that power may be the neighbour of the nearest.
    carried = (expected.view(torch.uint8) % 8 == 0) | tied
    step = torch.where(carried, expected.float().abs() / 2, expected.float().abs() / 8).clamp(min=2.0**-9)
    assert bool(((found.float() - expected.float()).abs() <= step).all())
    assert (found.float() == expected.float()).float().mean() > 0.9


@DTYPES
@SIZES
def test_it_makes_gated_units_too(n: int, c: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    h = (torch.randn(n, 2 * c, generator=generator) * torch.logspace(-2, 1, n)[:, None]).to(dtype)
    found, scale = round_gated_rows_by_kernel(h)
    expected, same = round_gated_rows(h)
    torch.testing.assert_close(scale, same, rtol=1e-5, atol=0.0)
    compare(found, expected, tied=True)


def test_it_reads_what_does_not_lie_together() -> None:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    for view in (x[:, :16], x.T, x[::2]):
        found, scale = round_rows_by_kernel(view)
        expected, same = round_rows_by_kernel(view.clone(memory_format=torch.contiguous_format))
        assert torch.equal(scale, same)
        assert torch.equal(found.float(), expected.float())


def test_a_row_of_zeros_stays_one() -> None:
    found, scale = round_rows_by_kernel(torch.zeros(2, 8))
    assert not found.float().any()
    assert bool((scale > 0).all())


def test_rows_of_any_size_have_the_same_digits() -> None:
    # The reciprocal of a scale, and what a product is off by, must not vanish or grow beyond fp32.
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    expected, _ = round_rows_by_kernel(x)
    for power in (-24, -3, 30, 120):
        found, scale = round_rows_by_kernel(x * 2.0**power)
        assert torch.equal(found.float(), expected.float())
        assert torch.equal(scale, (x.abs().amax(1, keepdim=True) * 2.0**power) / 448)

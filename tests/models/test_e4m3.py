"""Rows of float8 numbers, and the layers that multiply them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.triton_interpreter import check_in_interpreter
from underpaint.models.e4m3 import Fp8Linear, round_gated_rows, round_rows, swiglu_linear


def every_number() -> Tensor:
    """All finite numbers of e4m3, from its definition: one sign, four exponent and three mantissa bits, bias 7."""
    code = torch.arange(0x7F)
    exponent, mantissa = code // 8, (code % 8).double() / 8
    size = torch.where(exponent == 0, 2.0**-6 * mantissa, 2.0 ** (exponent - 7).double() * (1 + mantissa))
    return torch.cat([-size.flip(0), size[1:]])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_the_nearest_there_are(dtype: torch.dtype) -> None:
    x = (draw(6, 50) * torch.logspace(-4, 4, 6)[:, None]).to(dtype)
    rounded, scale = round_rows(x)
    assert rounded.dtype == torch.float8_e4m3fn
    assert scale.shape == (6, 1)
    exact = x.double() / scale.double()
    nearest = (exact[..., None] - every_number()).abs().amin(-1)
    torch.testing.assert_close((rounded.double() - exact).abs(), nearest, rtol=1e-5, atol=1e-7)


def test_the_largest_of_each_row_is_the_formats_largest() -> None:
    x = draw(6, 50) * torch.logspace(-4, 4, 6)[:, None]
    rounded, scale = round_rows(x)
    assert every_number().max() == 448
    assert torch.equal(rounded.float().abs().amax(1), torch.full((6,), 448.0))
    torch.testing.assert_close(scale[:, 0].double(), x.double().abs().amax(1) / 448, rtol=1e-6, atol=0.0)


def test_rows_are_rounded_by_themselves() -> None:
    x = draw(6, 50)
    rounded, scale = round_rows(x)
    for row in range(6):
        alone, own = round_rows(x[row : row + 1])
        assert torch.equal(alone.float(), rounded[row : row + 1].float())
        assert torch.equal(own, scale[row : row + 1])


def test_a_row_of_zeros_stays_one() -> None:
    rounded, scale = round_rows(torch.zeros(2, 8))
    assert not rounded.float().any()
    assert bool((scale > 0).all())


def test_what_the_operator_promises_the_compiler() -> None:
    for x in (draw(6, 50), draw(50, 6).T, draw(6, 50)[:, :20]):
        for operator in (round_rows, round_gated_rows):
            torch.library.opcheck(operator, (x,), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_units_are_made_exactly_and_rounded_once(dtype: torch.dtype) -> None:
    h = (draw(6, 100) * torch.logspace(-2, 1, 6)[:, None]).to(dtype)
    rounded, scale = round_gated_rows(h)
    a, b = h.double().chunk(2, 1)
    units = a / (1 + torch.exp(-a)) * b
    torch.testing.assert_close(scale[:, 0].double(), units.abs().amax(1) / 448, rtol=1e-6, atol=0.0)
    exact = units / scale.double()
    nearest = (exact[..., None] - every_number()).abs().amin(-1)
    torch.testing.assert_close((rounded.double() - exact).abs(), nearest, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_the_kernel_in_the_interpreter() -> None:
    check_in_interpreter(Path(__file__).with_name("e4m3_kernel.py"))


# --------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_have_the_error_of_four_significant_bits(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 64, bias=bias)
    x = draw(4, 16, 256).to(dtype)
    with torch.no_grad():
        exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    found = Fp8Linear(layer)(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == (4, 16, 64)
    error = (found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    # Rounding to four bits: relative errors spread evenly up to 1/16 or 1/32 depending on the number, about 0.026 in
    # the root mean square; two factors have sqrt(2) times that, and errors of products add up like the products do.
    assert 0.026 < float(error) < 0.052


@pytest.mark.parametrize("bias", [True, False])
def test_gated_products_are_those_of_the_units(bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(256, 64, bias=bias)
    h = draw(4, 16, 512)
    a, b = h.double().chunk(2, -1)
    with torch.no_grad():
        units = a / (1 + torch.exp(-a)) * b
        exact = nn.functional.linear(units, plain.weight.double(), plain.bias.double() if bias else None)
        torch.testing.assert_close(swiglu_linear(plain, h).double(), exact, rtol=1e-4, atol=1e-5)
    layer = Fp8Linear(plain)
    found = swiglu_linear(layer, h)
    assert (found.shape, found.dtype) == ((4, 16, 64), torch.bfloat16)
    # In bf16 first, or not: some numbers are rounded to a neighbour, which is less than rounding is off itself.
    off, other = (float((y.double() - exact).square().mean().sqrt()) for y in (found, layer(units.float())))
    assert off < 1.05 * other
    assert off < 0.052 * float(exact.square().mean().sqrt())


def test_a_row_that_is_not_finite_shows_and_stays_alone() -> None:
    layer = Fp8Linear(nn.Linear(32, 16))
    x = draw(3, 32)
    clean = layer(x)
    for bad in (float("nan"), float("inf")):
        x[1, 5] = bad
        found = layer(x)
        assert not bool(found[1].isfinite().any())
        assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_views_are_read_as_they_are() -> None:
    layer = Fp8Linear(nn.Linear(32, 16))
    x = draw(3, 5, 96)
    assert torch.equal(layer(x[..., 32:64]), layer(x[..., 32:64].clone()))
    assert torch.equal(layer(x[..., :32].transpose(0, 1)), layer(x[..., :32]).transpose(0, 1))


def test_it_compiles_whole() -> None:
    layer = Fp8Linear(nn.Linear(32, 16))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(draw(3, 32)), layer(draw(3, 32)))


def test_it_moves_and_is_copied_with_its_module() -> None:
    layer = nn.Sequential(Fp8Linear(nn.Linear(32, 16)))
    other = nn.Sequential(Fp8Linear(nn.Linear(32, 16)))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(draw(3, 32)), layer(draw(3, 32)))
    assert layer.to("meta")[0].weight.dtype == torch.float8_e4m3fn


def test_the_gpus_product_takes_what_it_is_given() -> None:
    # Sizes, types and orders of memory are checked without a GPU too; the numbers are not.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = Fp8Linear(nn.Linear(64, 96, device="cuda"))
        found = layer(torch.empty(2, 50, 64, device="cuda"))
        gated = swiglu_linear(layer, torch.empty(2, 50, 128, device="cuda"))
    for y in (found, gated):
        assert (y.shape, y.dtype, y.device.type) == ((2, 50, 96), torch.bfloat16, "cuda")


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="It needs a GPU with matrix products in 8 bits.",
)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "inputs", "outputs"), [(1, 16, 16), (37, 96, 48), (512, 1152, 3072), (333, 3072, 1152)])
def test_a_gpu_rounds_and_multiplies_as_the_formula_does(n: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x = (draw(n, inputs) * torch.logspace(-3, 3, n)[:, None]).to(dtype)
    linear = nn.Linear(inputs, outputs)
    layer = Fp8Linear(linear)
    expected, (rounded, scale) = layer(x), round_rows(x)
    layer.cuda()
    found, (fast, fast_scale) = layer(x.cuda()), round_rows(x.cuda())
    # To the last bit: where numbers lie half-way between two, it decides, and for some rows that is one in thirty.
    assert torch.equal(fast_scale.cpu(), scale)
    assert torch.equal(fast.cpu().float(), rounded.float())
    size = expected.float().abs().amax(1, keepdim=True)
    # Products and sums with the bias are rounded to bf16 once or twice: to half a step each, and that of 2^-7.
    assert float(((found.cpu().float() - expected.float()).abs() / size).max()) < 2**-7 + 2**-8
    # What the hardware's sums add must stay below what rounding the inputs costs.
    with torch.no_grad():
        exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    size = exact.square().mean(1, keepdim=True).sqrt()
    off, expected_off = (((y.cpu().double() - exact) / size).square().mean().sqrt() for y in (found, expected))
    assert off < 1.25 * expected_off


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "units"), [(1, 16), (37, 96), (333, 3072)])
def test_a_gpu_makes_gated_units_as_the_formula_does(n: int, units: int, dtype: torch.dtype) -> None:
    h = (draw(n, 2 * units) * torch.logspace(-2, 1, n)[:, None]).to(dtype)
    expected, scale = round_gated_rows(h)
    found, found_scale = round_gated_rows(h.cuda())
    torch.testing.assert_close(found_scale.cpu(), scale, rtol=1e-5, atol=0.0)
    # Where a number lies half-way between two, the last bits of its unit and of its scale decide.
    assert (found.cpu().float() == expected.float()).float().mean() > 0.999


# The interpreter's rounding to float8 knows no numbers that are not finite, so that only a GPU can show this.
@needs_gpu
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_on_a_gpu_too_a_row_that_is_not_finite_shows_and_stays_alone(bad: float) -> None:
    layer = Fp8Linear(nn.Linear(32, 16)).cuda()
    for call, width in ((layer, 32), (layer.of_gated, 64)):
        x = draw(3, width).cuda()
        clean = call(x)
        x[1, 5] = bad
        found = call(x)
        assert not bool(found[1].isfinite().any())
        assert torch.equal(found[[0, 2]], clean[[0, 2]])

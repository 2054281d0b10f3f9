"""DiffAugment against loops over single pixels, and its draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from underpaint_critics.diffaugment import DiffAugment, brightness, contrast, cutout, saturation, translate


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draws(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_colour_in_closed_form() -> None:
    x, u = random(3, 3, 4, 5), torch.tensor([0.0, 0.25, 0.9])
    n, k = x.numpy(), u.double().numpy().reshape(3, 1, 1, 1)
    grey, mean = n.mean(1, keepdims=True), n.mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(brightness(x, u), n + k - 0.5, rtol=1e-6)
    np.testing.assert_allclose(saturation(x, u), grey + 2 * k * (n - grey), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(contrast(x, u), mean + (k + 0.5) * (n - mean), rtol=1e-6, atol=1e-6)


def test_colour_at_its_neutral_draw_changes_nothing() -> None:
    x, half = random(2, 3, 4, 4), torch.full((2,), 0.5)
    for change in (brightness, saturation, contrast):
        torch.testing.assert_close(change(x, half), x)


@pytest.mark.parametrize(("height", "width", "ratio"), [(8, 8, 0.125), (16, 24, 0.125), (7, 5, 0.3), (4, 4, 0.0)])
def test_shift_against_a_loop(height: int, width: int, ratio: float) -> None:
    x, down, right = random(6, 2, height, width), draws(6), draws(6, 2)
    wanted = np.zeros(x.shape)
    reach = (round(height * ratio), round(width * ratio))
    for b in range(6):
        dy = int(np.floor(float(down[b]) * (2 * reach[0] + 1))) - reach[0]
        dx = int(np.floor(float(right[b]) * (2 * reach[1] + 1))) - reach[1]
        for i in range(height):
            for j in range(width):
                if 0 <= i + dy < height and 0 <= j + dx < width:
                    wanted[b, :, i, j] = x[b, :, i + dy, j + dx]
    np.testing.assert_array_equal(translate(x, down, right, ratio), wanted)


def test_shifts_reach_both_ends_evenly() -> None:
    # 16 px and an eighth: five shifts, −2 … 2, each for a fifth of the unit interval.
    u = (torch.arange(1000) + 0.5) / 1000
    x = torch.arange(1.0, 17.0).view(1, 1, 16, 1).expand(1000, 1, 16, 16)
    moved = translate(x, u, torch.full((1000,), 0.5), 0.125)
    shifts = moved[:, 0, 8, 8] - 9
    assert torch.bincount((shifts + 2).long()).tolist() == [200] * 5


@pytest.mark.parametrize(("height", "width", "ratio"), [(10, 10, 0.2), (16, 24, 0.2), (9, 6, 0.5), (4, 4, 0.1)])
def test_cutout_against_a_loop(height: int, width: int, ratio: float) -> None:
    count = 40
    x, down, right = random(count, 2, height, width) + 100, draws(count), draws(count, 2)
    wanted = x.numpy().copy()
    size = (round(height * ratio), round(width * ratio))
    for b in range(count):
        y = int(np.floor(float(down[b]) * (height + 1 - size[0] % 2))) - size[0] // 2
        z = int(np.floor(float(right[b]) * (width + 1 - size[1] % 2))) - size[1] // 2
        wanted[b, :, max(y, 0) : max(y + size[0], 0), max(z, 0) : max(z + size[1], 0)] = 0
    np.testing.assert_array_equal(cutout(x, down, right, ratio), wanted)


def test_cutout_may_hang_over_every_edge() -> None:
    x = torch.ones(2, 1, 10, 10)
    ends = torch.tensor([0.0, 0.999])
    # Four pixels wide, centred on a corner: two by two of them lie inside.
    assert (cutout(x, ends, ends, 0.4) == 0).sum((1, 2, 3)).tolist() == [4, 4]


def test_each_image_has_its_own_draw() -> None:
    x = random(1, 3, 16, 16).expand(64, 3, 16, 16).float()
    torch.manual_seed(0)
    seen = DiffAugment()(x)
    assert len({tuple(image.flatten().tolist()) for image in seen}) == 64


def test_the_order_is_colour_shift_cutout() -> None:
    x = torch.full((16, 3, 16, 16), 0.25)
    torch.manual_seed(3)
    seen = DiffAugment()(x)
    torch.manual_seed(3)
    u = torch.rand(7, 16)
    coloured = contrast(saturation(brightness(x, u[0]), u[1]), u[2])
    torch.testing.assert_close(seen, cutout(translate(coloured, u[3], u[4], 0.125), u[5], u[6], 0.2))
    # What moved in and what was cut is exactly 0: colour comes first.
    assert (seen == 0).any()
    assert ((seen == 0) | (seen == coloured.mean((1, 2, 3), keepdim=True)) | (seen - coloured).abs().lt(1e-6)).all()


def test_parts_can_be_left_out() -> None:
    x = random(4, 3, 8, 8)
    assert DiffAugment(color=False, translation=0.0, cutout=0.0)(x) is x
    torch.manual_seed(0)
    only_colour = DiffAugment(translation=0.0, cutout=0.0)(x)
    assert not (only_colour == 0).any()
    torch.manual_seed(0)
    only_moved = DiffAugment(color=False)(x)
    assert set(only_moved.flatten().tolist()) <= {0.0, *x.flatten().tolist()}


def test_gradients_are_exact() -> None:
    x, u = random(2, 3, 5, 6).requires_grad_(), draws(2)

    def change(value: Tensor) -> Tensor:
        return cutout(translate(contrast(saturation(brightness(value, u), u), u), u, 1 - u, 0.3), u, u, 0.3)

    assert torch.autograd.gradcheck(change, x)
    assert torch.autograd.gradgradcheck(change, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_follows(dtype: torch.dtype) -> None:
    seen = DiffAugment()(random(2, 3, 16, 16).to(dtype))
    assert seen.dtype == dtype
    assert seen.isfinite().all()


def test_nothing_waits_for_the_device() -> None:
    # The meta device refuses every read of a value, and every tensor of the CPU among its own.
    assert DiffAugment()(torch.empty(2, 3, 16, 24, device="meta")).shape == (2, 3, 16, 24)


def test_values_have_the_published_ranges() -> None:
    torch.manual_seed(0)
    shift = DiffAugment(translation=0.0, cutout=0.0)(torch.zeros(4000, 3, 1, 1))[:, 0, 0, 0]
    assert float(shift.min()) == pytest.approx(-0.5, abs=0.01)
    assert float(shift.max()) == pytest.approx(0.5, abs=0.01)
    assert float(shift.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(shift.std()) == pytest.approx(12**-0.5, abs=0.01)

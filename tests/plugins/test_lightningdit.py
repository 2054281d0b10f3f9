"""The LightningDiT backbone: a float64 copy of its arithmetic, positions. What all backbones do: test_backbones."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.plugins import backbones
from tests.plugins.backbones import disturbed, flops, inputs, large, parameters
from timm.layers import build_sincos2d_pos_embed

from underpaint import ConfigError
from underpaint_lightningdit.block import GatedLinear, ModulatedNorm
from underpaint_lightningdit.positions import grid_positions, grid_rotations, rotate, time_sinusoids
from underpaint_lightningdit.tokens import image, patches

TINY = backbones.TINY["lightningdit/S-2"]
make = partial(backbones.make, "lightningdit/S-2")


# ------------------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize(
    ("size", "depth", "n", "hidden", "head"),
    # Depth, width and head channels as the authors' table of models has them (S is DiT's); the SwiGLU's hidden
    # channels are two thirds of 4·width, rounded down.
    [
        ("S", 12, 384, 1024, 64),
        ("B", 12, 768, 2048, 64),
        ("L", 24, 1024, 2730, 64),
        ("XL", 28, 1152, 3072, 72),
        ("1p0B", 24, 1536, 4096, 64),
        ("1p6B", 28, 1792, 4778, 64),
    ],
)
@pytest.mark.parametrize("patch", [1, 2])
def test_parameters_in_closed_form(size: str, depth: int, n: int, hidden: int, head: int, patch: int) -> None:
    cells = 32 * patch**2
    mixing = (3 * n * n + 3 * n) + (n * n + n) + 2 * head
    swiglu = (2 * hidden * n + 2 * hidden) + (hidden * n + n)
    block = 2 * n + mixing + swiglu + (6 * n * n + 6 * n)
    around = (cells * n + n) + (256 * n + n + n * n + n) + n + (2 * n * n + 2 * n) + (n * cells + cells)
    full, unshifted = (
        parameters(large(f"lightningdit/{size}-{patch}", d=32, grid=(16, 16), pooled=n, shift=shift))
        for shift in (True, False)
    )
    assert full == depth * block + around
    assert unshifted == depth * (block - 2 * n * n - 2 * n) + around


@pytest.mark.parametrize(
    ("size", "depth", "n"), [("B", 12, 768), ("L", 24, 1024), ("XL", 28, 1152), ("1p0B", 24, 1536), ("1p6B", 28, 1792)]
)
def test_flops_in_closed_form(size: str, depth: int, n: int) -> None:
    cells, hidden = 256, 8 * n // 3
    # Of a block: queries, keys, values and output; scores and their use; three matrices of the SwiGLU; modulation.
    block = cells * 4 * n * n + 2 * cells**2 * n + cells * 3 * n * hidden + 6 * n * n
    ends = 2 * cells * 32 * n + (256 * n + n * n) + 2 * n * n
    model = large(f"lightningdit/{size}-1", d=32, grid=(16, 16), pooled=n)
    assert flops(model, d=32, grid=(16, 16), pooled=n) == 2 * (depth * block + ends)


# ------------------------------------------------------------------------------------------------ arithmetic


def turn(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Rotary positions as products of complex numbers; B×heads×N×channels."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    half = pairs.shape[-2] // 2
    frequencies = 10_000.0 ** (-2.0 * np.arange(half) / (2 * half))
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = np.concatenate((np.outer(row, frequencies), np.outer(column, frequencies)), axis=1)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    return np.stack((turned.real, turned.imag), axis=-1).reshape(x.shape)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_whole_model_in_float64_numpy(qk_norm: bool, shift: bool) -> None:
    model = disturbed(make(**TINY, qk_norm=qk_norm, shift=shift, pooled=12).double())
    x, t, condition = inputs(grid=(4, 6), pooled=12, dtype=torch.float64)
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}

    def linear(name: str, v: np.ndarray) -> np.ndarray:
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gated(name: str, v: np.ndarray) -> np.ndarray:
        return v @ w[f"{name}.linear.weight"].T + w[f"{name}.bias"]

    def norm(name: str, v: np.ndarray) -> np.ndarray:
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"]

    def silu(v: np.ndarray) -> np.ndarray:
        return v / (1 + np.exp(-v))

    def attend(name: str, v: np.ndarray) -> np.ndarray:
        q, k, value = (p.reshape(2, 6, 4, 8).transpose(0, 2, 1, 3) for p in np.split(linear(f"{name}.qkv", v), 3, -1))
        if qk_norm:
            q, k = norm(f"{name}.norm_q", q), norm(f"{name}.norm_k", k)
        q, k = turn(q, 2, 3), turn(k, 2, 3)
        scores = np.exp(q @ k.transpose(0, 1, 3, 2) / math.sqrt(8))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ value
        return gated(f"{name}.out", mixed.transpose(0, 2, 1, 3).reshape(2, 6, 32))

    rows = [x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(2, -1).numpy() for i in range(2) for j in range(3)]
    h = linear("embed", np.stack(rows, axis=1)) + grid_positions(2, 3, 32).numpy()
    vector = linear("time.2", silu(linear("time.0", time_sinusoids(t).numpy())))
    vector = silu(vector + linear("project", condition.pooled.numpy()))
    hidden = []
    for i in range(2):
        name = f"layers.{i}"
        vectors = [v[:, None] for v in np.split(linear(f"{name}.modulation", vector), 6 if shift else 4, -1)]
        a, b, c, d, e, f = vectors if shift else (0.0, vectors[0], vectors[1], 0.0, vectors[2], vectors[3])
        h = h + c * attend(name, norm(f"{name}.norm1", h) * (1 + b) + a)
        one, two = np.split(linear(f"{name}.up", norm(f"{name}.norm2", h) * (1 + e) + d), 2, -1)
        h = h + f * gated(f"{name}.down", silu(one) * two)
        hidden.append(h)
    last, scale = (v[:, None] for v in np.split(linear("modulation", vector), 2, -1))
    out = linear("head", norm("norm", h) * (1 + scale) + last).reshape(2, 2, 3, 2, 2, 4)

    prediction = model(x, t, condition, layers=(0, 1))
    got = prediction.velocity.detach().numpy()
    for i, j, a, b in np.ndindex(2, 3, 2, 2):
        np.testing.assert_allclose(got[:, :, 2 * i + a, 2 * j + b], out[:, i, j, a, b], rtol=1e-9, atol=1e-10)
    for index, expected in enumerate(hidden):
        np.testing.assert_allclose(prediction.hidden[index].detach().numpy(), expected, rtol=1e-9, atol=1e-10)


def test_gradients_of_the_rearranged_layers() -> None:
    """Scales and biases are moved for speed; their gradients are those of the plain formulas."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    norm, gated = ModulatedNorm(8).double(), GatedLinear(8, 8).double()
    disturb = (norm.weight, gated.bias)
    with torch.no_grad():
        for p in disturb:
            p.copy_(draw(8))
    x, scale, shift, gate = draw(2, 3, 8), draw(2, 1, 8), draw(2, 1, 8), draw(2, 1, 8)
    normed, kept = norm(x, scale, shift)
    moved = gated(kept, normed, gate)
    unshifted = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight
    plain = x + gate * F.linear(unshifted * (1 + scale) + shift, gated.linear.weight, gated.bias)
    torch.testing.assert_close(moved, plain)
    wanted = (x, scale, shift, gate, norm.weight, gated.linear.weight, gated.bias)
    weight = draw(2, 3, 8).detach()
    ours, theirs = (torch.autograd.grad((y * weight).sum(), wanted) for y in (moved, plain))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------------------------------- positions


def test_positions_agree_with_timm() -> None:
    # timm: sines of row and column, then cosines of row and column. DiT: sines and cosines of the column first.
    theirs = build_sincos2d_pos_embed([3, 5], dim=64).reshape(15, 2, 2, 16)
    expected = torch.stack((theirs[:, 0, 1], theirs[:, 1, 1], theirs[:, 0, 0], theirs[:, 1, 0]), dim=1).reshape(15, 64)
    torch.testing.assert_close(grid_positions(3, 5, 64).float(), expected, rtol=0, atol=1e-6)


def test_rotation_is_a_product_of_complex_numbers() -> None:
    x = torch.randn(2, 15, 3, 16, dtype=torch.float64)
    expected = turn(x.transpose(1, 2).numpy(), 3, 5)
    np.testing.assert_allclose(rotate(x, grid_rotations(3, 5, 16)).transpose(1, 2).numpy(), expected, atol=1e-12)


def test_scores_depend_on_the_distance_only() -> None:
    rotation = grid_rotations(4, 6, 8)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 24, 1, 8)
    turned_q, turned_k = (rotate(v, rotation)[0, :, 0].view(4, 6, 8) for v in (q, k))
    for rows, columns in ((0, 1), (2, 0), (1, 3)):
        scores = (turned_q[: 4 - rows, : 6 - columns] * turned_k[rows:, columns:]).sum(-1)
        torch.testing.assert_close(scores, scores[:1, :1].expand_as(scores))
    assert abs(float((turned_q[0, 0] * (turned_k[0, 1] - turned_k[1, 0])).sum())) > 1e-6


def test_times_are_cosines_then_sines_of_t_itself() -> None:
    t = np.array([0.0, 0.25, 1.0])
    angles = t[:, None] * 10_000.0 ** (-np.arange(128) / 128)
    expected = np.concatenate((np.cos(angles), np.sin(angles)), axis=1)
    np.testing.assert_allclose(time_sinusoids(torch.from_numpy(t)).numpy(), expected, atol=1e-6)


def test_patches_are_read_by_channel_and_written_by_cell() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(patches(x, 2), F.unfold(x, 2, stride=2).transpose(1, 2))
    tokens = torch.randn(2, 6, 12)
    by_channel = tokens.view(2, 6, 4, 3).transpose(2, 3).reshape(2, 6, 12)
    assert torch.equal(image(tokens, 2, 3, 2), F.fold(by_channel.transpose(1, 2), (4, 6), 2, stride=2))


# ---------------------------------------------------------------------------------------------- as a backbone


def test_qk_norm_is_on_unless_switched_off() -> None:
    names = [{n for n, _ in make(**TINY, **options).named_parameters()} for options in ({}, {"qk_norm": False})]
    assert names[0] - names[1] == {f"layers.{i}.norm_{which}.weight" for i in range(2) for which in "qk"}


def test_residual_stream_keeps_its_type_under_autocast() -> None:
    model = disturbed(make(**TINY))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(*inputs(), layers=[0, 1]).hidden
    assert {h.dtype for h in hidden.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_blocks_compile_into_one_graph_each() -> None:
    model = disturbed(make(**TINY))
    tokens, vector = torch.randn(2, 4, 32, requires_grad=True), torch.randn(2, 1, 32)
    rotation = grid_rotations(2, 2, 8).float()
    block = model.blocks()[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = [f(tokens, vector, rotation) for f in (compiled, block)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(r.square().sum(), tokens)[0] for r in results))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 40}, "multiple of 16"),
        ({"heads": 5}, "multiple of 20"),
        ({"depth": 0}, "depth"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**{**TINY, **arguments})

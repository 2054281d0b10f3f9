"""The LightningDiT backbone: published counts, a float64 copy of its arithmetic, positions, grids, conditions."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import underpaint
from underpaint import Backbone, Condition, ConfigError, DataError
from underpaint_lightningdit.block import GatedLinear, ModulatedNorm
from underpaint_lightningdit.positions import grid_positions, grid_rotations, rotate, time_sinusoids
from underpaint_lightningdit.tokens import image, patches

TINY: dict[str, Any] = {"depth": 2, "width": 32, "heads": 4}


def make(name: str = "lightningdit/S-2", *, d: int = 4, grid: tuple[int, int] = (4, 4), **options: Any) -> Any:
    torch.manual_seed(0)
    pooled = options.pop("pooled", 32)
    context = {"latent_channels": d, "grid": grid, "pooled_dim": pooled, "token_dim": 0}
    return underpaint.create("backbone", name, **context, **options)


def disturbed(model: Backbone) -> Any:
    """Move every parameter off its initial value, so that zero gates and unit scales hide nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return model


def inputs(model: Backbone, b: int = 2, d: int = 4, grid: tuple[int, int] = (4, 4), pooled: int = 32) -> Any:
    generator = torch.Generator().manual_seed(2)
    dtype = next(model.parameters()).dtype
    x = torch.randn(b, d, *grid, generator=generator).to(dtype)
    t = torch.rand(b, generator=generator).to(dtype)
    return x, t, Condition(pooled=torch.randn(b, pooled, generator=generator).to(dtype)) if pooled else Condition()


# ---------------------------------------------------------------------------------------- published numbers


def count(name: str, width: int, **options: Any) -> int:
    with torch.device("meta"):
        model = make(name, d=32, grid=(16, 16), pooled=width, **options)
    return sum(p.numel() for p in model.parameters())


def test_parameters_of_the_published_models() -> None:
    # Counted on the authors' code with 32 channels, 16×16 latents and 1000 classes: B/1 has 130,556,192 parameters and
    # 130,557,728 with QK-norm. They include the label table, which is our conditioner's, and the fixed positions.
    beside = (1000 + 1) * 768 + 256 * 768
    assert count("lightningdit/B-1", 768, qk_norm=False) + beside == 130_556_192
    assert count("lightningdit/B-1", 768) + beside == 130_557_728
    # XL/1: 675.0 M trainable ones with the label table, as AlignTok's and VFM-VAE's authors count it.
    assert round((count("lightningdit/XL-1", 1152, qk_norm=False) + 1001 * 1152) / 1e6, 1) == 675.0


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
    assert count(f"lightningdit/{size}-{patch}", n) == depth * block + around
    assert count(f"lightningdit/{size}-{patch}", n, shift=False) == depth * (block - 2 * n * n - 2 * n) + around


@pytest.mark.parametrize(
    # Counted with torch's FlopCounterMode on the authors' code: B/1 46.02 GFLOP, XL/1 237.25 GFLOP.
    ("size", "gflop"),
    [("B", 46.02), ("XL", 237.25)],
)
def test_flops_of_the_published_models(size: str, gflop: float) -> None:
    assert round(flops(size, {"B": 768, "XL": 1152}[size]) / 1e9, 2) == gflop


@pytest.mark.parametrize(
    ("size", "depth", "n"), [("B", 12, 768), ("L", 24, 1024), ("XL", 28, 1152), ("1p0B", 24, 1536), ("1p6B", 28, 1792)]
)
def test_flops_in_closed_form(size: str, depth: int, n: int) -> None:
    cells, hidden = 256, 8 * n // 3
    # Of a block: queries, keys, values and output; scores and their use; three matrices of the SwiGLU; modulation.
    block = cells * 4 * n * n + 2 * cells**2 * n + cells * 3 * n * hidden + 6 * n * n
    ends = 2 * cells * 32 * n + (256 * n + n * n) + 2 * n * n
    assert flops(size, n) == 2 * (depth * block + ends)


def flops(size: str, n: int) -> int:
    with torch.device("meta"):
        model = make(f"lightningdit/{size}-1", d=32, grid=(16, 16), pooled=n)
        x, t, pooled = torch.empty(1, 32, 16, 16), torch.empty(1), torch.empty(1, n)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(x, t, Condition(pooled=pooled))
    return int(counter.get_total_flops())


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
    x, t, condition = inputs(model, grid=(4, 6), pooled=12)
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

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    norm, gated = ModulatedNorm(8).double(), GatedLinear(8, 8).double()
    disturb = (norm.weight, gated.bias)
    with torch.no_grad():
        for p in disturb:
            p.copy_(draw(8))
    x, scale, shift, gate = draw(2, 3, 8), draw(2, 1, 8), draw(2, 1, 8), draw(2, 1, 8)
    moved = gated(x, norm(x, scale, shift), gate)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight
    plain = x + gate * F.linear(normed * (1 + scale) + shift, gated.linear.weight, gated.bias)
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


def test_tables_are_no_part_of_the_weights_and_stay_exact() -> None:
    model = disturbed(make(**TINY))
    model(*inputs(model))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    x, t, condition = inputs(model)
    half = copy.deepcopy(model).bfloat16()
    assert half(x, t, condition).velocity.dtype == torch.float32
    # Positions are rounded for the use only: back in float32 the outputs are those of the rounded weights.
    back = half.float()(x, t, condition).velocity
    fresh = make(**TINY)
    fresh.load_state_dict(half.state_dict())
    assert torch.equal(back, fresh(x, t, condition).velocity)


def test_trains_after_inference_mode() -> None:
    model = make(**TINY)
    with torch.inference_mode():
        model(*inputs(model))
    model(*inputs(model)).velocity.sum().backward()


# ---------------------------------------------------------------------------------------------- as a backbone


def test_starts_as_the_identity_and_predicts_zero() -> None:
    model = make(**TINY)
    prediction = model(*inputs(model), layers=range(2))
    assert float(prediction.velocity.detach().abs().max()) == 0.0
    assert torch.equal(prediction.hidden[0], prediction.hidden[1])


def test_qk_norm_is_on_unless_switched_off() -> None:
    names = [{n for n, _ in make(**TINY, **options).named_parameters()} for options in ({}, {"qk_norm": False})]
    assert names[0] - names[1] == {f"layers.{i}.norm_{which}.weight" for i in range(2) for which in "qk"}


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (6, 4)])
def test_other_grids_and_hidden_states(grid: tuple[int, int]) -> None:
    model = disturbed(make(**TINY))
    prediction = model(*inputs(model, grid=grid), layers=[1])
    assert prediction.velocity.shape == (2, 4, *grid)
    assert set(prediction.hidden) == {1}
    assert prediction.hidden[1].shape == (2, grid[0] * grid[1] // 4, 32)
    assert model(*inputs(model, grid=grid)).hidden == {}


@pytest.mark.parametrize("pooled", [0, 12, 32])
def test_condition_of_any_width(pooled: int) -> None:
    model = disturbed(make(**TINY, pooled=pooled))
    x, t, condition = inputs(model, pooled=pooled)
    first = model(x, t, condition).velocity
    assert not torch.equal(first, model(x, 1 - t, condition).velocity)
    if pooled:
        other = Condition(pooled=condition.pooled.flip(0))
        assert not torch.equal(first, model(x, t, other).velocity)
    names = {name.partition(".")[0] for name, _ in model.named_parameters()}
    assert ("project" in names) == (pooled == 12)


def test_recomputation_changes_memory_only() -> None:
    plain = disturbed(make(**TINY)).train()
    again = make(**TINY, recompute=True).train()
    again.load_state_dict(plain.state_dict())
    kept = []
    for model in (plain, again):
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: (s.append(x.numel()), x)[1], lambda x: x):
            loss = model(*inputs(model, b=8)).velocity.square().sum()
        loss.backward()
        kept.append(sum(saved))
    assert kept[1] < kept[0]
    for (name, a), (_, b) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_residual_stream_keeps_its_type_under_autocast() -> None:
    model = disturbed(make(**TINY))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(*inputs(model), layers=[0, 1]).hidden
    assert {h.dtype for h in hidden.values()} == {torch.bfloat16}


def test_blocks_are_the_repeated_part() -> None:
    model = make(**TINY)
    assert len(model.blocks()) == 2
    assert (model.width, model.patch) == (32, 2)


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
        ({"grid": (4, 5)}, "4×5 cells does not divide into patches of 2×2"),
        ({"width": 40}, "multiple of 16"),
        ({"heads": 5}, "multiple of 20"),
        ({"depth": 0}, "depth"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**{**TINY, **arguments})


def test_condition_of_tokens_only_is_refused() -> None:
    context = {"latent_channels": 4, "grid": (4, 4), "pooled_dim": 0, "token_dim": 8}
    with pytest.raises(ConfigError, match="tokens only"):
        underpaint.create("backbone", "lightningdit/S-2", **context, **TINY)


def test_wrong_inputs_are_refused() -> None:
    model = make(**TINY)
    x, t, condition = inputs(model)
    with pytest.raises(DataError, match="4×3 cells does not divide"):
        model(x[..., :3], t, condition)
    with pytest.raises(DataError, match="made with a pooled condition and was given one without"):
        model(x, t, Condition())
    with pytest.raises(DataError, match=r"Layer 2 was asked for.* layers are 0 to 1"):
        model(x, t, condition, layers=[2])


def test_learns_a_constant_velocity() -> None:
    """A sanity check of the gradient path as a whole: the loss of one batch falls by nine tenths."""
    model = make(**TINY)
    x, t, condition = inputs(model, b=4)
    target: Tensor = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = F.mse_loss(model(x, t, condition).velocity, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]

"""The SiT backbone: published counts, a float64 copy of its arithmetic, conditions, grids."""

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
from underpaint_sit.model import _image, _patches
from underpaint_sit.positions import grid_positions, time_sinusoids

SIZES = {"S": (12, 384), "B": (12, 768), "L": (24, 1024), "XL": (28, 1152)}
TINY: dict[str, Any] = {"depth": 2, "width": 32, "heads": 4}


def make(name: str = "sit/S-2", *, d: int = 4, grid: tuple[int, int] = (4, 4), pooled: int = 32, **options: Any) -> Any:
    torch.manual_seed(0)
    context = {"latent_channels": d, "grid": grid, "pooled_dim": pooled, "token_dim": 0}
    return underpaint.create("backbone", name, **context, **options)


def disturbed(model: Backbone) -> Any:
    """Move every parameter off its initial value, so that zero gates hide nothing."""
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


def count(model: Backbone) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_parameters_in_closed_form(size: str, patch: int) -> None:
    depth, n = SIZES[size]
    with torch.device("meta"):
        counted = count(make(f"sit/{size}-{patch}", d=4, grid=(32, 32), pooled=n))
    cells = 4 * patch**2
    block = (3 * n * n + 3 * n) + (n * n + n) + (8 * n * n + 5 * n) + (6 * n * n + 6 * n)
    time = 256 * n + n + n * n + n
    final = 2 * n * n + 2 * n + n * cells + cells
    assert counted == depth * block + time + (cells * n + n) + final


def published(size: str, patch: int = 2, classes: int = 1000, variance: bool = True) -> int:
    """Our parameters plus what the published models hold beside: label table, variance output."""
    n = SIZES[size][1]
    with torch.device("meta"):
        own = count(make(f"sit/{size}-{patch}", d=4, grid=(32, 32), pooled=n))
    return own + (classes + 1) * n + (4 * patch**2 * (n + 1) if variance else 0)


def test_parameters_of_published_models() -> None:
    # SiT-S/2's file holds 32,963,360 numbers, 256×384 of them the fixed positions.
    assert published("S") == 32_963_360 - 256 * 384
    # REPA's SiT-B/2, without its projector and without a variance: 130,500,112.
    assert published("B", variance=False) == 130_500_112 - 256 * 768
    # DiT-XL/2: 674.8 M.
    assert round(published("XL") / 1e6, 1) == 674.8


def test_qk_norm_adds_two_vectors_of_head_width_per_block() -> None:
    # LightningDiT-B/1 grows from 130,556,192 to 130,557,728.
    with torch.device("meta"):
        plain, normed = (count(make("sit/B-1", pooled=768, qk_norm=on)) for on in (False, True))
    assert normed - plain == 130_557_728 - 130_556_192


def test_layer_norm_of_queries_and_keys_adds_scales_and_shifts() -> None:
    # A scale and a shift of head width for queries and keys of each of 12 blocks.
    with torch.device("meta"):
        plain, normed = (
            count(make("sit/B-2", pooled=768, qk_norm=on, qk_norm_type="layer", grid=(32, 32))) for on in (False, True)
        )
    assert normed - plain == 12 * 2 * 2 * 64


def test_what_hardly_shows_in_outputs() -> None:
    model = make(**TINY, qk_norm=True, qk_norm_type="layer")
    block = model.blocks()[0]
    assert [m.eps for m in (model.norm, block.norm1, block.norm2)] == [1e-6] * 3
    assert [m.eps for m in (block.norm_q, block.norm_k)] == [1e-5] * 2
    assert block.mlp[1].approximate == "tanh"
    assert not any(m.elementwise_affine for m in (model.norm, block.norm1, block.norm2))


def test_outputs_are_maps_one_after_the_other() -> None:
    """Two outputs are what the rows of each give alone; the head runs over cells, then over all channels."""
    both = disturbed(make(**TINY, outputs=2))
    x, t, condition = inputs(both)
    velocity = both(x, t, condition).velocity
    assert velocity.shape == (2, 8, 4, 4)
    for index in range(2):
        one = make(**TINY)
        state = dict(both.state_dict())
        for part in ("weight", "bias"):
            head = state[f"head.{part}"]
            state[f"head.{part}"] = head.view(4, 2, 4, *head.shape[1:])[:, index].flatten(0, 1)
        one.load_state_dict(state)
        torch.testing.assert_close(one(x, t, condition).velocity, velocity[:, 4 * index : 4 * index + 4])


@pytest.mark.parametrize(("size", "gflop"), [("S", 12.1), ("B", 46.0), ("L", 161.4), ("XL", 237.24)])
def test_flops_of_published_models(size: str, gflop: float) -> None:
    n = SIZES[size][1]
    with torch.device("meta"):
        model = make(f"sit/{size}-2", d=4, grid=(32, 32), pooled=n)
        x, t, pooled = torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, n)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(x, t, Condition(pooled=pooled))
    variance = 2 * 256 * n * 16
    digits = 2 if size == "XL" else 1
    assert round((counter.get_total_flops() + variance) / 1e9, digits) == gflop


# ------------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("qk_norm", [False, True])
def test_whole_model_in_float64_numpy(qk_norm: bool) -> None:
    model = disturbed(make(**TINY, qk_norm=qk_norm, pooled=12).double())
    x, t, condition = inputs(model, grid=(4, 6), pooled=12)
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}

    def linear(name: str, v: np.ndarray) -> np.ndarray:
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(v: np.ndarray) -> np.ndarray:
        return (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)

    def silu(v: np.ndarray) -> np.ndarray:
        return v / (1 + np.exp(-v))

    def gelu(v: np.ndarray) -> np.ndarray:
        return 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))

    def attend(name: str, v: np.ndarray) -> np.ndarray:
        q, k, value = (p.reshape(2, 6, 4, 8).transpose(0, 2, 1, 3) for p in np.split(linear(f"{name}.qkv", v), 3, -1))
        if qk_norm:
            q, k = (
                p / np.sqrt((p**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.norm_{which}.weight"]
                for p, which in ((q, "q"), (k, "k"))
            )
        scores = np.exp(q @ k.transpose(0, 1, 3, 2) / math.sqrt(8))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ value
        return linear(f"{name}.out", mixed.transpose(0, 2, 1, 3).reshape(2, 6, 32))

    rows = [x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(2, -1).numpy() for i in range(2) for j in range(3)]
    h = linear("embed", np.stack(rows, axis=1)) + grid_positions(2, 3, 32).numpy()
    vector = linear("time.2", silu(linear("time.0", time_sinusoids(t).numpy())))
    vector = silu(vector + linear("project", condition.pooled.numpy()))
    hidden = []
    for i in range(2):
        name = f"layers.{i}"
        a, b, c, d, e, f = (v[:, None] for v in np.split(linear(f"{name}.modulation", vector), 6, -1))
        h = h + c * attend(name, norm(h) * (1 + b) + a)
        h = h + f * linear(f"{name}.mlp.2", gelu(linear(f"{name}.mlp.0", norm(h) * (1 + e) + d)))
        hidden.append(h)
    shift, scale = (v[:, None] for v in np.split(linear("modulation", vector), 2, -1))
    out = linear("head", norm(h) * (1 + scale) + shift).reshape(2, 2, 3, 2, 2, 4)

    prediction = model(x, t, condition, layers=(0, 1))
    got = prediction.velocity.detach().numpy()
    for i, j, a, b in np.ndindex(2, 3, 2, 2):
        np.testing.assert_allclose(got[:, :, 2 * i + a, 2 * j + b], out[:, i, j, a, b], rtol=1e-9, atol=1e-10)
    for index, expected in enumerate(hidden):
        np.testing.assert_allclose(prediction.hidden[index].detach().numpy(), expected, rtol=1e-9, atol=1e-10)


def test_positions_agree_with_timm() -> None:
    # timm: sines of row and column, then cosines of row and column. DiT: sines and cosines of the column first.
    theirs = build_sincos2d_pos_embed([3, 5], dim=64).reshape(15, 2, 2, 16)
    expected = torch.stack((theirs[:, 0, 1], theirs[:, 1, 1], theirs[:, 0, 0], theirs[:, 1, 0]), dim=1).reshape(15, 64)
    torch.testing.assert_close(grid_positions(3, 5, 64), expected, rtol=0, atol=1e-6)


def test_times_are_cosines_then_sines_of_t_itself() -> None:
    t = np.array([0.0, 0.25, 1.0])
    angles = t[:, None] * 10_000.0 ** (-np.arange(128) / 128)
    expected = np.concatenate((np.cos(angles), np.sin(angles)), axis=1)
    np.testing.assert_allclose(time_sinusoids(torch.from_numpy(t)).numpy(), expected, atol=1e-6)


def test_patches_are_read_by_channel_and_written_by_cell() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(_patches(x, 2), F.unfold(x, 2, stride=2).transpose(1, 2))
    tokens = torch.randn(2, 6, 12)
    by_channel = tokens.view(2, 6, 4, 3).transpose(2, 3).reshape(2, 6, 12)
    assert torch.equal(_image(tokens, 2, 3, 2), F.fold(by_channel.transpose(1, 2), (4, 6), 2, stride=2))


# ---------------------------------------------------------------------------------------------- as a backbone


def test_starts_as_the_identity_and_predicts_zero() -> None:
    model = make(**TINY)
    prediction = model(*inputs(model), layers=range(2))
    assert float(prediction.velocity.detach().abs().max()) == 0.0
    assert torch.equal(prediction.hidden[0], prediction.hidden[1])


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
    for model in (plain, again):
        model(*inputs(model)).velocity.square().sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_positions_are_no_part_of_the_weights() -> None:
    model = disturbed(make(**TINY))
    model(*inputs(model))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    x, t, condition = inputs(model)
    half = copy.deepcopy(model).bfloat16()
    rounded = half(x, t, condition)
    assert rounded.velocity.dtype == torch.float32
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


def test_blocks_are_the_repeated_part() -> None:
    model = make(**TINY)
    assert len(model.blocks()) == 2
    assert (model.width, model.patch) == (32, 2)


@pytest.mark.slow
def test_blocks_compile_into_one_graph_each() -> None:
    model = disturbed(make(**TINY, qk_norm=True))
    tokens, vector = torch.randn(2, 4, 32), torch.randn(2, 32)
    block = model.blocks()[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, vector), block(tokens, vector))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (4, 5)}, "4×5 cells does not divide into patches of 2×2"),
        ({"width": 30}, "multiple of 4"),
        ({"heads": 5}, "multiple of 4"),
        ({"depth": 0}, "depth"),
        ({"outputs": 0}, "outputs"),
        ({"qk_norm_type": "batch"}, "qk_norm_type"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**{**TINY, **arguments})


def test_condition_of_tokens_only_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokens only"):
        underpaint.create("backbone", "sit/S-2", latent_channels=4, grid=(4, 4), pooled_dim=0, token_dim=8, **TINY)


def test_wrong_inputs_are_refused() -> None:
    model = make(**TINY)
    x, t, condition = inputs(model)
    with pytest.raises(DataError, match="4×3 cells does not divide"):
        model(x[..., :3], t, condition)
    with pytest.raises(DataError, match="made with a pooled condition and was given one without"):
        model(x, t, Condition())
    with pytest.raises(DataError, match="Layer 2 was asked for, and the backbone has 2 blocks"):
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

"""The SiT backbone: a float64 copy of its arithmetic, and its options. What all backbones do: test_backbones."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.plugins import backbones
from tests.plugins.backbones import disturbed, inputs, large, parameters
from timm.layers import build_sincos2d_pos_embed

from underpaint import ConfigError
from underpaint_sit.model import _image, _patches
from underpaint_sit.positions import grid_positions, time_sinusoids

SIZES = {"S": (12, 384), "B": (12, 768), "L": (24, 1024), "XL": (28, 1152)}
TINY = backbones.TINY["sit/S-2"]
make = partial(backbones.make, "sit/S-2")


# ------------------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_parameters_in_closed_form(size: str, patch: int) -> None:
    depth, n = SIZES[size]
    counted = parameters(large(f"sit/{size}-{patch}", grid=(32, 32), pooled=n))
    cells = 4 * patch**2
    block = (3 * n * n + 3 * n) + (n * n + n) + (8 * n * n + 5 * n) + (6 * n * n + 6 * n)
    time = 256 * n + n + n * n + n
    final = 2 * n * n + 2 * n + n * cells + cells
    assert counted == depth * block + time + (cells * n + n) + final


def test_qk_norm_adds_two_vectors_of_head_width_per_block() -> None:
    # LightningDiT-B/1 grows from 130,556,192 to 130,557,728.
    plain, normed = (parameters(large("sit/B-1", pooled=768, qk_norm=on)) for on in (False, True))
    assert normed - plain == 130_557_728 - 130_556_192


def test_layer_norm_of_queries_and_keys_adds_scales_and_shifts() -> None:
    # A scale and a shift of head width for queries and keys of each of 12 blocks.
    plain, normed = (parameters(large("sit/B-2", pooled=768, qk_norm=on, qk_norm_type="layer")) for on in (False, True))
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
    x, t, condition = inputs()
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


# ------------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("qk_norm", [False, True])
def test_whole_model_in_float64_numpy(qk_norm: bool) -> None:
    model = disturbed(make(**TINY, qk_norm=qk_norm, pooled=12).double())
    x, t, condition = inputs(grid=(4, 6), pooled=12, dtype=torch.float64)
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

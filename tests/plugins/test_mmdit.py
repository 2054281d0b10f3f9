"""The MMDiT backbone: positions, masks, grids. Golden numbers: test_mmdit_import.

What all backbones do: test_backbones.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.plugins import backbones
from tests.plugins.backbones import TEXT, disturbed, large
from torch import nn

from underpaint import Condition, ConfigError, DataError

TINY = backbones.TINY["mmdit/d6-2"]
make = partial(backbones.make, "mmdit/d6-2", **TEXT)
inputs = partial(backbones.inputs, **TEXT)


# ---------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("name", "side"), [("sd3-medium", 192), ("sd3.5-medium", 384), ("sd3.5-large", 192)])
def test_tables_of_published_models(name: str, side: int) -> None:
    model = large(f"mmdit/{name}", **TEXT)
    assert model.positions.shape == (side, side, model.width)


@pytest.mark.parametrize("depth", [6, 12, 24])
@pytest.mark.parametrize("patch", [1, 2])
def test_sizes_grow_with_the_depth(depth: int, patch: int) -> None:
    model = large(f"mmdit/d{depth}-{patch}", **TEXT)
    assert (len(model.blocks()), model.width, model.patch) == (depth, 64 * depth, patch)


# ------------------------------------------------------------------------------------------------ positions


def test_positions_are_the_middle_of_a_sine_cosine_table() -> None:
    model = make(**TINY)
    rows, columns, width = 3, 5, 32
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    expected = []
    for y in range((12 - rows) // 2, (12 - rows) // 2 + rows):
        for x in range((12 - columns) // 2, (12 - columns) // 2 + columns):
            parts = [f(index * frequencies) for index in (x, y) for f in (np.sin, np.cos)]
            expected.append(np.concatenate(parts))
    np.testing.assert_allclose(model._middle(rows, columns).numpy(), np.stack(expected), atol=1e-6)


def test_the_table_is_saved_and_loaded() -> None:
    first, second = disturbed(make(**TINY)), make(**TINY)
    first.positions.mul_(0.5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(*inputs()).velocity, first(*inputs()).velocity)


def test_latents_larger_than_the_table_are_refused() -> None:
    with pytest.raises(DataError, match="28×4 cells has more than the 12×12 tokens"):
        make(**TINY)(*inputs(grid=(28, 4)))
    with pytest.raises(ConfigError, match="set the backbone's option table to 2"):
        make(**{**TINY, "table": 1})


# -------------------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("dual", [0, 2, 3])
@pytest.mark.parametrize("qk_norm", ["none", "rms", "ln"])
def test_last_hidden_state_gives_the_velocity(dual: int, qk_norm: str) -> None:
    model = disturbed(make(**TINY, dual=dual, qk_norm=qk_norm))
    x, t, condition = inputs()
    prediction = model(x, t, condition, layers=[2])
    vector = F.silu(model.vector(t, condition))
    shift, scale = model.modulation(vector)[:, None].chunk(2, dim=2)
    tokens = model.head(F.layer_norm(prediction.hidden[2], (32,), eps=1e-6) * (1 + scale) + shift)
    assert torch.equal(F.fold(tokens.transpose(1, 2), (4, 4), 2, stride=2), prediction.velocity)


def test_a_text_without_any_token_that_counts_is_finite() -> None:
    x, t, condition = inputs()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    prediction = disturbed(make(**TINY))(x, t, Condition(tokens=condition.tokens, mask=mask, pooled=condition.pooled))
    assert bool(torch.isfinite(prediction.velocity).all())


@pytest.mark.parametrize("pooled", [0, 12, 32])
def test_pooled_condition_of_any_width_is_projected(pooled: int) -> None:
    model = disturbed(make(**TINY, pooled=pooled))
    x, t, condition = inputs(pooled=pooled)
    assert (model.pooled is None) == (pooled == 0)
    if pooled:
        assert [m.weight.shape for m in model.pooled if isinstance(m, nn.Linear)] == [(32, pooled), (32, 32)]
        other = Condition(tokens=condition.tokens, pooled=condition.pooled.flip(0))
        assert not torch.equal(model(x, t, condition).velocity, model(x, t, other).velocity)


@pytest.mark.slow
def test_blocks_compile_into_one_graph_each() -> None:
    block = disturbed(make(**TINY, dual=3)).blocks()[0]
    text, image, vector = torch.randn(2, 5, 32), torch.randn(2, 4, 32), torch.randn(2, 32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        compiled(text, image, vector, None, None), block(text, image, vector, None, None), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 30, "heads": 3}, "multiple of 4"),
        ({"heads": 5}, "cannot be split into 5 heads"),
        ({"depth": 0}, "depth"),
        ({"dual": 4}, "dual is 4, and the MMDiT has 3 blocks"),
        ({"qk_norm": "l2"}, "qk_norm is 'l2'"),
        ({"patch": 3}, "4×4 cells does not divide into patches of 3×3"),
        ({"tokens": 0}, "the conditioner gives none"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**{**TINY, **arguments})


def test_wrong_inputs_are_refused() -> None:
    model = make(**TINY)
    x, t, condition = inputs()
    with pytest.raises(DataError, match="4×3 cells does not divide"):
        model(x[..., :3], t, condition)
    with pytest.raises(DataError, match="conditions with tokens and was given one without"):
        model(x, t, Condition(pooled=condition.pooled))
    with pytest.raises(DataError, match="conditions with a pooled vector and was given one without"):
        model(x, t, Condition(tokens=condition.tokens))
    with pytest.raises(DataError, match="Layer 3 was asked for, and the backbone has 3 blocks"):
        model(x, t, condition, layers=[3])

"""The FLUX backbone: rotary positions, masks, grids. Golden numbers: test_mmdit_import.

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
from tests.plugins.backbones import TEXT, disturbed

from underpaint import Condition, ConfigError, DataError
from underpaint_mmdit.block import rotate
from underpaint_mmdit.embeddings import patches, rotations, unpatch

TINY = backbones.TINY["flux/schnell"]
make = partial(backbones.make, "flux/schnell", **TEXT)
inputs = partial(backbones.inputs, **TEXT)


# ------------------------------------------------------------------------------------------------ positions


def test_rotations_are_those_of_complex_numbers() -> None:
    axes, texts, rows, columns = (4, 6, 10), 3, 2, 4
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 3, texts + rows * columns, 20, generator=generator, dtype=torch.float64)
    got = rotate(x, rotations(texts, rows, columns, axes, torch.device("cpu"))).numpy()
    places = [(0, 0, 0)] * texts + [(0, i, j) for i in range(rows) for j in range(columns)]
    for n, place in enumerate(places):
        angles = [
            index * 10_000.0 ** (-2 * i / axis)
            for index, axis in zip(place, axes, strict=True)
            for i in range(axis // 2)
        ]
        pairs = x[:, :, n].numpy().reshape(2, 3, 10, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * np.array(angles))
        np.testing.assert_allclose(got[:, :, n, ::2], turned.real, atol=1e-6)
        np.testing.assert_allclose(got[:, :, n, 1::2], turned.imag, atol=1e-6)


def test_attention_sees_differences_of_positions_only() -> None:
    generator = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator).expand(2, 1, 1, 24, 16)
    rotation = rotations(0, 4, 6, (0, 8, 8), torch.device("cpu"))
    scores = (rotate(q, rotation) @ rotate(k, rotation).transpose(2, 3)).reshape(4, 6, 4, 6)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[2, 3, 3, 5], rtol=0, atol=1e-5)
    assert abs(float(scores[0, 0, 1, 2] - scores[0, 0, 2, 1])) > 1e-3


def test_patches_are_read_and_written_by_channel() -> None:
    x = torch.randn(2, 3, 4, 6)
    tokens = patches(x, 2)
    assert torch.equal(tokens, F.unfold(x, 2, stride=2).transpose(1, 2))
    assert torch.equal(unpatch(tokens, (2, 3), 2), x)


# -------------------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (24, 6)])
@pytest.mark.parametrize("double", [0, 1, 2])
def test_other_grids_and_hidden_states(grid: tuple[int, int], double: int) -> None:
    model = disturbed(make(**{**TINY, "double": double}))
    last = double + 1
    x, t, condition = inputs(grid=grid)
    prediction = model(x, t, condition, layers=range(last + 1))
    assert prediction.velocity.shape == (2, 4, *grid)
    assert [h.shape for h in prediction.hidden.values()] == [(2, grid[0] * grid[1] // 4, 32)] * (double + 2)
    assert len(model.blocks()) == double + 2
    shift, scale = model.modulation(F.silu(model.vector(t, condition)))[:, None].chunk(2, dim=2)
    tokens = model.head(F.layer_norm(prediction.hidden[last], (32,), eps=1e-6) * (1 + scale) + shift)
    torch.testing.assert_close(F.fold(tokens.transpose(1, 2), grid, 2, stride=2), prediction.velocity)


def test_strength_of_guidance_is_an_input_of_distilled_models_only() -> None:
    model = disturbed(backbones.make("flux/dev", **TEXT, **TINY))
    assert model.guidance == 3.5
    first = model(*inputs()).velocity
    model.guidance = 2.0
    assert not torch.equal(model(*inputs()).velocity, first)
    assert make(**TINY).strength is None


def test_positions_are_exact_in_bfloat16() -> None:
    """The far corner of a large latent turns as in float32: only queries and keys are rounded, not angles."""
    rotation = rotations(0, 200, 1, (0, 16, 0), torch.device("cpu"))
    x = torch.randn(1, 1, 200, 16, generator=torch.Generator().manual_seed(6)).bfloat16()
    exact, rounded = rotate(x.double(), rotation), rotate(x, rotation).double()
    torch.testing.assert_close(rounded, exact, rtol=2.0**-8, atol=1e-6)


@pytest.mark.slow
def test_blocks_compile_into_one_graph_each() -> None:
    model = disturbed(make(**TINY))
    rotation = rotations(5, 2, 2, (4, 4, 8), torch.device("cpu"))
    joined, vector = torch.randn(2, 9, 32), torch.randn(2, 32)
    single = model.blocks()[-1]
    compiled = torch.compile(single, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(joined, vector, None, rotation), single(joined, vector, None, rotation))
    double = model.blocks()[0]
    text, image = joined[:, :5], joined[:, 5:]
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(text, image, vector, None, rotation), double(text, image, vector, None, rotation)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 5}, "cannot be split into 5 heads"),
        ({"axes": [4, 4, 4]}, "three even numbers that sum to 16"),
        ({"axes": [3, 5, 8]}, "three even numbers that sum to 16"),
        ({"single": 0}, "single"),
        ({"guidance": -1.0}, "guidance"),
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
    with pytest.raises(DataError, match="conditions with a pooled vector and was given one without"):
        model(x, t, Condition(tokens=condition.tokens))
    with pytest.raises(DataError, match="Layer 3 was asked for, and the backbone has 3 blocks"):
        model(x, t, condition, layers=[3])

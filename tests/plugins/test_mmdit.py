"""The MMDiT backbone: published counts, positions, masks, grids. Golden numbers: test_mmdit_import."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import underpaint
from underpaint import Backbone, Condition, ConfigError, DataError

TINY: dict[str, Any] = {"depth": 3, "width": 32, "heads": 4, "table": 12}
# The reference network at depth 3 on 16×16×24 latents with 11 text tokens.
SD3_TINY: dict[str, Any] = {"depth": 3, "width": 192, "heads": 3, "patch": 2, "table": 16}


def make(name: str = "mmdit/d6-2", *, d: int = 4, pooled: int = 12, tokens: int = 10, **options: Any) -> Any:
    torch.manual_seed(0)
    context = {"latent_channels": d, "grid": (4, 4), "pooled_dim": pooled, "token_dim": tokens}
    return underpaint.create("backbone", name, **context, **options)


def disturbed(model: Backbone) -> Any:
    """Move every parameter off its initial value, so that zero gates hide nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return model


def inputs(b: int = 2, d: int = 4, grid: tuple[int, int] = (4, 4), pooled: int = 12, length: int = 5) -> Any:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(b, d, *grid, generator=generator)
    t = torch.rand(b, generator=generator)
    tokens = torch.randn(b, length, 10, generator=generator)
    vector = torch.randn(b, pooled, generator=generator) if pooled else None
    return x, t, Condition(tokens=tokens, pooled=vector)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize(
    ("name", "parameters", "table"),
    [
        # Counted on the reference network with these options: 16 latent channels, pooled 2048, tokens of 4096.
        ("sd3-medium", 2_028_328_000, 192),
        ("sd3.5-medium", 2_243_171_520, 384),
        ("sd3.5-large", 8_056_627_520, 192),
    ],
)
def test_parameters_of_published_models(name: str, parameters: int, table: int) -> None:
    with torch.device("meta"):
        model = make(f"mmdit/{name}", d=16, pooled=2048, tokens=4096)
    assert count(model) == parameters
    assert model.positions.shape == (table, table, model.width)


@pytest.mark.parametrize(("qk_norm", "parameters"), [("none", 3_767_872), ("rms", 3_768_640)])
def test_parameters_of_the_tiny_reference(qk_norm: str, parameters: int) -> None:
    with torch.device("meta"):
        assert count(make(d=16, pooled=48, tokens=96, qk_norm=qk_norm, **SD3_TINY)) == parameters


@pytest.mark.parametrize(("dual", "flop"), [(0, 310_974_720), (2, 382_195_968)])
def test_flops_of_the_tiny_reference(dual: int, flop: int) -> None:
    with torch.device("meta"):
        model = make(d=16, pooled=48, tokens=96, dual=dual, **SD3_TINY)
        x, t = torch.empty(1, 16, 16, 24), torch.empty(1)
        condition = Condition(tokens=torch.empty(1, 11, 96), pooled=torch.empty(1, 48))
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):
            model(x, t, condition)
    assert counter.get_total_flops() == flop


@pytest.mark.parametrize("depth", [6, 12, 24])
@pytest.mark.parametrize("patch", [1, 2])
def test_sizes_grow_with_the_depth(depth: int, patch: int) -> None:
    with torch.device("meta"):
        model = make(f"mmdit/d{depth}-{patch}")
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


def test_starts_as_the_identity_and_predicts_zero() -> None:
    model = make(**TINY)
    prediction = model(*inputs(), layers=range(3))
    assert float(prediction.velocity.detach().abs().max()) == 0.0
    assert torch.equal(prediction.hidden[0], prediction.hidden[2])


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (24, 6)])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_other_grids_and_texts(grid: tuple[int, int], length: int) -> None:
    model = disturbed(make(**TINY))
    prediction = model(*inputs(grid=grid, length=length), layers=[0, 2])
    assert prediction.velocity.shape == (2, 4, *grid)
    assert {layer: h.shape for layer, h in prediction.hidden.items()} == dict.fromkeys(
        (0, 2), (2, grid[0] * grid[1] // 4, 32)
    )


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


def test_a_mask_is_the_same_as_fewer_tokens() -> None:
    model = disturbed(make(**TINY))
    x, t, condition = inputs(length=7)
    mask = torch.arange(7).expand(2, 7) < 4
    masked = model(x, t, Condition(tokens=condition.tokens, mask=mask, pooled=condition.pooled))
    shorter = model(x, t, Condition(tokens=condition.tokens[:, :4], pooled=condition.pooled))
    torch.testing.assert_close(masked.velocity, shorter.velocity, rtol=0, atol=1e-5)
    assert not torch.allclose(masked.velocity, model(x, t, condition).velocity, atol=1e-3)


def test_a_text_without_any_token_that_counts_is_finite() -> None:
    x, t, condition = inputs()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    prediction = disturbed(make(**TINY))(x, t, Condition(tokens=condition.tokens, mask=mask, pooled=condition.pooled))
    assert bool(torch.isfinite(prediction.velocity).all())


def test_order_of_texts_does_not_matter_and_of_cells_does() -> None:
    model = disturbed(make(**TINY))
    x, t, condition = inputs()
    first = model(x, t, condition).velocity
    turned = model(x, t, Condition(tokens=condition.tokens.flip(1), pooled=condition.pooled)).velocity
    torch.testing.assert_close(turned, first, rtol=0, atol=1e-5)
    assert not torch.allclose(model(x.flip(2), t, condition).velocity.flip(2), first, atol=1e-3)


@pytest.mark.parametrize("pooled", [0, 12, 32])
def test_pooled_condition_of_any_width_is_projected(pooled: int) -> None:
    model = disturbed(make(**TINY, pooled=pooled))
    x, t, condition = inputs(pooled=pooled)
    assert (model.pooled is None) == (pooled == 0)
    if pooled:
        assert [m.weight.shape for m in model.pooled if isinstance(m, nn.Linear)] == [(32, pooled), (32, 32)]
        other = Condition(tokens=condition.tokens, pooled=condition.pooled.flip(0))
        assert not torch.equal(model(x, t, condition).velocity, model(x, t, other).velocity)


def test_recomputation_changes_memory_only() -> None:
    plain = disturbed(make(**TINY, dual=1)).train()
    again = make(**TINY, dual=1, recompute=True).train()
    again.load_state_dict(plain.state_dict())
    calls = [0, 0]
    for index, model in enumerate((plain, again)):
        model.layers[0].register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
        model(*inputs()).velocity.square().sum().backward()
    assert calls == [1, 2]
    for (name, a), (_, b) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_trains_after_inference_mode() -> None:
    model = make(**TINY)
    with torch.inference_mode():
        model(*inputs())
    model(*inputs()).velocity.sum().backward()


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


def test_learns_a_constant_velocity() -> None:
    """A sanity check of the gradient path as a whole: the loss of one batch falls by nine tenths."""
    model = make(**{**TINY, "depth": 2})
    x, t, condition = inputs(b=4)
    target: Tensor = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x, t, condition).velocity, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]

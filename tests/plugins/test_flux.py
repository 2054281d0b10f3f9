"""The FLUX backbone: published counts, rotary positions, masks, grids. Golden numbers: test_mmdit_import."""

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
from underpaint_mmdit.block import rotate
from underpaint_mmdit.embeddings import patches, rotations, unpatch

TINY: dict[str, Any] = {"double": 1, "single": 2, "width": 32, "heads": 2, "axes": [4, 4, 8]}
# The reference network with hidden 192 and 2 + 2 blocks.
FLUX_TINY: dict[str, Any] = {"double": 2, "single": 2, "width": 192, "heads": 3, "axes": [8, 28, 28]}


def make(name: str = "flux/schnell", *, d: int = 4, pooled: int = 12, tokens: int = 10, **options: Any) -> Any:
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


def inputs(b: int = 2, grid: tuple[int, int] = (4, 4), length: int = 5) -> Any:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(b, 4, *grid, generator=generator)
    t = torch.rand(b, generator=generator)
    tokens = torch.randn(b, length, 10, generator=generator)
    return x, t, Condition(tokens=tokens, pooled=torch.randn(b, 12, generator=generator))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize(
    ("name", "d", "parameters"),
    [
        # Counted on the reference network with pooled 768 and tokens of 4096.
        ("dev", 16, 11_901_408_320),
        ("schnell", 16, 11_891_178_560),
        # Width 2048, 7 + 15 blocks, 16×16×32 latents with one cell a token: AlignTok's 2 B.
        ("2b-1", 32, 2_028_868_896),
    ],
)
def test_parameters_of_published_models(name: str, d: int, parameters: int) -> None:
    with torch.device("meta"):
        assert count(make(f"flux/{name}", d=d, pooled=768, tokens=4096)) == parameters


@pytest.mark.parametrize(("name", "parameters"), [("dev", 4_113_472), ("schnell", 4_027_072)])
def test_parameters_of_the_tiny_reference(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert count(make(f"flux/{name}", d=16, pooled=48, tokens=96, **FLUX_TINY)) == parameters


@pytest.mark.parametrize(
    ("grid", "length", "flop"),
    # The reference counts 0.221 GFLOPs with 58 tokens in all.
    [((14, 14), 9, 221_128_704), ((16, 24), 11, 421_757_952)],
)
def test_flops_of_the_tiny_reference(grid: tuple[int, int], length: int, flop: int) -> None:
    with torch.device("meta"):
        model = make("flux/dev", d=16, pooled=48, tokens=96, **FLUX_TINY)
        condition = Condition(tokens=torch.empty(1, length, 96), pooled=torch.empty(1, 48))
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.empty(1, 16, *grid), torch.empty(1), condition)
    assert counter.get_total_flops() == flop


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


def test_starts_as_the_identity_and_predicts_zero() -> None:
    model = make(**TINY)
    prediction = model(*inputs(), layers=range(3))
    assert float(prediction.velocity.detach().abs().max()) == 0.0
    assert torch.equal(prediction.hidden[0], prediction.hidden[2])


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


def test_a_mask_is_the_same_as_fewer_tokens() -> None:
    model = disturbed(make(**TINY))
    x, t, condition = inputs(length=7)
    mask = torch.arange(7).expand(2, 7) < 4
    masked = model(x, t, Condition(tokens=condition.tokens, mask=mask, pooled=condition.pooled))
    shorter = model(x, t, Condition(tokens=condition.tokens[:, :4], pooled=condition.pooled))
    torch.testing.assert_close(masked.velocity, shorter.velocity, rtol=0, atol=1e-5)
    assert not torch.allclose(masked.velocity, model(x, t, condition).velocity, atol=1e-3)


def test_order_of_texts_does_not_matter_and_of_cells_does() -> None:
    model = disturbed(make(**TINY))
    x, t, condition = inputs()
    first = model(x, t, condition).velocity
    turned = model(x, t, Condition(tokens=condition.tokens.flip(1), pooled=condition.pooled)).velocity
    torch.testing.assert_close(turned, first, rtol=0, atol=1e-5)
    assert not torch.allclose(model(x.flip(2), t, condition).velocity.flip(2), first, atol=1e-3)


def test_strength_of_guidance_is_an_input_of_distilled_models_only() -> None:
    model = disturbed(make("flux/dev", **TINY))
    assert model.guidance == 3.5
    first = model(*inputs()).velocity
    model.guidance = 2.0
    assert not torch.equal(model(*inputs()).velocity, first)
    assert make(**TINY).strength is None


def test_recomputation_changes_memory_only() -> None:
    plain = disturbed(make(**TINY)).train()
    again = make(**TINY, recompute=True).train()
    again.load_state_dict(plain.state_dict())
    for model in (plain, again):
        model(*inputs()).velocity.square().sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_trains_after_inference_mode() -> None:
    model = make(**TINY)
    with torch.inference_mode():
        model(*inputs())
    model(*inputs()).velocity.sum().backward()


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


def test_learns_a_constant_velocity() -> None:
    """A sanity check of the gradient path as a whole: the loss of one batch falls by nine tenths."""
    model = make(**{**TINY, "single": 1})
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

"""What the backbones have in common: published counts of parameters and operations, and how they behave."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.plugins.backbones import TEXT, TINY, disturbed, flops, inputs, large, make, parameters

from underpaint import Condition, ConfigError, DataError

WIDTHS = {"S": 384, "B": 768, "L": 1024, "XL": 1152}
TEXTUAL = ("mmdit/d6-2", "flux/schnell")
LABELLED = ("sit/S-2", "lightningdit/S-2", "ditdh/S", "reg/S-2")
"""Conditioned on a vector; DiT is a SiT inside, which predicts noise."""
VELOCITIES = (*LABELLED, *TEXTUAL)

# ---------------------------------------------------------------------------------------- published numbers


def labelled(name: str, **given: Any) -> Any:
    """Return a full-size backbone for labels, whose vector is as wide as the network."""
    return large(name, pooled=width(name), **given)


def width(name: str) -> int:
    return WIDTHS[name.partition("/")[2].partition("-")[0]]


def beside(width: int, tokens: int) -> int:
    """Count what published models hold beside ours: labels of 1000 classes and of none, fixed positions."""
    return (1001 + tokens) * width


PROJECTOR = (768 * 2048 + 2048) + (2048 * 2048 + 2048) + (2048 * 768 + 768)
"""REPA's, at width 768."""
SD, F16 = {"d": 4, "grid": (32, 32)}, {"d": 32, "grid": (16, 16)}
"""Latents of 256 px: four channels at stride 8, 32 at stride 16."""
SD3 = {"d": 16, "pooled": 2048, "tokens": 4096}
FLUX = {"d": 16, "pooled": 768, "tokens": 4096}
# The reference networks of three and of 2 + 2 blocks.
SD3_TINY: dict[str, Any] = {"depth": 3, "width": 192, "heads": 3, "table": 16, "d": 16, "pooled": 48, "tokens": 96}
FLUX_TINY: dict[str, Any] = {
    "double": 2,
    "single": 2,
    "width": 192,
    "heads": 3,
    "axes": [8, 28, 28],
    "d": 16,
    "pooled": 48,
    "tokens": 96,
}


@pytest.mark.parametrize(
    ("name", "given", "more", "total"),
    [
        # DiT-S/2's file, and SiT's with the variance that ours leaves out.
        ("dit/S-2", SD, beside(384, 256), 32_963_360),
        ("sit/S-2", SD, beside(384, 256) + 16 * 385, 32_963_360),
        # REPA's SiT-B/2, without its projector and without a variance.
        ("sit/B-2", SD, beside(768, 256), 130_500_112),
        # REG's file holds the positions of 257 tokens, and REPA's projector.
        ("reg/B-2", SD, beside(768, 257) + PROJECTOR, 139_028_496),
        # Counted on LightningDiT's code.
        ("lightningdit/B-1", {**F16, "qk_norm": False}, beside(768, 256), 130_556_192),
        ("lightningdit/B-1", F16, beside(768, 256), 130_557_728),
        # Counted on RAE's code for latents of 768×16×16; 256 are the fixed frequencies.
        ("ditdh/S", {"d": 768, "grid": (16, 16)}, beside(384, 256) + 256, 196_455_764),
        # Counted on the reference network.
        ("mmdit/sd3-medium", SD3, 0, 2_028_328_000),
        ("mmdit/sd3.5-medium", SD3, 0, 2_243_171_520),
        ("mmdit/sd3.5-large", SD3, 0, 8_056_627_520),
        ("mmdit/d6-2", {**SD3_TINY, "qk_norm": "none"}, 0, 3_767_872),
        ("mmdit/d6-2", {**SD3_TINY, "qk_norm": "rms"}, 0, 3_768_640),
        ("flux/dev", FLUX, 0, 11_901_408_320),
        ("flux/schnell", FLUX, 0, 11_891_178_560),
        ("flux/dev", FLUX_TINY, 0, 4_113_472),
        ("flux/schnell", FLUX_TINY, 0, 4_027_072),
        # Width 2048, 7 + 15 blocks, 16×16×32 latents with one cell a token: AlignTok's 2 B.
        ("flux/2b-1", {**FLUX, "d": 32}, 0, 2_028_868_896),
    ],
)
def test_parameters_of_published_models(name: str, given: dict[str, Any], more: int, total: int) -> None:
    model = large(name, **given) if "tokens" in given else labelled(name, **given)
    assert parameters(model) + more == total


@pytest.mark.parametrize(
    ("name", "given", "more", "millions", "digits"),
    [
        ("dit/XL-2", SD, 1001 * 1152, 674.8, 1),
        ("sit/XL-2", SD, 1001 * 1152 + 16 * 1153, 674.8, 1),
        # Trainable ones with the label table, as AlignTok's and VFM-VAE's authors count it.
        ("lightningdit/XL-1", {**F16, "qk_norm": False}, 1001 * 1152, 675.0, 1),
        # VFM-VAE's "685 M with REG parts"; the projector leads from 1152 channels, not from 768.
        (
            "reg/XL-1",
            {**F16, "qk_norm": True, "qk_norm_type": "layer"},
            beside(1152, 257) + PROJECTOR + (1152 - 768) * 2048,
            685,
            0,
        ),
    ],
)
def test_millions_of_parameters(name: str, given: dict[str, Any], more: int, millions: float, digits: int) -> None:
    assert round((parameters(labelled(name, **given)) + more) / 1e6, digits) == millions


def test_parameters_of_ditdh_in_the_papers_table() -> None:
    counts = {
        s: (parameters(labelled(f"ditdh/{s}", d=768, grid=(16, 16))) + 1001 * n) // 10**6 for s, n in WIDTHS.items()
    }
    assert counts == {"S": 196, "B": 294, "L": 621, "XL": 838}


@pytest.mark.parametrize(
    ("name", "context", "more", "gflop"),
    [
        ("dit/S-2", SD, 0, 12.11),
        ("dit/XL-2", SD, 0, 237.24),
        # Of which the variance, that ours leaves out.
        ("sit/XL-2", SD, 2 * 256 * 1152 * 16, 237.24),
        # With REPA's projector of 257 tokens.
        ("reg/B-2", SD, 2 * 257 * (768 * 2048 + 2048 * 2048 + 2048 * 768), 49.97),
        # Counted with torch's FlopCounterMode on the authors' code.
        ("lightningdit/B-1", F16, 0, 46.02),
        ("lightningdit/XL-1", F16, 0, 237.25),
        ("ditdh/S", {"d": 768, "grid": (16, 16)}, 0, 96.94),
    ],
)
def test_gflops_of_published_models(name: str, context: dict[str, Any], more: int, gflop: float) -> None:
    model = labelled(name, **context)
    assert round((flops(model, **context, pooled=width(name)) + more) / 1e9, 2) == gflop


@pytest.mark.parametrize(
    ("name", "gmac"),
    # Peebles & Xie 2023: multiply-adds, and up to two in ten thousand of something else.
    [
        ("S-8", 0.36),
        ("S-4", 1.41),
        ("B-8", 1.42),
        ("B-4", 5.56),
        ("B-2", 23.01),
        ("L-8", 5.01),
        ("L-4", 19.70),
        ("L-2", 80.71),
        ("XL-8", 7.39),
        ("XL-4", 29.05),
        ("XL-2", 118.64),
    ],
)
def test_gflops_of_dits_paper(name: str, gmac: float) -> None:
    counted = flops(labelled(f"dit/{name}", **SD), **SD, pooled=width(f"dit/{name}"))
    assert counted / 2e9 == pytest.approx(gmac, abs=0.006, rel=3e-4)


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def time_and_ends(n: int, cells: int, out: int) -> int:
    """Count the parameters around the blocks: patches, time, modulation of the output, head."""
    return linear(cells, n) + linear(256, n) + linear(n, n) + linear(n, 2 * n) + linear(n, out)


DEPTHS = {"S": 12, "B": 12, "L": 24, "XL": 28}


@pytest.mark.parametrize(
    ("family", "patch", "outputs", "companion"),
    [("sit", 2, 1, 0)]
    + [("dit", p, 2, 0) for p in (2, 4, 8)]
    # REG's vector is DINOv2-B's.
    + [("reg", p, 1, 768) for p in (1, 2)],
)
@pytest.mark.parametrize("size", WIDTHS)
def test_sit_dit_and_reg_in_closed_form(family: str, size: str, patch: int, outputs: int, companion: int) -> None:
    depth, n = DEPTHS[size], WIDTHS[size]
    context: dict[str, Any] = F16 if patch == 1 else SD
    cells, images = context["d"] * patch**2, (context["grid"][0] // patch) ** 2
    tokens = images + bool(companion)
    # Of a block: queries, keys, values and output, an MLP of four times the width, six vectors of the modulation.
    block = 4 * linear(n, n) + linear(n, 4 * n) + linear(4 * n, n) + linear(n, 6 * n)
    vector = linear(companion, n) + 2 * n + linear(n, companion) if companion else 0
    model = labelled(f"{family}/{size}-{patch}", **context)
    assert parameters(model) == depth * block + time_and_ends(n, cells, outputs * cells) + vector
    # The token of REG's vector passes the blocks, and neither the patches nor the head of the latent.
    layers = depth * (12 * tokens * n * n + 2 * tokens**2 * n + 6 * n * n)
    ends = images * (1 + outputs) * cells * n + (256 * n + n * n) + 2 * n * n + 2 * companion * n
    assert flops(model, **context, pooled=n) == 2 * (layers + ends)


@pytest.mark.parametrize("size", WIDTHS)
def test_flops_of_ditdh_in_closed_form(size: str) -> None:
    d, cells, n, wide = 768, 256, WIDTHS[size], 2048

    def block(width: int, conditions: int) -> int:
        hidden = 8 * width // 3
        mixing = cells * 4 * width**2 + 2 * cells**2 * width
        return mixing + cells * 3 * width * hidden + conditions * 6 * width**2

    # The head is modulated by a vector of each token, which the widened hidden states are.
    head = 2 * block(wide, cells) + cells * (n * wide + d * wide + 2 * wide**2 + wide * d)
    around = cells * d * n + 512 * n + n * n
    context: dict[str, Any] = {"d": d, "grid": (16, 16)}
    model = labelled(f"ditdh/{size}", **context)
    assert flops(model, **context, pooled=n) == 2 * (DEPTHS[size] * block(n, 1) + head + around)


def text_ends(n: int, cells: int, images: int, texts: int, pooled: int) -> int:
    """Multiply-adds around the blocks: patches and head, tokens of 4096 channels, time and pooled text, modulation."""
    return 2 * images * cells * n + texts * 4096 * n + (256 * n + n * n) + (pooled * n + n * n) + 2 * n * n


@pytest.mark.parametrize(
    ("name", "depth", "dual"),
    # Depth and blocks with a second attention as published; the width is 64 times the depth.
    [("sd3-medium", 24, 0), ("sd3.5-medium", 24, 13), ("sd3.5-large", 38, 0)],
)
def test_flops_of_stable_diffusion_3_in_closed_form(name: str, depth: int, dual: int) -> None:
    # An image of 1024 px in tokens of 2×2 cells, with 77 tokens of CLIP and 77 of T5.
    n, images, texts = 64 * depth, 64**2, 2 * 77
    joint = 12 * (images + texts) * n * n + 2 * (images + texts) ** 2 * n + 2 * 6 * n * n
    # The last block leaves the text's output, MLP and four of its six vectors out.
    unused = texts * 9 * n * n + 4 * n * n
    alone = images * 4 * n * n + 2 * images**2 * n + 3 * n * n
    model = large(f"mmdit/{name}", **SD3)
    counted = flops(model, **SD3, grid=(128, 128), length=texts)
    ends = text_ends(n, 64, images, texts, 2048)
    assert counted == 2 * (depth * joint - unused + dual * alone + ends)


@pytest.mark.parametrize(
    ("name", "double", "single", "n", "context", "side", "texts", "guided"),
    # FLUX.1 at 1024 px with the published lengths of texts; AlignTok's 2 B at 256 px with 77 tokens.
    [
        ("dev", 19, 38, 3072, FLUX, 128, 512, True),
        ("schnell", 19, 38, 3072, FLUX, 128, 256, False),
        ("2b-1", 7, 15, 2048, {**FLUX, "d": 32}, 16, 77, False),
    ],
)
def test_flops_of_flux_in_closed_form(
    name: str, double: int, single: int, n: int, context: dict[str, Any], side: int, texts: int, guided: bool
) -> None:
    images, cells = (256, 32) if name == "2b-1" else (side**2 // 4, 64)
    tokens = images + texts
    # Both kinds of block multiply a token with twelve n×n matrices; a double one modulates two streams with six
    # vectors each, a single one has three.
    blocks = (double + single) * (12 * tokens * n * n + 2 * tokens**2 * n) + (12 * double + 3 * single) * n * n
    strength = 256 * n + n * n if guided else 0
    counted = flops(large(f"flux/{name}", **context), **context, grid=(side, side), length=texts)
    assert counted == 2 * (blocks + text_ends(n, cells, images, texts, 768) + strength)


@pytest.mark.parametrize(
    ("name", "options", "grid", "length", "expected"),
    [
        ("mmdit/d6-2", {**SD3_TINY, "dual": 0}, (16, 24), 11, 310_974_720),
        ("mmdit/d6-2", {**SD3_TINY, "dual": 2}, (16, 24), 11, 382_195_968),
        # The reference counts 0.221 GFLOPs with 58 tokens in all.
        ("flux/dev", FLUX_TINY, (14, 14), 9, 221_128_704),
        ("flux/dev", FLUX_TINY, (16, 24), 11, 421_757_952),
    ],
)
def test_flops_of_tiny_references(
    name: str, options: dict[str, Any], grid: tuple[int, int], length: int, expected: int
) -> None:
    assert flops(large(name, **options), d=16, grid=grid, length=length, pooled=48, tokens=96) == expected


# ------------------------------------------------------------------------------------------------ behaviour


def tiny(name: str, **changes: Any) -> Any:
    return make(name, **{**(TEXT if name in TEXTUAL else {}), **TINY[name], **changes})


def call(model: Any, b: int = 2, grid: tuple[int, int] = (4, 4), layers: Any = (), **given: Any) -> Any:
    """Run a tiny backbone on inputs that fit it."""
    if model.spec.context["token_dim"]:
        given = {**TEXT, **given}
    x, t, condition = inputs(b, grid=grid, **given)
    if model.companion:
        return model(x, t, condition, layers, torch.randn(b, 24, generator=torch.Generator().manual_seed(3)))
    return model(x, t, condition, layers)


@pytest.mark.parametrize("name", VELOCITIES)
def test_starts_as_the_identity_and_predicts_zero(name: str) -> None:
    model = tiny(name)
    last = 2 if name in TEXTUAL else 1
    prediction = call(model, layers=range(last + 1))
    assert not prediction.velocity.any()
    assert prediction.companion is None or not prediction.companion.any()
    assert torch.equal(prediction.hidden[0], prediction.hidden[last])


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("tokens", [(2, 2), (1, 4), (2, 5), (12, 3)])
def test_other_grids_and_hidden_states(name: str, tokens: tuple[int, int]) -> None:
    model = disturbed(tiny(name))
    grid = (tokens[0] * model.patch, tokens[1] * model.patch)
    prediction = call(model, grid=grid, layers=[1])
    assert (model.width, model.patch) == (32, 1 if name == "ditdh/S" else 2)
    assert prediction.velocity.shape == (2, 4, *grid)
    count = tokens[0] * tokens[1] + (name == "reg/S-2")
    assert {layer: h.shape for layer, h in prediction.hidden.items()} == {1: (2, count, 32)}
    assert call(model, grid=grid).hidden == {}


def test_blocks_are_the_repeated_part() -> None:
    # DiT^DH gives its two conditioning blocks and its two of the head.
    assert {name: len(tiny(name).blocks()) for name in TINY} == {
        **dict.fromkeys(("sit/S-2", "dit/S-2", "lightningdit/S-2", "reg/S-2"), 2),
        "ditdh/S": 4,
        "mmdit/d6-2": 3,
        "flux/schnell": 3,
    }


@pytest.mark.parametrize("name", TEXTUAL)
@pytest.mark.parametrize("length", [1, 40])
def test_texts_of_any_length(name: str, length: int) -> None:
    prediction = call(disturbed(tiny(name)), length=length, layers=[0, 2])
    assert {layer: h.shape for layer, h in prediction.hidden.items()} == dict.fromkeys((0, 2), (2, 4, 32))


@pytest.mark.parametrize("name", TEXTUAL)
def test_a_mask_is_the_same_as_fewer_tokens(name: str) -> None:
    model = disturbed(tiny(name))
    x, t, condition = inputs(**TEXT, length=7)
    assert condition.tokens is not None
    mask = torch.arange(7).expand(2, 7) < 4
    masked = model(x, t, Condition(tokens=condition.tokens, mask=mask, pooled=condition.pooled))
    shorter = model(x, t, Condition(tokens=condition.tokens[:, :4], pooled=condition.pooled))
    torch.testing.assert_close(masked.velocity, shorter.velocity, rtol=0, atol=1e-5)
    assert not torch.allclose(masked.velocity, model(x, t, condition).velocity, atol=1e-3)


@pytest.mark.parametrize("name", TEXTUAL)
def test_order_of_texts_does_not_matter_and_of_cells_does(name: str) -> None:
    model = disturbed(tiny(name))
    x, t, condition = inputs(**TEXT)
    assert condition.tokens is not None
    first = model(x, t, condition).velocity
    turned = model(x, t, Condition(tokens=condition.tokens.flip(1), pooled=condition.pooled)).velocity
    torch.testing.assert_close(turned, first, rtol=0, atol=1e-5)
    assert not torch.allclose(model(x.flip(2), t, condition).velocity.flip(2), first, atol=1e-3)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("pooled", [0, 12, 32])
def test_condition_of_any_width(name: str, pooled: int) -> None:
    model = disturbed(tiny(name, pooled=pooled))
    extra = (torch.ones(2, 24),) if model.companion else ()
    x, t, condition = inputs(pooled=pooled)
    first = model(x, t, condition, (), *extra).velocity
    assert not torch.equal(first, model(x, 1 - t, condition, (), *extra).velocity)
    if condition.pooled is not None:
        other = Condition(pooled=condition.pooled.flip(0))
        assert not torch.equal(first, model(x, t, other, (), *extra).velocity)
    names = {name.partition(".")[0] for name, _ in model.named_parameters()}
    assert ("project" in names) == (pooled == 12)


@pytest.mark.parametrize("name", TINY)
def test_recomputation_changes_memory_only(name: str) -> None:
    options = {"dual": 1} if name.startswith("mmdit") else {}
    plain = disturbed(tiny(name, **options)).train()
    again = tiny(name, recompute=True, **options).train()
    again.load_state_dict(plain.state_dict())
    kept = []
    for model in (plain, again):
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: (s.append(x.numel()), x)[1], lambda x: x):
            loss = call(model, b=8).velocity.square().sum()
        loss.backward()
        kept.append(sum(saved))
    assert kept[1] < kept[0]
    for (parameter, a), (_, b) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=parameter)


@pytest.mark.parametrize("name", TINY)
def test_trains_after_inference_mode(name: str) -> None:
    model = tiny(name)
    with torch.inference_mode():
        call(model)
    call(model).velocity.sum().backward()


@pytest.mark.parametrize("name", ["sit/S-2", "lightningdit/S-2", "reg/S-2"])
def test_positions_are_no_part_of_the_weights_and_stay_exact(name: str) -> None:
    model = disturbed(tiny(name))
    call(model)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    half = copy.deepcopy(model).bfloat16()
    assert call(half).velocity.dtype == torch.float32
    # Positions are rounded for the use only: back in float32 the outputs are those of the rounded weights.
    back = call(half.float()).velocity
    fresh = tiny(name)
    fresh.load_state_dict(half.state_dict())
    assert torch.equal(back, call(fresh).velocity)


@pytest.mark.parametrize("name", [*LABELLED, "dit/S-2"])
def test_condition_of_tokens_only_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="tokens only"):
        tiny(name, pooled=0, tokens=8)


@pytest.mark.parametrize("name", [name for name in TINY if name != "ditdh/S"])
def test_grids_that_the_patch_does_not_divide_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="4×5 cells does not divide into patches of 2×2"):
        tiny(name, grid=(4, 5))
    with pytest.raises(DataError, match="4×3 cells does not divide"):
        call(tiny(name), grid=(4, 3))


@pytest.mark.parametrize("name", TINY)
def test_other_conditions_and_layers_are_refused(name: str) -> None:
    model = tiny(name)
    with pytest.raises(DataError, match="with a pooled (condition|vector) and was given one without"):
        call(model, pooled=0)
    count = 3 if name in TEXTUAL else 2
    with pytest.raises(DataError, match=rf"Layer {count} was asked for.* {count} blocks; layers are 0 to {count - 1}"):
        call(model, layers=[count])


@pytest.mark.parametrize("name", VELOCITIES)
def test_learns_a_constant_velocity(name: str) -> None:
    """A sanity check of the gradient path as a whole: the loss of one batch falls by nine tenths."""
    model = tiny(name)
    target = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(call(model, b=4).velocity, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]

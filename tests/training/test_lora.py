"""Low-rank adaptation: what learns, what the sums are, every ZeRO stage, and where it is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import stage_cases as cases
import torch
from processes import on_ranks
from torch import Tensor, nn

import underpaint
from underpaint.config.stages import LoraConfig
from underpaint.errors import ConfigError
from underpaint.training.lora import add_pairs, merged
from underpaint.training.ranks import Ranks

CONFIG = LoraConfig(rank=3, alpha=6.0)


def encoder(name: str = "tiny/vit@random", **options: object) -> nn.Module:
    torch.manual_seed(0)
    return underpaint.create("encoder", name, **(options or cases.ENCODER)).eval()


def maps(model: nn.Module, side: int = 16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        found: tuple[Tensor, ...] = model(torch.rand(2, 3, side, side, generator=generator) * 2 - 1).maps
    return found


def filled(model: nn.Module) -> None:
    """Give the pairs numbers, as training does."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".up"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


# Three ways in which attention reads its weights: calls the layer, reads ``layer.weight``, holds the matrix itself.
ENCODERS = [
    ("tiny/vit@random", cases.ENCODER, 16, 8),
    ("timm/eva02_tiny_patch14_224@random", {"layers": (0, 1)}, 32, None),
    ("open_clip/ViT-S-32@random", {"layers": (0, 1)}, 64, None),
]


@pytest.mark.parametrize(("name", "options", "side", "count"), ENCODERS)
def test_pairs_start_as_nothing_and_their_sums_give_what_they_gave(
    name: str, options: dict[str, object], side: int, count: int | None
) -> None:
    plain, adapted = encoder(name, **options), encoder(name, **options)
    adapted.load_state_dict(plain.state_dict())
    add_pairs(adapted, CONFIG, "encoder")
    assert all(torch.equal(a, b) for a, b in zip(maps(plain, side), maps(adapted, side), strict=True))
    filled(adapted)
    moved = maps(adapted, side)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(maps(plain, side), moved, strict=True))
    pairs = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert all(re.search(r"\.parametrizations\.\w+\.0\.(up|down)$", name) for name in pairs)
    assert count is None or len(pairs) == 2 * count
    state = merged(adapted, adapted.state_dict())
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    for got, wanted in zip(maps(plain, side), moved, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_every_matrix_of_attention_is_adapted() -> None:
    model = encoder("open_clip/ViT-S-32@random", layers=(0,))
    add_pairs(model, CONFIG, "encoder")
    filled(model)
    first = "tower.visual.transformer.resblocks.0"
    pairs = {name.partition(".parametrizations")[0] for name, p in model.named_parameters() if p.requires_grad}
    mine = {name.removeprefix(f"{first}.") for name in pairs if name.startswith(first)}
    assert mine == {"attn", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"}


def test_the_sum_is_the_formula_of_the_paper() -> None:
    # Hu et al. 2022, eq. 3: h = W₀x + (α/r)·B·A·x.
    layer = nn.Sequential(nn.Linear(5, 4))
    weight = layer[0].weight.detach().double()
    add_pairs(layer, LoraConfig(rank=2, alpha=3.0, layers=""), "part")
    filled(layer)
    b, a = (dict(layer.named_parameters())[f"0.parametrizations.weight.0.{name}"].double() for name in ("up", "down"))
    assert (b.shape, a.shape) == ((4, 2), (2, 5))
    x = torch.randn(7, 5, dtype=torch.float64)
    wanted = x @ weight.T + 1.5 * (x @ a.T @ b.T) + layer[0].bias.double()
    torch.testing.assert_close(layer(x.float()).double(), wanted, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ in a stage


def test_only_the_pairs_of_the_part_learn() -> None:
    module, _ = cases.make_module(["l1"])
    module.add_lora(CONFIG)
    loss, _, _ = module(cases.pixels(), 0)
    loss.backward()
    grown = {name for name in cases.gradients(module) if name.startswith("encoder.")}
    assert grown == {name for name, p in module.named_parameters() if p.requires_grad and name.startswith("encoder.")}
    assert len(grown) == 16
    assert all(".parametrizations.weight.0." in name for name in grown)
    # Where B is zero, A has nothing to learn from yet.
    gradients = cases.gradients(module)
    assert all(bool(gradients[name].abs().sum() > 0) == name.endswith("up") for name in grown)
    assert any(name.startswith("decoder.") for name in gradients)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_loaded_engine_goes_on_bit_by_bit(alone: Ranks, tmp_path: Path, zero: int) -> None:
    engine, frozen = cases.lora_engine(alone, zero)
    cases.lora_steps(engine, 0, 3)
    engine.save(tmp_path)
    cases.lora_steps(engine, 3, 6)
    wanted = engine.state("raw"), engine.state("ema")
    engine.close()
    again, _ = cases.lora_engine(alone, zero)
    again.load(tmp_path)
    cases.lora_steps(again, 3, 6)
    for kind, before in zip(("raw", "ema"), wanted, strict=True):
        now = again.state(kind)
        assert all(torch.equal(now[name], before[name]) for name in before)
        # What is not a pair is exported bit by bit, and its sums under the names of the plain model.
        names = [name for name in now if name.startswith("encoder.") and name.endswith(".original")]
        assert names
        for name in names:
            assert torch.equal(now[name], frozen[name.replace(".parametrizations.weight.original", ".weight")])
        assert set(frozen) <= set(merged(again.module, now))
    pairs = [name for name in wanted[0] if name.endswith(".up")]
    assert pairs
    assert all(not torch.equal(wanted[0][name], wanted[1][name]) for name in pairs)
    again.close()


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_in_bfloat16_the_frozen_weights_are_exported_as_they_were(alone: Ranks, zero: int) -> None:
    engine, frozen = cases.lora_engine(alone, zero, precision="bf16")
    cases.lora_steps(engine, 0, 3)
    plain = merged(engine.module, state := engine.state("raw"))
    engine.close()
    for name, value in frozen.items():
        original = state.get(name.replace(".weight", ".parametrizations.weight.original"), state.get(name))
        assert original is not None
        assert torch.equal(original, value)
        assert torch.equal(plain[name], value) == (name in state)


def test_blocks_with_pairs_compile_into_one_graph_each() -> None:
    model = encoder()
    add_pairs(model, CONFIG, "encoder")
    filled(model)
    tokens = torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(6))
    for block in model.blocks:
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens), block(tokens))


@pytest.mark.slow
def test_every_zero_stage_and_two_ranks_train_the_same_pairs(alone: Ranks, tmp_path: Path) -> None:
    joint = cases.lora_stages(alone)
    first, second = on_ranks(tmp_path, 2, cases.lora_stages)
    assert all(second[zero] == {} for zero in range(4))
    for zero in range(4):
        for found in (joint[zero], first[zero]):
            assert found.keys() == joint[0].keys()
            for name, value in joint[0].items():
                torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-4)


# ---------------------------------------------------------------------------------------------- refusals


def test_layers_that_match_nothing_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"lora.layers is 'attn', which matches no linear layer of 'encoder'; it has 8, "
    ):
        add_pairs(encoder(), LoraConfig(layers="attn"), "encoder")
    with pytest.raises(ConfigError, match="no linear layer of 'part'; it has 0"):
        add_pairs(nn.Conv2d(3, 3, 1), CONFIG, "part")


def test_a_weight_that_is_computed_already_is_refused() -> None:
    layer = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ConfigError, match="The layer '0' of 'part' computes its weight"):
        add_pairs(layer, LoraConfig(layers=""), "part")


def test_adaptive_weights_are_not_measured_at_frozen_layers() -> None:
    module, _ = cases.make_module(["l1", {"name": "vf", "weight": 0.1, "adaptive": "adapter"}])
    with pytest.raises(ConfigError, match="at the last layer of the adapter, where with lora only pairs learn"):
        module.add_lora(LoraConfig(parts=("adapter",), layers=""))

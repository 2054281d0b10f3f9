"""Losses with layers of their own: trained with the model, kept in checkpoints, passed on from stage to stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import stage_cases as cases
import torch
from safetensors.torch import load_file
from torch import Tensor

from underpaint.errors import ConfigError, DataError
from underpaint.training.engine import Engine
from underpaint.training.heads import carry_heads, export_heads
from underpaint.training.ranks import Ranks
from underpaint.training.tokenizer_stage import TokenizerModule

VF = ["l1", {"name": "vf", "weight": 0.5}]


def head(module: TokenizerModule) -> Tensor:
    return dict(module.losses.named_parameters())["vf.project.weight"].detach().clone()


def train(engine: Engine, first: int, last: int) -> list[float]:
    values = []
    for step in range(first, last):
        loss, terms, _ = engine(cases.pixels(2), step)
        engine.backward(loss)
        engine.step()
        values.append(float(terms["vf_cosine"]) if "vf_cosine" in terms else float("nan"))
    return values


def test_a_head_is_a_part_that_learns_with_a_rate_of_its_own(alone: Ranks) -> None:
    module, _ = cases.make_module(VF, ("adapter",))
    assert set(module.learning) == {"adapter", "losses"}
    engine = cases.make_engine(module, alone, batch=2)
    assert set(engine.rates()) == {"adapter", "losses"}
    before = head(module)
    values = train(engine, 0, 12)
    assert values[-1] < 0.96 * values[0]
    assert not torch.equal(head(module), before)
    engine.close()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_head_outside_its_window_gets_no_gradient(alone: Ranks, zero: int) -> None:
    module, _ = cases.make_module(["l1", {"name": "vf", "start": 1}], ("adapter",))
    engine = cases.make_engine(module, alone, batch=2, zero=zero)
    before = engine.state("raw")["losses.vf.project.weight"]
    train(engine, 0, 1)
    assert torch.equal(engine.state("raw")["losses.vf.project.weight"], before)
    train(engine, 1, 2)
    assert not torch.equal(engine.state("raw")["losses.vf.project.weight"], before)
    engine.close()


def test_a_head_is_checkpointed(alone: Ranks, tmp_path: Path) -> None:
    straight = cases.make_engine(cases.make_module(VF, ("adapter",))[0], alone, batch=2)
    train(straight, 0, 2)
    straight.save(tmp_path)
    resumed = cases.make_engine(cases.make_module(VF, ("adapter",))[0], alone, batch=2)
    resumed.load(tmp_path)
    assert train(resumed, 2, 4) == train(straight, 2, 4)
    name = "losses.vf.project.weight"
    assert torch.equal(resumed.state("raw")[name], straight.state("raw")[name])
    straight.close()
    resumed.close()


def test_what_a_loss_only_looks_at_is_frozen_and_not_part_of_the_module() -> None:
    features = {"name": "features", "encoder": "tiny/vit@random", "options": cases.ENCODER}
    module, losses = cases.make_module(["l1", features])
    assert len(module.losses) == 0
    assert not any(p.requires_grad for p in losses.items[1].loss.parameters())
    assert {name.partition(".")[0] for name in module.state_dict()} == {"encoder", "adapter", "decoder"}


def test_a_head_is_passed_on(tmp_path: Path) -> None:
    first, _ = cases.make_module(VF)
    with torch.no_grad():
        first.losses["vf"].project.weight.fill_(0.25)
    export_heads(first.losses, first.state_dict(), tmp_path / "heads")
    assert set(load_file(tmp_path / "heads" / "vf.safetensors")) == {"project.weight"}
    second, _ = cases.make_module(["l1", "mse", {"name": "vf", "cosine_margin": 0.5}])
    assert carry_heads(second.losses, tmp_path / "heads") == ("vf",)
    assert torch.equal(head(second), head(first))


def test_a_head_of_other_shapes_or_of_another_loss_starts_anew(tmp_path: Path) -> None:
    first, _ = cases.make_module(VF)
    assert carry_heads(first.losses, tmp_path / "heads") == ()
    export_heads(first.losses, first.state_dict(), tmp_path / "heads")
    wider = {"name": "vf", "encoder": "tiny/vit@random", "options": {**cases.ENCODER, "width": 64}}
    second, _ = cases.make_module(["l1", wider])
    before = head(second)
    assert carry_heads(second.losses, tmp_path / "heads") == ()
    assert torch.equal(head(second), before)
    (tmp_path / "heads" / "vf.safetensors").rename(tmp_path / "heads" / "other.safetensors")
    assert carry_heads(first.losses, tmp_path / "heads") == ()
    (tmp_path / "heads" / "vf.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="damaged"):
        carry_heads(first.losses, tmp_path / "heads")


def test_no_heads_leave_no_folder(tmp_path: Path) -> None:
    module, _ = cases.make_module(["l1"])
    export_heads(module.losses, module.state_dict(), tmp_path / "heads")
    assert not (tmp_path / "heads").exists()


# --------------------------------------------------------------------------------------------- submodules


def test_only_the_submodules_that_are_named_change(alone: Ranks) -> None:
    module, _ = cases.make_module(["l1"], ("encoder.blocks.1", "decoder.conv_out"))
    engine = cases.make_engine(module, alone, batch=2)
    before = engine.state("raw")
    for step in range(2):
        loss, _, _ = engine(cases.pixels(2), step)
        engine.backward(loss)
        engine.step()
    after = engine.state("raw")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    named = {name for name in before if name.startswith(("encoder.blocks.1.", "decoder.conv_out."))}
    assert changed == named
    assert set(engine.rates()) == {"encoder.blocks.1", "decoder.conv_out"}
    assert [m.training for m in (module.encoder, module.encoder.blocks[0], module.encoder.blocks[1])] == [0, 0, 1]
    engine.close()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("decoder.conv_uot", r"names 'decoder.conv_uot', but 'decoder' has no 'conv_uot'.*'conv_out'"),
        ("encoder.blocks.7", r"but 'encoder.blocks' has no '7'"),
        ("decoder.", r"but 'decoder' has no ''"),
    ],
)
def test_a_submodule_that_is_not_there_is_refused(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cases.make_module(["l1"], ("adapter", path))

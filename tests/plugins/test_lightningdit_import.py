"""The importers of LightningDiT and of RAE's DiT^DH.

Golden numbers: the authors' own models (LightningDiT at hustvl/LightningDiT, DiTwDDTHead at bytetriper/RAE) in float32
on a CPU, with every tensor filled by `formula` from its name, given `latents` at the times 0.2 and 0.85 of their own
and the labels 1 and 3 of five.
"""

from __future__ import annotations

import argparse
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import underpaint
from underpaint import DataError

# ------------------------------------------------------------------------------------- files like the authors'


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """Fill a tensor from its name: u is a hash in [-1, 1] of name and index, then scaled by what the tensor is."""
    seed = zlib.crc32(name.encode()) % 100_003
    k = np.arange(1, math.prod(shape) + 1, dtype=np.float64)
    u = np.sin(k * 12.9898 + seed * 0.0078233) * 43758.5453
    u = 2 * (u - np.floor(u)) - 1
    if len(shape) > 1:
        values = u * np.sqrt(3 / math.prod(shape[1:]))
    elif "norm" in name and name.endswith("weight"):
        values = 1 + 0.2 * u
    else:
        values = (1.7 if name.endswith(".W") else 0.2) * u
    return torch.from_numpy(values.reshape(shape)).float()


def latents(side: int) -> Tensor:
    return (formula("x", (2, 6, side, side)) * math.sqrt(6 * side * side / 3) * 1.7).float()


def fixed_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of the column, then of the row."""
    row, column = np.divmod(np.arange(side * side), side)
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    parts = [f(np.outer(place, frequencies)) for place in (column, row) for f in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(parts, axis=1))[None].float()


def fixed_rotations(side: int, channels: int) -> dict[str, Tensor]:
    """Cosines and sines of the row's angles, then of the column's, each for two channels."""
    row, column = np.divmod(np.arange(side * side), side)
    frequencies = 10_000.0 ** (-np.arange(channels // 4) / (channels // 4))
    angles = np.concatenate([np.outer(place, frequencies).repeat(2, axis=1) for place in (row, column)], axis=1)
    return {f"freqs_{f.__name__}": torch.from_numpy(f(angles)).float() for f in (np.cos, np.sin)}


def block(prefix: str, n: int, head: int, *, qk_norm: bool, shift: bool) -> dict[str, tuple[int, ...]]:
    hidden = {48: 128, 64: 170}[n]
    shapes: dict[str, tuple[int, ...]] = {
        "norm1.weight": (n,),
        "norm2.weight": (n,),
        "attn.qkv.weight": (3 * n, n),
        "attn.qkv.bias": (3 * n,),
        "attn.proj.weight": (n, n),
        "attn.proj.bias": (n,),
        "mlp.w12.weight": (2 * hidden, n),
        "mlp.w12.bias": (2 * hidden,),
        "mlp.w3.weight": (n, hidden),
        "mlp.w3.bias": (n,),
        "adaLN_modulation.1.weight": ((6 if shift else 4) * n, n),
        "adaLN_modulation.1.bias": ((6 if shift else 4) * n,),
    }
    if qk_norm:
        shapes |= {"attn.q_norm.weight": (head,), "attn.k_norm.weight": (head,)}
    return {prefix + name: shape for name, shape in shapes.items()}


def final(n: int, rows: int) -> dict[str, tuple[int, ...]]:
    return {
        "final_layer.norm_final.weight": (n,),
        "final_layer.linear.weight": (rows, n),
        "final_layer.linear.bias": (rows,),
        "final_layer.adaLN_modulation.1.weight": (2 * n, n),
        "final_layer.adaLN_modulation.1.bias": (2 * n,),
    }


def mlp(times: int) -> dict[str, tuple[int, ...]]:
    return {
        "t_embedder.mlp.0.weight": (48, times),
        "t_embedder.mlp.0.bias": (48,),
        "t_embedder.mlp.2.weight": (48, 48),
        "t_embedder.mlp.2.bias": (48,),
        "y_embedder.embedding_table.weight": (6, 48),
    }


def lightningdit(patch: int, *, qk_norm: bool, shift: bool) -> dict[str, Tensor]:
    """A LightningDiT of two blocks of width 48 with 3 heads on 4×4 tokens."""
    shapes = {"x_embedder.proj.weight": (48, 6, patch, patch), "x_embedder.proj.bias": (48,)} | mlp(256)
    for index in range(2):
        shapes |= block(f"blocks.{index}.", 48, 16, qk_norm=qk_norm, shift=shift)
    shapes |= final(48, 6 * patch**2)
    state = {name: formula(name, shape) for name, shape in shapes.items()}
    state["pos_embed"] = fixed_positions(4, 48)
    return state | {f"feat_rope.{name}": table for name, table in fixed_rotations(4, 16).items()}


def ditdh(wide: int, *, qk_norm: bool) -> dict[str, Tensor]:
    """A DiT^DH of two blocks of width 48 with 3 heads, and two of width `wide` with 2, on 4×4 tokens."""
    shapes: dict[str, tuple[int, ...]] = {"t_embedder.W": (256,)} | mlp(512)
    for name, n in (("s_embedder", 48), ("x_embedder", wide)):
        shapes |= {f"{name}.proj.weight": (n, 6, 1, 1), f"{name}.proj.bias": (n,)}
    if wide != 48:
        shapes |= {"s_projector.weight": (wide, 48), "s_projector.bias": (wide,)}
    for index in range(4):
        n, heads = (48, 3) if index < 2 else (wide, 2)
        shapes |= block(f"blocks.{index}.", n, n // heads, qk_norm=qk_norm, shift=True)
    shapes |= final(wide, 6)
    state = {name: formula(name, shape) for name, shape in shapes.items()}
    state["pos_embed"] = fixed_positions(4, 48)
    for rope, channels in (("enc", 16), ("dec", wide // 2)):
        state |= {f"{rope}_feat_rope.{name}": table for name, table in fixed_rotations(4, channels).items()}
    return state


def read(format: str, state: dict[str, Any], folder: Path) -> nn.Module:
    torch.save(state, folder / "file.pt")
    return underpaint.create("importer", format).read(str(folder / "file.pt"))


def velocity(model: Any, t: list[float], side: int) -> Tensor:
    with torch.no_grad():
        condition = model.conditioner(torch.tensor([1, 3]))
        return model.backbone(latents(side), torch.tensor(t), condition).velocity


def check(out: Tensor, mean: float, std: float, values: list[float]) -> None:
    flat = out.double().flatten()
    got = [float(flat.mean()), float(flat.std(unbiased=False)), *flat[[0, 1, 37, 100, -1]].tolist()]
    np.testing.assert_allclose(got, [mean, std, *values], rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- parity


def test_lightningdit_as_published(tmp_path: Path) -> None:
    model = read("lightningdit", {"ema": lightningdit(1, qk_norm=False, shift=True)}, tmp_path)
    # Their time runs from noise to data, and their output is data − noise.
    out = -velocity(model, [0.8, 0.15], 4)
    check(out, 0.03896796, 0.91319268, [-1.5764511, -0.7996763, -2.4397545, -1.2073597, 0.9889418])


def test_lightningdit_of_other_options(tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in lightningdit(2, qk_norm=True, shift=False).items()}
    model = read("lightningdit", {"model": {}, "ema": state, "opt": {}, "args": argparse.Namespace(lr=2e-4)}, tmp_path)
    out = -velocity(model, [0.8, 0.15], 8)
    check(out, 0.04894325, 1.02316099, [0.4616472, 1.2103951, -0.3354084, -0.682016, 0.1608535])


def test_ditdh_as_published(tmp_path: Path) -> None:
    model = read("rae-dit", {"ema": ditdh(64, qk_norm=False)}, tmp_path)
    out = velocity(model, [0.2, 0.85], 4)
    check(out, -0.37814738, 1.26176852, [-0.6050994, 2.0603559, -1.4627849, -0.5172541, -1.7376018])


def test_ditdh_of_one_width(tmp_path: Path) -> None:
    model = read("rae-dit", ditdh(48, qk_norm=True), tmp_path)
    out = velocity(model, [0.2, 0.85], 4)
    check(out, 0.27132895, 1.53355922, [-1.1677694, 0.818187, 0.780761, -0.9087728, 1.3078225])


# ------------------------------------------------------------------------------------------------ what is read


def test_what_comes_back(tmp_path: Path) -> None:
    model: Any = read("lightningdit", lightningdit(2, qk_norm=True, shift=False), tmp_path)
    assert not model.training
    assert model.backbone.spec.name.startswith("lightningdit/")
    assert model.backbone.spec.context["grid"] == (8, 8)
    assert model.conditioner.classes == 5
    assert model.guided_channels == 3
    table = formula("y_embedder.embedding_table.weight", (6, 48))
    assert torch.equal(model.conditioner.table.weight, table)
    # Weights that influence no output in this configuration, such as a key's bias, are carried all the same.
    assert torch.equal(model.backbone.layers[1].qkv.bias, formula("blocks.1.attn.qkv.bias", (144,)))
    model = read("rae-dit", ditdh(64, qk_norm=False), tmp_path)
    assert model.guided_channels is None
    assert torch.equal(model.backbone.times.frequencies, formula("t_embedder.W", (256,)))


def test_published_sizes_get_their_names() -> None:
    from underpaint_lightningdit.import_lightningdit import _name
    from underpaint_lightningdit.import_rae import _name as _dh_name

    assert _name(28, 1152, 16, 1) == ("lightningdit/XL-1", {})
    assert _name(28, 1792, 28, 2) == ("lightningdit/1p6B-2", {})
    assert _dh_name(28, 1152, 16, 2, 2048, 16)[0] == "ditdh/XL"


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_half_precision_files_of_both_kinds(suffix: str, tmp_path: Path) -> None:
    state = {name: value.bfloat16().contiguous() for name, value in ditdh(64, qk_norm=False).items()}
    path = tmp_path / f"file.{suffix}"
    if suffix == "pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    model: Any = underpaint.create("importer", "rae-dit").read(str(path))
    assert model.backbone.embed.weight.dtype == torch.float32
    assert torch.equal(model.backbone.embed.bias, state["s_embedder.proj.bias"].float())


# --------------------------------------------------------------------------------------------- what is refused


def without(key: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        del state[key]

    return change


def put(key: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[key] = torch.zeros(shape)

    return change


COMMON = [
    (without("blocks.1.attn.proj.bias"), r"it lacks 'blocks\.1\.attn\.proj\.bias'"),
    (without("blocks.0.norm1.weight"), r"it lacks 'blocks\.0\.norm1\.weight'"),
    (without("pos_embed"), "it lacks 'pos_embed'"),
    (put("blocks.9.norm1.weight", 48), r"it lacks 'blocks\.[24]\.norm1.* and \d+ more"),
    (put("projectors.0.weight", 1), r"it has 'projectors\.0\.weight' besides"),
    (put("blocks.1.mlp.w3.weight", 48, 120), r"'blocks\.1\.mlp\.w3\.weight' has the shape \(48, 120\)"),
    (put("pos_embed", 1, 16, 48), "'pos_embed' holds other positions"),
    (put("pos_embed", 1, 15, 48), "15 positions are no square grid"),
    (put("pos_embed", 16, 48), r"'pos_embed' has the shape \(16, 48\), not 3 dimensions"),
]
LIGHTNING = [
    *COMMON,
    (put("feat_rope.freqs_sin", 16, 16), r"'feat_rope\.freqs_sin' holds other positions"),
    (put("feat_rope.freqs_cos", 16, 10), "rotary positions of 10 channels"),
    (put("final_layer.linear.weight", 12, 48), "it predicts a variance"),
]
RAE = [
    *COMMON,
    (put("dec_feat_rope.freqs_cos", 16, 32), r"'dec_feat_rope\.freqs_cos' holds other positions"),
    (put("enc_feat_rope.freqs_cos", 16, 10), "rotary positions of 10 channels"),
    (put("s_embedder.proj.weight", 48, 6, 2, 2), "patches of 2×2 cells"),
]


@pytest.mark.parametrize(("change", "message"), LIGHTNING)
def test_wrong_lightningdit_files_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    state = lightningdit(1, qk_norm=False, shift=True)
    change(state)
    with pytest.raises(DataError, match=rf"is no checkpoint of the format 'lightningdit': .*{message}"):
        read("lightningdit", state, tmp_path)


@pytest.mark.parametrize(("change", "message"), RAE)
def test_wrong_ditdh_files_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    state = ditdh(64, qk_norm=False)
    change(state)
    with pytest.raises(DataError, match=rf"is no checkpoint of the format 'rae-dit': .*{message}"):
        read("rae-dit", state, tmp_path)


@pytest.mark.parametrize(
    ("format", "state", "looks"),
    [
        ("lightningdit", ditdh(64, qk_norm=False), "looks like a DiT\\^DH of RAE; use the format 'rae-dit'"),
        (
            "rae-dit",
            lightningdit(1, qk_norm=False, shift=True),
            "looks like a LightningDiT; use the format 'lightningdit'",
        ),
        ("rae-dit", {"blocks.0.mlp.fc1.weight": torch.zeros(1)}, "looks like a DiT, a SiT or a vision transformer"),
        ("lightningdit", {"double_blocks.0.img_mlp.0.weight": torch.zeros(1)}, "looks like a FLUX transformer"),
        ("lightningdit", {"weight": torch.zeros(1)}, "check the file or the format"),
        ("lightningdit", {}, "check the file or the format"),
    ],
)
def test_other_projects_are_recognised(format: str, state: dict[str, Tensor], looks: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=looks):
        read(format, state, tmp_path)

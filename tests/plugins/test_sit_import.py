"""Importers of DiT, SiT, REPA and REG: outputs of the originals on weights given by a formula, layouts, refusals.

The numbers in `GOLDEN` were recorded from the original codes, run in float32 with every tensor (but the positions)
filled by `formula` over its name, and with inputs from it.
"""

from __future__ import annotations

import argparse
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor

import underpaint
from underpaint import Condition, ConfigError, DataError

State = dict[str, Tensor]
T = torch.tensor([0.3, 0.85])
LABELS = torch.tensor([1, 5])
PLACES = [0, 1, 77, 200, 311, -1]


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers from a hash of name and index, with the variance 1/fan-in; norms lie around 1."""
    x = (np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()))) * np.uint64(
        0x9E3779B97F4A7C15
    )
    x ^= x >> np.uint64(31)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(29)
    u = (x >> np.uint64(11)).astype(np.float64) / 2.0**53 * 2 - 1
    u *= math.sqrt(3 / math.prod(shape[1:])) if len(shape) > 1 else 0.5
    return torch.from_numpy((u + (1.0 if name.endswith("norm.weight") else 0.0)).reshape(shape)).float()


def layout(
    width: int = 32,
    depth: int = 2,
    patch: int = 2,
    side: int = 4,
    classes: int = 5,
    maps: int = 1,
    qk: int = 0,
    projector: int = 0,
    z: int = 24,
    joint: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file with 4 latent channels, in our own words."""
    linear: dict[str, tuple[int, int]] = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    norms: dict[str, int] = {}
    for i in range(depth):
        linear[f"blocks.{i}.attn.qkv"] = (3 * width, width)
        linear[f"blocks.{i}.attn.proj"] = (width, width)
        linear[f"blocks.{i}.mlp.fc1"] = (4 * width, width)
        linear[f"blocks.{i}.mlp.fc2"] = (width, 4 * width)
        linear[f"blocks.{i}.adaLN_modulation.1"] = (6 * width, width)
        if qk:
            norms |= {f"blocks.{i}.attn.q_norm": qk, f"blocks.{i}.attn.k_norm": qk}
    linear["final_layer.linear"] = (4 * patch**2 * maps, width)
    linear["final_layer.adaLN_modulation.1"] = (2 * width, width)
    if projector:
        linear["projectors.0.0"] = (projector, width)
        linear["projectors.0.2"] = (projector, projector)
        linear["projectors.0.4"] = (z, projector)
    if joint:
        linear |= {"cls_projectors2": (width, z), "final_layer.linear_cls": (z, width)}
        norms["wg_norm"] = width
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, side**2 + joint, width),
        "x_embedder.proj.weight": (width, 4, patch, patch),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
    }
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, count in norms.items():
        shapes |= {f"{name}.weight": (count,), f"{name}.bias": (count,)}
    return shapes


def positions(side: int, width: int) -> Tensor:
    """timm's: sines of row and column, then cosines. DiT's: sines and cosines of the column, then of the row."""
    q = build_sincos2d_pos_embed([side, side], dim=width).reshape(side**2, 2, 2, width // 4)
    return torch.stack((q[:, 0, 1], q[:, 1, 1], q[:, 0, 0], q[:, 1, 0]), dim=1).reshape(side**2, width)


def filled(shapes: dict[str, tuple[int, ...]]) -> State:
    state = {name: formula(name, shape) for name, shape in shapes.items()}
    count, width = shapes["pos_embed"][1:]
    grid = positions(math.isqrt(count), width)
    state["pos_embed"] = torch.cat((torch.zeros(count - len(grid), width), grid))[None]
    return state


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "sit": layout(maps=2),
    "dit": layout(maps=2),
    "repa": layout(depth=3, projector=16),
    "repa-qk": layout(depth=3, projector=16, qk=8),
    "reg": layout(depth=3, projector=16, joint=True),
    "reg-qk": layout(depth=3, projector=16, qk=8, joint=True),
}

# Mean, standard deviation, and the values at PLACES of what the originals return.
GOLDEN: dict[str, list[float]] = {
    "sit": [0.1529833, 1.0364184, -0.1819241, 0.6966743, 1.6581233, -0.9190962, -1.1137393, 0.3107712],
    "dit": [0.2248714, 1.1171414, 0.4615427, 0.6100208, 1.8050597, -0.3064461, -0.7110572, 0.8210592],
    "dit-variance": [-0.0001906, 1.1839564, -1.0416079, 0.5362865, 1.7600317, -0.4527471, 1.7148075, 1.1257199],
    "dit-ends": [0.1868775, 1.1192644, -0.1446807, 0.7199954, 1.6360846, -0.9277691, -0.4606299, -0.2562226],
    "dit-mean": [0.0294596, 0.5120052, 0.5271764, 0.1807849, -0.3731767, -0.000969, 0.3088118, 0.6312504],
    "dit-logvar": [-4.841247, 0.4442719, -5.2881422, -5.2837415, -5.2803278, -5.2865, -4.3971701, -4.3972521],
    "repa": [0.1385373, 1.3151253, 0.8151262, -0.8518308, 0.895601, -0.7473912, -0.7963715, -0.4404761],
    "repa-z": [-0.1050603, 0.9445604, 0.3678271, -0.3593231, -2.0744679, -0.6477832, 2.6300948, 1.9190378],
    "repa-qk": [0.1450845, 1.3400373, 0.936194, -0.815182, 0.9360592, -0.7744632, -0.7823368, -0.5164949],
    "repa-qk-z": [-0.1042283, 0.9614177, 0.3216736, -0.3516684, -2.1276927, -0.6977401, 2.8352385, 1.8970407],
    "reg": [0.1465539, 1.3113516, 0.7072244, -0.7854983, 0.8455887, -0.8097626, -0.8329425, -0.3989231],
    "reg-z": [-0.103988, 0.9236118, 0.0978963, -0.4400435, -1.7673954, -0.315596, 2.4796088, 1.9152387],
    "reg-qk": [0.1494583, 1.3294572, 0.791907, -0.7723318, 0.8512489, -0.8373731, -0.8192902, -0.5000975],
    "reg-qk-z": [-0.1017598, 0.9375035, 0.0514145, -0.3965557, -1.8981115, -0.4509072, 2.6878207, 1.9035563],
}
# The same of REG's velocity of the class token, at the places 0, 1, 25 and the last.
GOLDEN_TOKEN = {
    "reg": [-0.1304541, 1.088437, -2.287219, 1.4213293, -0.9412538, -0.0551627],
    "reg-qk": [-0.138105, 1.0966874, -2.2333841, 1.3628976, -0.5944028, -0.0583066],
}


def equal(got: Tensor, wanted: list[float], places: list[int] = PLACES, tolerance: float = 1e-5) -> None:
    values = got.detach().double()
    found = [float(values.mean()), float(values.std()), *values.flatten()[places].tolist()]
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def read(name: str, state: Any, folder: Path, **options: Any) -> Any:
    path = folder / "file.pt"
    torch.save(state, path)
    with torch.no_grad():
        return underpaint.create("importer", name.partition("-")[0], **{"heads": 4, **options}).read(str(path))


def x_t() -> Tensor:
    return formula("x", (2, 4, 8, 8)) * 8


# -------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("shapes", "keys", "numbers"),
    [
        (layout(384, 12, 2, 16, 1000, maps=2), 132, 32_963_360),
        (layout(768, 12, 2, 16, 1000, projector=2048, z=768), 138, 137_845_008),
        (layout(768, 12, 2, 16, 1000, projector=2048, z=768, joint=True), 144, 139_028_496),
    ],
    ids=["SiT-S/2", "REPA-B/2", "REG-B/2"],
)
def test_the_layout_counts_as_the_published_files(shapes: dict[str, Any], keys: int, numbers: int) -> None:
    assert len(shapes) == keys
    assert sum(map(math.prod, shapes.values())) == numbers


# -------------------------------------------------------------------------------------------------- outputs


def test_sit_is_mirrored_and_negated(tmp_path: Path) -> None:
    model = read("sit", filled(SHAPES["sit"]), tmp_path)
    velocity = model.backbone(x_t(), 1 - T, model.conditioner(LABELS.clamp(max=4), LABELS == 5)).velocity
    equal(-velocity, GOLDEN["sit"])


@pytest.mark.parametrize("name", ["repa", "repa-qk"])
def test_repa(name: str, tmp_path: Path) -> None:
    state = filled(SHAPES[name])
    model = read(name, state, tmp_path)
    condition = model.conditioner(LABELS.clamp(max=4), LABELS == 5)
    prediction = model.backbone(x_t(), T, condition, layers=[1])
    equal(prediction.velocity, GOLDEN[name])
    # Encoder depth 2 is our layer 1.
    equal(project(state, prediction.hidden[1]), GOLDEN[f"{name}-z"])


@pytest.mark.parametrize("name", ["reg", "reg-qk"])
def test_reg(name: str, tmp_path: Path) -> None:
    state = filled(SHAPES[name])
    model = read(name, state, tmp_path)
    condition = model.conditioner(LABELS.clamp(max=4), LABELS == 5)
    prediction = model.backbone(x_t(), T, condition, layers=[1], companion=formula("c", (2, 24)) * 4)
    equal(prediction.velocity, GOLDEN[name])
    equal(prediction.companion, GOLDEN_TOKEN[name], [0, 1, 25, -1])
    equal(project(state, prediction.hidden[1]), GOLDEN[f"{name}-z"])


def project(state: State, hidden: Tensor) -> Tensor:
    for layer in (0, 2, 4):
        hidden = F.linear(
            F.silu(hidden) if layer else hidden,
            state[f"projectors.0.{layer}.weight"],
            state[f"projectors.0.{layer}.bias"],
        )
    return hidden


def dit_table() -> np.ndarray:
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def test_dit(tmp_path: Path) -> None:
    model = read("dit", filled(SHAPES["dit"]), tmp_path)
    condition = Condition(pooled=model.conditioner.table(LABELS))

    def ask(steps: list[int]) -> tuple[Tensor, Tensor]:
        """Noise and fraction for DiT's latent of some timesteps: in our scale, and at our time."""
        kept = torch.from_numpy(dit_table()[steps])
        t = (1 - kept).sqrt() / ((1 - kept).sqrt() + kept.sqrt())
        x = x_t() * ((1 - t) / kept.sqrt()).float()[:, None, None, None]
        prediction = model.backbone(x, t, condition)
        return x + (1 - t).float()[:, None, None, None] * prediction.velocity, prediction.variance

    steps = [250, 613]
    noise, fraction = ask(steps)
    equal(noise, GOLDEN["dit"])
    equal(2 * fraction - 1, GOLDEN["dit-variance"])
    equal(ask([0, 999])[0], GOLDEN["dit-ends"])
    # The step of a DDPM sampler: mean (Ho et al. 2020, eq. 7 and 11) and log-variance (Nichol & Dhariwal 2021, eq. 15).
    beta, kept = np.linspace(1e-4, 0.02, 1000)[steps], dit_table()[steps]
    before = dit_table()[np.array(steps) - 1]
    column = lambda v: torch.from_numpy(v)[:, None, None, None]  # noqa: E731
    mean = (x_t() - column(beta / np.sqrt(1 - kept)) * noise) / column(np.sqrt(1 - beta))
    equal(mean, GOLDEN["dit-mean"])
    smallest = beta * (1 - before) / (1 - kept)
    logvar = fraction * column(np.log(beta)) + (1 - fraction) * column(np.log(smallest))
    equal(logvar, GOLDEN["dit-logvar"])


# -------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["dit", "repa", "reg-qk"])
def test_every_tensor_arrives_unchanged(name: str, tmp_path: Path) -> None:
    state = filled(SHAPES[name])
    model = read(name, state, tmp_path)
    arrived = sorted(p.numpy().tobytes() for p in model.state_dict().values())
    left_out = ("pos_embed", "projectors.")
    assert arrived == sorted(v.numpy().tobytes() for k, v in state.items() if not k.startswith(left_out))


def test_what_sit_changes_in_weights(tmp_path: Path) -> None:
    state = filled(SHAPES["sit"])
    model = read("sit", state, tmp_path)
    ours = {name.removeprefix("backbone."): p for name, p in model.state_dict().items()}
    # Within each of the 4 cells of a patch, 4 velocities precede 4 variances.
    kept = [cell * 8 + channel for cell in range(4) for channel in range(4)]
    assert torch.equal(ours["head.weight"], -state["final_layer.linear.weight"][kept])
    assert torch.equal(ours["head.bias"], -state["final_layer.linear.bias"][kept])
    same = sorted(p.numpy().tobytes() for name, p in ours.items() if name[:4] not in ("head", "time"))
    changed = ("final_layer.linear.", "t_embedder.mlp.", "pos_embed")
    assert same == sorted(v.numpy().tobytes() for k, v in state.items() if not k.startswith(changed))
    assert torch.equal(ours["time.2.weight"], state["t_embedder.mlp.2.weight"])
    # A rotation of each pair of sine and cosine: lengths stay, and mirroring twice is the identity.
    pairs = [w.view(32, 2, 128).norm(dim=1) for w in (ours["time.0.weight"], state["t_embedder.mlp.0.weight"])]
    torch.testing.assert_close(*pairs)


def test_what_is_made_says_what_it_is(tmp_path: Path) -> None:
    model = read("reg-qk", filled(SHAPES["reg-qk"]), tmp_path)
    assert not model.training
    backbone, conditioner = model.backbone, model.conditioner
    options = {"depth": 3, "width": 32, "heads": 4, "patch": 2, "companion": 24, "mlp_ratio": 4.0}
    assert {k: backbone.spec.options[k] for k in options} == options
    assert (backbone.spec.name, conditioner.spec.name) == ("reg/S-2", "labels")
    assert (backbone.spec.options["qk_norm"], backbone.spec.options["qk_norm_type"]) == (True, "layer")
    assert dict(backbone.spec.context) == {"latent_channels": 4, "grid": (8, 8), "pooled_dim": 32, "token_dim": 0}
    assert conditioner.classes == 5


@pytest.mark.parametrize(("format", "family"), [("sit", "sit"), ("repa", "sit"), ("reg", "reg"), ("dit", "dit")])
def test_published_sizes_are_found(format: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = {"sit": 2, "dit": 2}.get(format, 3)
    monkeypatch.setattr("underpaint_sit.importers.SIZES", {"B": (depth, 32, 4)})
    model = read(format, filled(SHAPES[format]), tmp_path, heads=None)
    assert model.backbone.spec.name == f"{family}/B-2"
    assert model.backbone.spec.options["heads"] == 4
    # The table of conventions in peers.md.
    assert model.guided_channels == (3 if format in ("sit", "dit") else None)


def test_a_patch_without_a_name_keeps_its_options(tmp_path: Path) -> None:
    shapes = layout(patch=4, side=2, projector=16, joint=True)
    model = read("reg", filled(shapes), tmp_path)
    assert (model.backbone.spec.name, model.backbone.patch) == ("reg/S-2", 4)


# ---------------------------------------------------------------------------------------------------- files


def test_nesting_prefix_and_safetensors(tmp_path: Path) -> None:
    state = filled(SHAPES["repa"])
    other = {name: value + 1 for name, value in state.items()}
    wanted = read("repa", state, tmp_path).state_dict()
    training = {"ema": state, "model": other, "opt": {}, "args": argparse.Namespace(model="SiT-B/2"), "steps": 4}
    raw = {"model": state, "opt": {}, "args": argparse.Namespace(model="SiT-B/2")}
    prefixed = {f"module.{name}": value for name, value in state.items()}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "file.safetensors")
    found = [read("repa", source, tmp_path) for source in (training, raw, {"ema": state}, prefixed)]
    found.append(underpaint.create("importer", "repa", heads=4).read(str(tmp_path / "file.safetensors")))
    for model in found:
        assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_legacy_blocks_follow_the_others(tmp_path: Path) -> None:
    state = filled(SHAPES["repa"])
    wanted = read("repa", state, tmp_path).state_dict()
    legacy = {
        name.replace("blocks.2.", "decoder_blocks.0.") if "blocks.2." in name else name: v for name, v in state.items()
    }
    assert "decoder_blocks.0.mlp.fc1.bias" in legacy
    found = read("repa", legacy, tmp_path).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in filled(SHAPES["repa"]).items()}
    model = read("repa", state, tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------------- refusals


def without(state: State, *keys: str) -> State:
    return {name: value for name, value in state.items() if name not in keys}


@pytest.mark.parametrize(
    ("format", "source", "message"),
    [
        ("repa", "sit", "head writes 32 and 32 numbers for a patch, and REPA writes 16. It looks like DiT or SiT"),
        ("sit", "repa", "has 'projectors.0.0.bias', 'projectors.0.0.weight', .* beside. It looks like REPA"),
        ("sit", "reg", "It looks like REG; import it as 'reg'"),
        ("repa", "reg", "has 'cls_projectors2.bias'.* It looks like REG"),
        ("reg", "repa", "lacks 'cls_projectors2.bias'.* It looks like REPA"),
        ("dit", "repa", "is no file of DiT: it has 'projectors"),
    ],
)
def test_files_of_another_format_are_refused(format: str, source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(format, filled(SHAPES[source]), tmp_path)


@pytest.mark.parametrize("name", ["sit", "dit", "repa-qk", "reg"])
def test_every_lost_renamed_or_reshaped_key_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = filled(SHAPES[name])
    importer: Any = underpaint.create("importer", name.partition("-")[0], heads=4)
    for key in sorted(state):
        if key.startswith("projectors.") or (key.startswith("blocks.") and not key.startswith("blocks.1.")):
            continue
        # More rows of the label table are more classes.
        axes = (-1,) if "table" in key else (0, -1)
        reshaped = [{**state, key: state[key].repeat_interleave(2, dim=axis)} for axis in axes]
        flat = {**state, key: state[key].reshape(-1)} if state[key].ndim > 1 else {**state, key: state[key][None]}
        for wrong in (without(state, key), {**without(state, key), f"{key}x": state[key]}, flat, *reshaped):
            monkeypatch.setattr("underpaint_sit.importers.load_weights", lambda *_, found=wrong, **__: found)
            with pytest.raises(DataError):
                importer.read("file.pt")


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 'blocks.0.extra' beside"):
        read("sit", {**filled(SHAPES["sit"]), "blocks.0.extra": torch.zeros(1)}, tmp_path)


def test_a_missing_block_is_refused(tmp_path: Path) -> None:
    state = {k: v for k, v in filled(SHAPES["repa"]).items() if not k.startswith("blocks.1.")}
    with pytest.raises(DataError, match=r"lacks 'blocks.1.adaLN_modulation.1.bias', .* and 7 more"):
        read("repa", state, tmp_path)


def test_a_strange_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="It looks like none of DiT, SiT, REPA and REG"):
        read("dit", {"conv.weight": torch.zeros(2)}, tmp_path)
    with pytest.raises(DataError, match="It looks like LightningDiT"):
        read("sit", {"blocks.0.mlp.w12.weight": torch.zeros(2), "blocks.0.attn.qkv.weight": torch.zeros(2)}, tmp_path)


@pytest.mark.parametrize("name", ["sit", "reg"])
def test_other_positions_are_refused(name: str, tmp_path: Path) -> None:
    state = filled(SHAPES[name])
    for table in (state["pos_embed"].flip(1), state["pos_embed"][:, :-1], torch.zeros_like(state["pos_embed"])):
        with pytest.raises(DataError, match="other positions than the fixed sines and cosines"):
            read(name, {**state, "pos_embed": table}, tmp_path)


def test_heads_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"width 32, which is none of the published 384, 768, 1024, 1152"):
        read("sit", filled(SHAPES["sit"]), tmp_path, heads=None)

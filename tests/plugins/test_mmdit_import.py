"""The importers of Stable Diffusion 3 and FLUX: golden outputs of the published networks, and strictness.

The golden numbers were printed by the reference networks of Stability AI (MMDiT-X) and Black Forest Labs, in float32,
with the weights and inputs that `formula` and `signal` give here: depth 3 and 2 + 2, width 192, 16×16×24 latents, 11
text tokens of 96, pooled vectors of 48, times 0.3 and 0.85, guidance 3.5. FLUX's were printed with exponentials rounded
correctly: at angles of 3500, the last bit of a processor's own moves them by more than 1e-5.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import underpaint
from underpaint import Backbone, Condition, DataError

Tensors = dict[str, Tensor]


def hashed(name: str, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return `count` numbers in [-1, 1): the finaliser of splitmix64, on a counter that starts at the name's CRC."""
    z = np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 20)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1.0


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the weights of a published name: of variance 1/inputs, vectors small, scales of norms about one."""
    values = hashed(name, math.prod(shape))
    if len(shape) > 1:
        values *= (3.0 / math.prod(shape[1:])) ** 0.5
    else:
        values = 0.1 * values + (1.0 if name.endswith(("scale", "ln_q.weight", "ln_k.weight")) else 0.0)
    return torch.from_numpy(values.reshape(shape)).float()


def signal(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(hashed(name, math.prod(shape)).reshape(shape) * 3**0.5).float()


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def sd3_shapes(*, qk_norm: str = "none", dual: int = 0, depth: int = 3) -> dict[str, tuple[int, ...]]:
    """Return names and shapes as the published program makes them."""
    w, head = 192, 64
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, 256, w), "x_embedder.proj.weight": (w, 16, 2, 2)}
    shapes |= {"x_embedder.proj.bias": (w,)} | linear("context_embedder", w, 96)
    shapes |= linear("t_embedder.mlp.0", w, 256) | linear("t_embedder.mlp.2", w, w)
    shapes |= linear("y_embedder.mlp.0", w, 48) | linear("y_embedder.mlp.2", w, w)
    shapes |= linear("final_layer.linear", 64, w) | linear("final_layer.adaLN_modulation.1", 2 * w, w)
    for i in range(depth):
        for part in ("context_block", "x_block"):
            at, ends, second = f"joint_blocks.{i}.{part}", part == "context_block" and i == depth - 1, i < dual
            second = second and part == "x_block"
            for attention in ("attn", "attn2") if second else ("attn",):
                shapes |= linear(f"{at}.{attention}.qkv", 3 * w, w)
                shapes |= {} if ends else linear(f"{at}.{attention}.proj", w, w)
                for norm in ("ln_q", "ln_k") if qk_norm != "none" else ():
                    shapes |= {f"{at}.{attention}.{norm}.weight": (head,)}
                    shapes |= {f"{at}.{attention}.{norm}.bias": (head,)} if qk_norm == "ln" else {}
            shapes |= linear(f"{at}.adaLN_modulation.1", (2 if ends else 9 if second else 6) * w, w)
            shapes |= {} if ends else linear(f"{at}.mlp.fc1", 4 * w, w) | linear(f"{at}.mlp.fc2", w, 4 * w)
    return shapes


def flux_shapes(*, guidance: bool = False) -> dict[str, tuple[int, ...]]:
    """Return names and shapes as the published program makes them."""
    w, head = 192, 64
    shapes = linear("img_in", w, 64) | linear("txt_in", w, 96)
    for name, inputs in {"time_in": 256, "vector_in": 48, **({"guidance_in": 256} if guidance else {})}.items():
        shapes |= linear(f"{name}.in_layer", w, inputs) | linear(f"{name}.out_layer", w, w)
    for i in range(2):
        for part in ("img", "txt"):
            at = f"double_blocks.{i}.{part}"
            shapes |= linear(f"{at}_mod.lin", 6 * w, w) | linear(f"{at}_attn.qkv", 3 * w, w)
            shapes |= (
                linear(f"{at}_attn.proj", w, w) | linear(f"{at}_mlp.0", 4 * w, w) | linear(f"{at}_mlp.2", w, 4 * w)
            )
            shapes |= {f"{at}_attn.norm.{norm}_norm.scale": (head,) for norm in ("query", "key")}
        at = f"single_blocks.{i}"
        shapes |= linear(f"{at}.linear1", 7 * w, w) | linear(f"{at}.linear2", w, 5 * w)
        shapes |= linear(f"{at}.modulation.lin", 3 * w, w)
        shapes |= {f"{at}.norm.{norm}_norm.scale": (head,) for norm in ("query", "key")}
    return shapes | linear("final_layer.linear", 64, w) | linear("final_layer.adaLN_modulation.1", 2 * w, w)


def weights(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    return {name: formula(name, shape) for name, shape in shapes.items()}


def read(kind: str, tensors: Tensors, folder: Path, prefix: str = "") -> Any:
    path = folder / "published.safetensors"
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    model = underpaint.create("importer", kind).read(str(path))
    assert isinstance(model, underpaint.Denoiser)
    assert model.conditioner is None
    return model.backbone


@torch.no_grad()
def velocity(model: Backbone) -> Tensor:
    condition = Condition(tokens=signal("tokens", (2, 11, 96)), pooled=signal("pooled", (2, 48)))
    prediction = model(signal("x", (2, 16, 16, 24)), torch.tensor([0.3, 0.85]), condition)
    assert prediction.velocity.dtype == torch.float32
    return prediction.velocity


# Mean and standard deviation, the start of the first row, the end of the last, and three cells of a column.
GOLDEN: dict[str, tuple[float, float, list[float], list[float], list[float]]] = {
    "sd3": (
        -0.02267455190555741,
        1.1225876272919368,
        [-1.5256777, -0.6353218, -0.6714991, 0.5094398],
        [0.0931143, 1.2877414, 0.4574919, 2.0205417],
        [-1.3111676, -0.1390077, 0.6982521],
    ),
    "sd3 rms": (
        -0.02511467875778332,
        1.1227326600038945,
        [-1.6526407, -0.575784, -0.7751608, 0.4405133],
        [0.2223555, 1.2657888, 0.4850231, 2.0198705],
        [-1.2803816, -0.2425526, 0.6751508],
    ),
    "sd3 ln": (
        -0.024216628746583996,
        1.122915580585679,
        [-1.6402355, -0.5437599, -0.7777432, 0.4449368],
        [0.2206396, 1.2663503, 0.4839328, 2.0233424],
        [-1.2767605, -0.2397105, 0.6970502],
    ),
    "sd3 dual": (
        -0.023461500911632054,
        1.1237252014463766,
        [-1.6044079, -0.4352162, -0.9297487, 0.3112771],
        [-0.1823756, 1.1105311, 0.2170845, 2.1105659],
        [-1.101107, -0.3404496, 0.93914],
    ),
    "flux dev": (
        0.05718767897337784,
        1.2154736867815268,
        [-1.24261, 1.4436274, -1.7554977, 1.5231889],
        [-0.1071125, -0.6593415, 0.5341875, -1.1797614],
        [-0.4275947, -0.6600921, -0.0387882],
    ),
    "flux schnell": (
        0.04610518971567975,
        1.162794910759805,
        [-1.030098, 1.1933069, -1.3544974, 0.8471674],
        [-0.2628013, -0.0346409, 0.3048083, -0.7951205],
        [0.1663468, -0.4781723, 0.5954459],
    ),
}
CASES: dict[str, tuple[Callable[..., dict[str, tuple[int, ...]]], dict[str, Any], int, int]] = {
    # Shapes, their options, tensors in the file, parameters.
    "sd3": (sd3_shapes, {}, 71, 3_767_872),
    "sd3 rms": (sd3_shapes, {"qk_norm": "rms"}, 83, 3_768_640),
    "sd3 ln": (sd3_shapes, {"qk_norm": "ln"}, 95, 3_769_408),
    "sd3 dual": (sd3_shapes, {"qk_norm": "rms", "dual": 2}, 95, 4_287_680),
    "flux dev": (flux_shapes, {"guidance": True}, 84, 4_113_472),
    "flux schnell": (flux_shapes, {}, 80, 4_027_072),
}


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_golden_outputs(case: str, prefix: str, tmp_path: Path) -> None:
    shapes, options, keys, parameters = CASES[case]
    tensors = weights(shapes(**options))
    assert len(tensors) == keys
    model = read(case.split()[0], tensors, tmp_path, prefix)
    assert sum(p.numel() for p in model.parameters()) == parameters
    out = velocity(model)
    mean, deviation, first, last, column = GOLDEN[case]
    got = [out.double().mean(), out.double().std(), *out[0, 0, 0, :4], *out[1, 15, 15, 20:], *out[1, 7, 5:8, 9]]
    np.testing.assert_allclose([float(v) for v in got], [mean, deviation, *first, *last, *column], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_off_the_file(case: str, tmp_path: Path) -> None:
    shapes, options, _, _ = CASES[case]
    model = read(case.split()[0], weights(shapes(**options)), tmp_path)
    spec = model.spec
    assert not model.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert spec.context["latent_channels"] == 16
    assert (spec.context["pooled_dim"], spec.context["token_dim"]) == (48, 96)
    assert (spec.options["width"], spec.options["heads"], spec.options["patch"]) == (192, 3, 2)
    if case.startswith("sd3"):
        assert spec.name == ("mmdit/sd3.5-medium" if options.get("dual") else "mmdit/sd3-medium")
        assert (spec.options["depth"], spec.options["table"], spec.options["dual"]) == (3, 16, options.get("dual", 0))
        assert spec.options["qk_norm"] == options.get("qk_norm", "none")
    else:
        assert spec.name == f"flux/{case.split()[1]}"
        assert spec.options["guidance"] == (3.5 if options else None)
        assert (spec.options["double"], spec.options["single"], list(spec.options["axes"])) == (2, 2, [8, 28, 28])


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_kept_exactly(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    half = {
        name: tensor.to(dtype) for name, tensor in weights(CASES[kind if kind == "sd3" else "flux dev"][0]()).items()
    }
    model = read(kind, half, tmp_path)
    state = model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    name = "layers.1.image.mlp.0.weight" if kind == "sd3" else "joint_layers.1.image.mlp.0.weight"
    published = "joint_blocks.1.x_block.mlp.fc1.weight" if kind == "sd3" else "double_blocks.1.img_mlp.0.weight"
    assert torch.equal(state[name], half[published].float())
    assert sum(t.double().sum() for t in state.values()) == pytest.approx(
        float(sum(t.double().sum() for t in half.values())), abs=1e-6
    )


def test_other_parts_of_a_pipeline_are_left_out(tmp_path: Path) -> None:
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in weights(sd3_shapes()).items()}
    rest = {
        "first_stage_model.encoder.conv_in.weight": torch.zeros(2),
        "text_encoders.clip_l.transformer.text_model.embeddings.position_ids": torch.zeros(1, 77, dtype=torch.long),
    }
    model = read("sd3", tensors | rest, tmp_path)
    assert float(velocity(model)[0, 0, 0, 0]) == pytest.approx(GOLDEN["sd3"][2][0], abs=1e-5)


# ---------------------------------------------------------------------------------------------------- refusals


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_one(name: str, value: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: value}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


ZERO = torch.zeros(3)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("sd3", without("joint_blocks.1.x_block.mlp.fc2.bias"), "1 are missing (joint_blocks.1.x_block.mlp.fc2.bias)"),
        ("sd3", without("final_layer.linear.bias"), "it has no 'final_layer.linear.bias' of 64 rows"),
        ("sd3", without("pos_embed"), "it has no 'pos_embed' of 3 dimensions"),
        ("sd3", with_one("pos_embed", torch.zeros(1, 250, 192)), "its table of positions 250"),
        ("sd3", with_one("joint_blocks.2.x_block.scale", ZERO), "1 are unknown (joint_blocks.2.x_block.scale)"),
        ("sd3", with_one("context_embedder.bias", ZERO), "another shape (context_embedder.bias [3] for [192])"),
        ("sd3", with_one("joint_blocks.1.x_block.attn2.qkv.weight", ZERO), "blocks [1] have a second attention"),
        ("sd3", with_one("pos_embed", torch.zeros(1, 4, 192, dtype=torch.int8)), "pos_embed (torch.int8)"),
        ("sd3", renamed("joint_blocks.", "transformer_blocks."), "layout of the library diffusers"),
        ("sd3", renamed("joint_blocks.", "double_blocks."), "transformer of FLUX (format 'flux')"),
        ("sd3", lambda _: {"a.b": ZERO}, "its keys are like a.b"),
        ("flux", without("vector_in.in_layer.weight"), "it has no matrix 'vector_in.in_layer.weight'"),
        ("flux", without("single_blocks.1.norm.key_norm.scale"), "1 are missing (single_blocks.1.norm.key_norm.scale)"),
        ("flux", with_one("single_blocks.0.norm.scale", ZERO), "1 are unknown (single_blocks.0.norm.scale)"),
        ("flux", with_one("txt_in.bias", ZERO), "another shape (txt_in.bias [3] for [192])"),
        ("flux", with_one("img_in.weight", torch.zeros(192, 128)), "Canny, Depth and Fill, cannot be imported"),
        ("flux", with_one("guidance_in.in_layer.weight", torch.zeros(192, 256)), "3 are missing (guidance_in.in"),
        ("flux", with_one("double_blocks.0.img_attn.norm.query_norm.scale", ZERO), "its heads have 3 channels"),
        ("flux", renamed("double_blocks.", "joint_blocks."), "transformer of Stable Diffusion 3 (format 'sd3')"),
        ("flux", lambda _: {"double_blocks.0.img_attn.lora_A.weight": ZERO}, "it has no matrix 'img_in.weight'"),
        ("flux", lambda _: {"x.lora_A.weight": ZERO}, "looks like a LoRA"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    kind: str, change: Callable[[Tensors], Tensors], message: str, tmp_path: Path
) -> None:
    tensors = weights(sd3_shapes() if kind == "sd3" else flux_shapes())
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read(kind, change(tensors), tmp_path)
    assert "published.safetensors' is not a transformer of " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_parts_beside_the_network_are_refused(tmp_path: Path) -> None:
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in weights(sd3_shapes()).items()}
    with pytest.raises(DataError, match=re.escape("1 tensors beside the network (control.weight)")):
        read("sd3", tensors | {"control.weight": ZERO}, tmp_path)


def test_every_tensor_of_the_file_counts(tmp_path: Path) -> None:
    """Also those that hardly show in the output: each one changed alone changes the model's state."""
    for kind, shapes in (("sd3", sd3_shapes(qk_norm="rms", dual=1)), ("flux", flux_shapes(guidance=True))):
        tensors = {name: torch.full(shape, float(index)) for index, (name, shape) in enumerate(shapes.items())}
        found = {float(tensor.flatten()[0]) for tensor in read(kind, tensors, tmp_path).state_dict().values()}
        assert found == {float(index) for index in range(len(shapes))}

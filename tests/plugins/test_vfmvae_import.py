"""The importer of VFM-VAE's published files: every key, every refusal, and the images that come out.

No published file is at hand. The layout is written down here from its specification, filled by a formula over the names
of the tensors, and run through a second implementation that works on those names.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import underpaint
from underpaint import DataError, Importer, Tokenizer
from underpaint_vfmvae.config import ImporterConfig
from underpaint_vfmvae.importer import LEFT_OUT

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]

ENCODER = {
    "encoder": "tiny/vit@random",
    "options": {"width": 24, "depth": 3, "heads": 2, "patch": 8, "layers": (0, 1, 2)},
}
SMALL: dict[str, Any] = {"channels": 24, "latent": 4, "width": 8, "code": 32, "base": 8, "heads": 4}


# -------------------------------------------------------------------------------------------------- layout


def projection(prefix: str, a: int, b: int) -> Shapes:
    inner = max(a, b)
    shapes: Shapes = {f"{prefix}.{name}": (inner,) for name in ("attn.q_bias", "attn.v_bias", "attn.zero_k_bias")}
    for name, width in (("norm1", a), ("norm3", a), ("norm2", b), ("mlp.norm", b)):
        shapes |= {f"{prefix}.{name}.weight": (width,), f"{prefix}.{name}.bias": (width,)}
    shapes[f"{prefix}.attn.qkv.weight"] = (3 * inner, a)
    for name, out, inputs in (("attn.proj", b, b), ("proj", b, a), ("mlp.w0", 2 * b, b), ("mlp.w1", 2 * b, b)):
        shapes |= {f"{prefix}.{name}.weight": (out, inputs), f"{prefix}.{name}.bias": (out,)}
    return shapes | {f"{prefix}.mlp.w2.weight": (b, 2 * b), f"{prefix}.mlp.w2.bias": (b,)}


def norm(prefix: str, channels: int) -> Shapes:
    return {f"{prefix}.weight": (channels,), f"{prefix}.bias": (channels,)}


def upsample(prefix: str, inputs: int, outputs: int, normed: int, side: int) -> Shapes:
    return {
        **norm(f"{prefix}.norm", normed),
        f"{prefix}.depthwise.weight": (inputs, 1, 3, 3),
        f"{prefix}.pointwise.weight": (4 * outputs, inputs, 1, 1),
        f"{prefix}.blur_weight": (outputs, 1, side, side),
    }


def layer(prefix: str, c: int, code: int, kernel: int, side: int, noise: bool) -> Shapes:
    shapes: Shapes = {
        f"{prefix}.affine_pw1.proj.weight": (3 * c, code),
        f"{prefix}.affine_pw1.proj.bias": (3 * c,),
        f"{prefix}.dwconv.weight": (c, 1, kernel, kernel),
        f"{prefix}.dwconv.bias": (c,),
        **norm(f"{prefix}.norm", c),
        f"{prefix}.pwconv1.weight": (4 * c, c, 1, 1),
        f"{prefix}.pwconv1.bias": (1, 4 * c, 1, 1),
        f"{prefix}.pwconv2.weight": (c, 4 * c, 1, 1),
        f"{prefix}.pwconv2.bias": (c,),
        f"{prefix}.gamma": (1, c, 1, 1),
    }
    return shapes | ({f"{prefix}.noise_const": (side, side), f"{prefix}.noise_strength": ()} if noise else {})


def attention(prefix: str, c: int, heads: int) -> Shapes:
    return {
        f"{prefix}.attn.null_kv": (2, heads, c // heads),
        f"{prefix}.attn.norm.gamma": (c, 1, 1),
        **{f"{prefix}.attn.to_{name}.weight": (c, c, 1, 1) for name in ("q", "k", "v", "out")},
        f"{prefix}.ff.0.gamma": (c, 1, 1),
        f"{prefix}.ff.1.weight": (4 * c, c, 1, 1),
        f"{prefix}.ff.1.bias": (4 * c,),
        f"{prefix}.ff.3.weight": (c, 4 * c, 1, 1),
        f"{prefix}.ff.3.bias": (c,),
    }


def widths(code: int, base: int) -> list[int]:
    return [min(base * 2 ** (5 - i), code) for i in range(6)]


def layout(
    *, channels: int, latent: int, width: int, code: int, base: int, heads: int, noise: bool = True, head: bool = True
) -> Shapes:
    """Keys and shapes outside of the encoder."""
    shapes: Shapes = {}
    for index in range(3):
        shapes |= projection(f"ldm_adapter.patch_quants.{index}.0.blocks.0", channels, width)
    shapes |= projection("ldm_adapter.final_quant.blocks.0", 12 * width, 2 * latent)
    shapes |= projection("ldm_adapter.post_quant.blocks.0", latent, code)
    if head:
        shapes["ldm_adapter.linear_proj.weight"] = (channels, latent, 1, 1)
    shapes["mapping.x_avg"] = (code,)
    for name in ("fc0", "fc1"):
        shapes |= {f"mapping.mlp.{name}.weight": (code, code), f"mapping.mlp.{name}.bias": (code,)}
    copies = (code, code // 2, code // 4, code // 4)
    numbers = ((1, 2), (1, 2), (0, 1), (0, 2))
    for index, (inputs, inner) in enumerate(
        ((16 * code, code), (4 * code, code // 2), (code, code // 4), (code, 4 * (code // 4)))
    ):
        place, (first, second) = f"synthesis.z_convs.{index}", numbers[index]
        shapes |= {f"{place}.{first}.0.weight": (inputs, 1, 3, 3), f"{place}.{first}.1.weight": (inner, inputs, 1, 1)}
        shapes |= norm(f"{place}.{first}.2", inner)
        shapes[f"{place}.{second}.0.weight"] = (copies[index], copies[index], 1, 1)
        shapes |= norm(f"{place}.{second}.1", copies[index])
    outputs = widths(code, base)
    for i, c in enumerate(outputs):
        place, side = f"synthesis.blocks.{i}", 8 * 2**i
        inputs = (outputs[i - 1] if i else 0) + (copies[i] if i < 4 else 0)
        blur = 3 if i < 3 else 5
        shapes |= upsample(f"{place}.seperate_upsample_conv", inputs, c, inputs if i else c, blur)
        if i:
            shapes |= upsample(f"{place}.last_upsample_conv", outputs[i - 1], c, outputs[i - 1], blur)
        for name in ("conv0", *(f"convs1.{j}" for j in range(6 if i < 4 else 4))):
            shapes |= layer(f"{place}.{name}", c, code, 5 if i < 2 else 7, side, noise)
        shapes |= {f"{place}.torgb.weight": (3, c, 1, 1), f"{place}.torgb.bias": (1, 3, 1, 1)}
        shapes |= {f"{place}.torgb.affine.proj.weight": (3 * c, code), f"{place}.torgb.affine.proj.bias": (3 * c,)}
        for j in range(2 if i < 3 else 0):
            shapes |= attention(f"{place}.self_attns.{j}", c, heads)
    return shapes


def encoder_keys() -> list[str]:
    """The 400 keys of the frozen SigLIP 2."""
    keys = [
        "embeddings.patch_embedding.weight",
        "embeddings.patch_embedding.bias",
        "embeddings.position_embedding.weight",
    ]
    for index in range(24):
        modules = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
        modules += ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
        keys += [f"encoder.layers.{index}.{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
    keys += ["post_layernorm.weight", "post_layernorm.bias", "head.probe"]
    keys += ["head.attention.in_proj_weight", "head.attention.in_proj_bias"]
    modules = ["attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2"]
    keys += [f"head.{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
    return [f"vfm_encoder.encoder.vision_model.vision_model.{key}" for key in keys]


BUFFERS = ("zero_k_bias", "blur_weight", "noise_const", "x_avg")


def value(key: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor from its name, of a size that keeps the network's numbers near 1."""
    if key.endswith("zero_k_bias"):
        return torch.zeros(shape)
    if key.endswith("blur_weight"):
        row = {3: [1.0, 2.0, 1.0], 5: [1.0, 4.0, 6.0, 4.0, 1.0]}[shape[-1]]
        kernel = torch.outer(torch.tensor(row), torch.tensor(row)) / sum(row) ** 2
        return kernel.expand(shape).clone()
    draw = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if key.startswith("mapping.mlp"):
        draw = draw * 100
    elif "affine" in key:
        draw = draw + (1.0 if key.endswith("bias") else 0.0)
    elif key.endswith(("gamma", "norm.weight", "norm1.weight", "norm2.weight", "norm3.weight")):
        draw = 1 + 0.2 * draw
    elif len(shape) > 1 and "noise_const" not in key:
        draw = draw / math.sqrt(math.prod(shape[1:]))
    elif key.endswith("bias"):
        draw = 0.2 * draw
    return torch.tensor(draw, dtype=torch.float32)


def state(**options: Any) -> State:
    made = {key: value(key, shape) for key, shape in layout(**{**SMALL, **options}).items()}
    return made | {key: torch.zeros(1) for key in encoder_keys()}


@pytest.fixture(scope="module")
def published() -> State:
    return state()


def write(folder: Path, content: Any) -> str:
    torch.save(content, folder / "published.pth")
    return str(folder / "published.pth")


def importer(**options: Any) -> Importer:
    return underpaint.create("importer", "vfm-vae", **{**ENCODER, **options})


def read(folder: Path, content: Any, **options: Any) -> Tokenizer:
    model = importer(**options).read(write(folder, content))
    assert isinstance(model, Tokenizer)
    return model


# --------------------------------------------------------------------------------- a second implementation


class Second:
    """The network of the specification, in float64, on the names of the file."""

    def __init__(self, tensors: State) -> None:
        self.w = {key: tensor.double() for key, tensor in tensors.items() if not key.startswith("vfm_encoder")}

    def project(self, x: Tensor, p: str) -> Tensor:
        a, b = self.w[f"{p}.norm1.weight"].numel(), self.w[f"{p}.norm2.weight"].numel()
        heads, inner = max(a, b) // min(a, b), max(a, b)
        bias = torch.cat([self.w[f"{p}.attn.{name}_bias"] for name in ("q", "zero_k", "v")])
        q, k, v = (self.layer_norm(x, f"{p}.norm1") @ self.w[f"{p}.attn.qkv.weight"].T + bias).split(inner, dim=-1)
        parts = []
        for n in range(heads):
            s = slice(n * inner // heads, (n + 1) * inner // heads)
            scores = q[..., s] @ k[..., s].transpose(1, 2) * (inner // heads) ** -0.5
            parts.append(scores.softmax(-1) @ v[..., s])
        mixed = torch.stack(parts).mean(0) if a > b else torch.cat(parts, dim=-1)
        y = self.linear(self.layer_norm(x, f"{p}.norm3"), f"{p}.proj") + self.linear(mixed, f"{p}.attn.proj")
        inside = self.layer_norm(self.layer_norm(y, f"{p}.norm2"), f"{p}.mlp.norm", 1e-6)
        gate = F.gelu(self.linear(inside, f"{p}.mlp.w0"), approximate="tanh") * self.linear(inside, f"{p}.mlp.w1")
        return y + self.linear(gate, f"{p}.mlp.w2")

    def layer_norm(self, x: Tensor, p: str, eps: float = 1e-5) -> Tensor:
        unit = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return unit * self.w[f"{p}.weight"] + self.w[f"{p}.bias"]

    def linear(self, x: Tensor, p: str) -> Tensor:
        return x @ self.w[f"{p}.weight"].T + self.w[f"{p}.bias"]

    def posterior(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        rows, columns = maps[0].shape[-2:]
        tokens = [m.double().flatten(2).transpose(1, 2) for m in maps]
        found = [self.project(t, f"ldm_adapter.patch_quants.{i}.0.blocks.0") for i, t in enumerate(tokens)]
        grids = [F.pixel_unshuffle(t.transpose(1, 2).unflatten(2, (rows, columns)), 2) for t in found]
        joined = torch.cat(grids, dim=1).flatten(2).transpose(1, 2)
        moments = self.project(joined, "ldm_adapter.final_quant.blocks.0").transpose(1, 2)
        mean, logvar = moments.unflatten(2, (rows // 2, columns // 2)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def group_norm(self, x: Tensor, p: str) -> Tensor:
        # 32 groups in the published widths; the small file of this test has groups of four channels.
        return F.group_norm(x, min(32, x.shape[1] // 4), self.w[f"{p}.weight"], self.w[f"{p}.bias"], eps=1e-5)

    def upsample(self, x: Tensor, p: str, first: bool) -> Tensor:
        x = x if first else self.group_norm(x, f"{p}.norm")
        x = F.conv2d(x, self.w[f"{p}.depthwise.weight"], padding=1, groups=x.shape[1])
        x = F.pixel_shuffle(F.conv2d(x, self.w[f"{p}.pointwise.weight"]), 2)
        x = self.group_norm(x, f"{p}.norm") if first else x
        blur = self.w[f"{p}.blur_weight"]
        reach = blur.shape[-1] // 2
        return F.conv2d(F.pad(x, (reach,) * 4, mode="replicate"), blur, groups=x.shape[1])

    def style(self, w: Tensor, p: str) -> Tensor:
        weight = self.w[f"{p}.proj.weight"]
        a, b, c = (w @ weight.T / math.sqrt(weight.shape[1]) + self.w[f"{p}.proj.bias"]).chunk(3, dim=1)
        return a * b + c

    def noise(self, p: str, height: int, width: int) -> Tensor:
        made = self.w[f"{p}.noise_const"].numpy()
        for axis, size in enumerate((height, width)):
            known = np.arange(made.shape[axis]) + 0.5
            wanted = (np.arange(size) + 0.5) * made.shape[axis] / size
            made = np.apply_along_axis(
                lambda row, known=known, wanted=wanted: np.interp(wanted, known, row), axis, made
            )
        return torch.from_numpy(made) * self.w[f"{p}.noise_strength"]

    def convnext(self, x: Tensor, w: Tensor, p: str) -> Tensor:
        kernel = self.w[f"{p}.dwconv.weight"]
        y = F.conv2d(x, kernel, self.w[f"{p}.dwconv.bias"], padding=kernel.shape[-1] // 2, groups=x.shape[1])
        if f"{p}.noise_const" in self.w:
            y = y + self.noise(p, *y.shape[-2:])
        y = self.group_norm(y, f"{p}.norm")
        outputs = []
        for sample, factors in zip(y, self.style(w, f"{p}.affine_pw1"), strict=True):
            rows = self.w[f"{p}.pwconv1.weight"][:, :, 0, 0] * factors
            rows = rows / (rows.square().sum(1, keepdim=True) + 1e-8).sqrt()
            outputs.append(torch.einsum("oi,ihw->ohw", rows, sample))
        y = F.gelu(torch.stack(outputs) + self.w[f"{p}.pwconv1.bias"])
        y = F.conv2d(y, self.w[f"{p}.pwconv2.weight"], self.w[f"{p}.pwconv2.bias"])
        return x + self.w[f"{p}.gamma"] * y

    def channel_norm(self, x: Tensor, p: str) -> Tensor:
        return x / x.norm(dim=1, keepdim=True) * math.sqrt(x.shape[1]) * self.w[p]

    def attend(self, x: Tensor, p: str) -> Tensor:
        null = self.w[f"{p}.attn.null_kv"]
        normed = self.channel_norm(x, f"{p}.attn.norm.gamma")
        q, k, v = (F.conv2d(normed, self.w[f"{p}.attn.to_{name}.weight"]).flatten(2) for name in "qkv")
        parts = []
        for head, (q_h, k_h, v_h) in enumerate(zip(*(t.chunk(null.shape[1], dim=1) for t in (q, k, v)), strict=True)):
            keys, values = (
                torch.cat((null[i, head].expand(len(x), 1, -1).transpose(1, 2), t), dim=2)
                for i, t in enumerate((k_h, v_h))
            )
            scores = q_h.transpose(1, 2) @ keys * q_h.shape[1] ** -0.5
            parts.append((scores.softmax(-1) @ values.transpose(1, 2)).transpose(1, 2))
        x = x + F.conv2d(torch.cat(parts, dim=1).view_as(x), self.w[f"{p}.attn.to_out.weight"])
        inner = F.conv2d(self.channel_norm(x, f"{p}.ff.0.gamma"), self.w[f"{p}.ff.1.weight"], self.w[f"{p}.ff.1.bias"])
        return x + F.conv2d(F.gelu(inner), self.w[f"{p}.ff.3.weight"], self.w[f"{p}.ff.3.bias"])

    def fused(self, u: Tensor, index: int) -> Tensor:
        p = f"synthesis.z_convs.{index}"
        first, second = ((1, 2), (1, 2), (0, 1), (0, 2))[index]
        x = F.pixel_unshuffle(u, (4, 2, 1, 1)[index])
        x = F.conv2d(x, self.w[f"{p}.{first}.0.weight"], padding=1, groups=x.shape[1])
        x = self.group_norm(F.conv2d(x, self.w[f"{p}.{first}.1.weight"]), f"{p}.{first}.2")
        x = torch.where(x > 0, x, 0.2 * x)
        x = F.pixel_shuffle(x, 2) if index == 3 else x
        return self.group_norm(F.conv2d(x, self.w[f"{p}.{second}.0.weight"]), f"{p}.{second}.1")

    def decode(self, z: Tensor) -> list[Tensor]:
        tokens = self.project(z.flatten(2).transpose(1, 2), "ldm_adapter.post_quant.blocks.0")
        code = tokens.mean(1)
        w = code / (code.square().mean(1, keepdim=True) + 1e-8).sqrt()
        for name in ("fc0", "fc1"):
            weight = self.w[f"mapping.mlp.{name}.weight"] * 0.01 / math.sqrt(w.shape[1])
            w = w @ weight.T + self.w[f"mapping.mlp.{name}.bias"] * 0.01
            w = torch.where(w > 0, w, 0.2 * w) if name == "fc0" else w
        u = tokens.transpose(1, 2).unflatten(2, z.shape[-2:])
        images: list[Tensor] = []
        x = total = torch.empty(0)
        for i in range(6):
            p = f"synthesis.blocks.{i}"
            parts = ([x] if i else []) + ([self.fused(u, i)] if i < 4 else [])
            x = self.upsample(torch.cat(parts, dim=1), f"{p}.seperate_upsample_conv", first=i == 0)
            for name in ("conv0", *(f"convs1.{j}" for j in range(6 if i < 4 else 4))):
                x = self.convnext(x, w, f"{p}.{name}")
            for j in range(2 if i < 3 else 0):
                x = self.attend(x, f"{p}.self_attns.{j}")
            total = x + self.upsample(total, f"{p}.last_upsample_conv", first=False) if i else x
            style = self.style(w, f"{p}.torgb.affine") / math.sqrt(x.shape[1])
            rows = self.w[f"{p}.torgb.weight"][None, :, :, 0, 0] * style[:, None]
            images.append(torch.einsum("boi,bihw->bohw", rows, total) + self.w[f"{p}.torgb.bias"])
        return images


# --------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(
    ("options", "keys"), [({}, 783), ({"head": False}, 782), ({"head": False, "noise": False}, 706)]
)
def test_layout_of_this_test_is_the_published_one(options: dict[str, bool], keys: int) -> None:
    shapes = layout(channels=1024, latent=32, width=64, code=512, base=128, heads=8, **options)
    assert len(shapes) == keys
    learned = sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith(BUFFERS))
    scalars = 38 if options.get("noise", True) else 0
    assert learned == 139_737_874 + scalars + (32_768 if options.get("head", True) else 0)
    assert len(encoder_keys()) == 400
    assert shapes["ldm_adapter.final_quant.blocks.0.attn.qkv.weight"] == (2304, 768)
    assert shapes["synthesis.z_convs.0.1.1.weight"] == (512, 8192, 1, 1)


def test_images_and_latents_are_those_of_a_second_implementation(published: State, tmp_path: Path) -> None:
    """On an oblong image; the noise maps are shrunk."""
    tokenizer = read(tmp_path, published).double()
    second = Second(published)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 64, 128, generator=generator, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        features = tokenizer.encoder(images)
        posterior = tokenizer.posterior(images)
        mean, logvar = second.posterior(features.maps)
        torch.testing.assert_close(posterior.mean, mean, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(posterior.logvar, logvar, rtol=1e-9, atol=1e-10)
        expected = second.decode(mean)
        result = tokenizer.decoder(mean)
    assert float(expected[-1].std()) > 0.1
    for got, wanted in zip((*result.pyramid, result.image), expected, strict=True):
        # Folded noise maps are products in float32.
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_training_file_gives_its_averaged_generator(published: State, tmp_path: Path) -> None:
    bare = read(tmp_path, published)
    training = {"G": {"x": torch.zeros(1)}, "D": {}, "G_ema": published, "training_set_kwargs": {"path": "x"}}
    whole = read(tmp_path, training)
    assert bare.fingerprint() == whole.fingerprint()
    for name, tensor in bare.decoder.state_dict().items():
        assert torch.equal(tensor, whole.decoder.state_dict()[name])


def test_noise_may_be_folded_kept_or_absent(published: State, tmp_path: Path) -> None:
    folded, kept, without = (
        read(tmp_path, content, noise=noise).requires_grad_(False)
        for content, noise in ((published, "fold"), (published, "keep"), (state(noise=False, head=False), "fold"))
    )
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(folded.decode(z), kept.decode(z))
    factors = [name for name, _ in kept.decoder.named_parameters() if name.endswith("noise.strength")]
    assert len(factors) == 38
    assert not [name for name, _ in folded.decoder.named_parameters() if "noise" in name]
    assert sum(name.endswith("noise.map") for name in folded.decoder.state_dict()) == 38
    assert not [name for name in without.decoder.state_dict() if "noise" in name]
    assert float((without.decode(z) - folded.decode(z)).abs().max()) > 0.01


def test_what_is_made_can_be_saved_and_used(published: State, tmp_path: Path) -> None:
    tokenizer = read(tmp_path, published)
    assert not tokenizer.training
    assert tokenizer.statistics is None
    assert tokenizer.stride == 16
    assert tokenizer.grid(64, 128) == (4, 8)
    assert list(tokenizer.decoder.spec.options["depths"]) == [7, 5]
    assert tokenizer.adapter.spec.context["latent_channels"] == 4
    assert len(tokenizer.fingerprint()) == 32
    assert "research use only" in " ".join(tokenizer.about["facts"])


def test_every_tensor_is_taken_or_left_out_with_a_reason(published: State, tmp_path: Path) -> None:
    assert all(LEFT_OUT.values())
    tokenizer = read(tmp_path, published, noise="keep")

    def values(tensors: Iterable[Tensor]) -> list[bytes]:
        return sorted(tensor.detach().numpy().tobytes() for tensor in tensors)

    taken = [t for part in (tokenizer.adapter, tokenizer.decoder) for t in part.state_dict().values()]
    left = {key for key in published if key.endswith(("zero_k_bias", "blur_weight", "x_avg", "linear_proj.weight"))}
    left |= set(encoder_keys())
    assert values(taken) == values(tensor for key, tensor in published.items() if key not in left)


def without(given: State, *keys: str) -> State:
    return {key: tensor for key, tensor in given.items() if key not in keys}


BLUR = "synthesis.blocks.4.last_upsample_conv.blur_weight"
KEYS = "ldm_adapter.post_quant.blocks.0.attn.zero_k_bias"
GAMMA = "synthesis.blocks.2.convs1.3.gamma"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: without(s, GAMMA),
            f"lacks '{GAMMA}'; it holds .* tensors under 'ldm_adapter', 'mapping', 'synthesis'",
        ),
        (lambda s: without(s, "mapping.mlp.fc1.bias", GAMMA), f"lacks 'mapping.mlp.fc1.bias', '{GAMMA}'"),
        (
            lambda s: without(s, "synthesis.blocks.3.convs1.5.noise_strength"),
            "lacks 'synthesis.blocks.3.convs1.5.noise",
        ),
        (lambda s: {**s, "synthesis.blocks.3.extra": torch.zeros(1)}, "has 'synthesis.blocks.3.extra', which this"),
        (lambda s: {**s, "D.head": torch.zeros(1)}, "has 'D.head', which this layout does not know"),
        (lambda s: {**s, GAMMA: torch.zeros(1, 31, 1, 1)}, r"shape \[1, 31, 1, 1\]"),
        (lambda s: {**s, KEYS: torch.ones(32)}, f"'{KEYS}' .* is not the constant"),
        (lambda s: {**s, BLUR: s[BLUR].flip(2) * 1.1}, f"'{BLUR}' .* is not the constant"),
        (lambda s: {"model.conv.weight": torch.zeros(1)}, "lacks 'ldm_adapter.* it holds 1 tensors under 'model'"),
        (lambda s: {}, "it is empty"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("synthesis")}, "lacks 'synthesis.blocks.0"),
    ],
)
def test_files_of_another_layout_are_refused(published: State, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, change(published))


def test_another_encoder_is_refused(published: State, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(ENCODER["options"])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"takes maps of 24, 24, 24 channels, .* gives 24, 24; set the importer's"):
        read(tmp_path, published, options={**options, "layers": (1, 2)})
    with pytest.raises(DataError, match="stride of 16 px, and its adapter merges 2×2 .* stride 8, .* is 4"):
        read(tmp_path, published, options={**options, "patch": 4})


PATCHES = "vfm_encoder.encoder.vision_model.vision_model.embeddings.patch_embedding.weight"


def test_the_files_copy_of_the_encoder_must_be_the_encoder(published: State, tmp_path: Path) -> None:
    torch.manual_seed(5)
    encoder = underpaint.create("encoder", ENCODER["encoder"], **ENCODER["options"])  # type: ignore[arg-type]
    kernel = next(p for p in encoder.parameters() if p.ndim == 4).detach()
    for copy in (kernel, kernel.half(), kernel.bfloat16()):
        torch.manual_seed(5)
        read(tmp_path, {**published, PATCHES: copy})
    with pytest.raises(
        DataError, match=rf"no weights of the shape \[24, 3, 14, 14\], that of '{PATCHES}'; set the imp"
    ):
        read(tmp_path, {**published, PATCHES: torch.zeros(24, 3, 14, 14)})
    with pytest.raises(DataError, match=f"'{PATCHES}' has other values than its weights; set the importer's options"):
        read(tmp_path, {**published, PATCHES: torch.randn(kernel.shape)})


def test_the_tokenizer_says_what_was_left_out(published: State, tmp_path: Path) -> None:
    facts = read(tmp_path, published).about["facts"]
    assert "Noise maps: multiplied by their factors, and fixed." in facts
    left = [fact for fact in facts if fact.startswith("Left out: ")]
    assert [int(fact.split()[2]) for fact in left] == [400, 1, 1, 5, 11]
    assert "(the frozen encoder, which is read from its own source)" in left[0]
    kept = read(tmp_path, published, noise="keep").about["facts"]
    assert "Noise maps: kept with their factors, which can be trained." in kept


def test_the_default_encoder_is_the_published_one() -> None:
    config = ImporterConfig()
    assert config.encoder == "timm/vit_large_patch16_siglip_512@v2_webli"
    assert config.options["stride"] == 8
    assert config.options["layers"] == [11, 23]

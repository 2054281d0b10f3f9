"""Published autoencoders: the same numbers as their own code gives, and nothing lost or guessed.

The expected numbers were recorded from the original code in float64: CompVis latent-diffusion (VA-VAE's copy of it in
LightningDiT gives the same ones), FLUX, diffusers 0.42.1. Every tensor was filled by `formula` from its original name,
images and latents too.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import underpaint
from underpaint import ConfigError, DataError, Importer, Posterior, Tokenizer

Keys = dict[str, tuple[int, ...]]


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """A wave of float64 that depends on the name: weights keep the variance, norms stay near 1, biases small."""
    seed = zlib.crc32(name.encode())
    wave = np.sin(np.arange(1, math.prod(shape) + 1, dtype=np.float64) * (1 + seed % 997 / 997) + seed % 6283 / 1000)
    wave = wave.reshape(shape)
    if name not in ("images", "latents"):
        if len(shape) > 1:
            wave = wave * math.sqrt(2 / math.prod(shape[1:]))
        else:
            wave = 1 + 0.2 * wave if name.endswith("weight") else 0.1 * wave
    return torch.tensor(wave, dtype=torch.float32)


def filled(keys: Keys) -> dict[str, Tensor]:
    return {name: formula(name, shape) for name, shape in keys.items()}


# ------------------------------------------------------------------------------ names of the originals, written out


def layer(name: str, weight: tuple[int, ...]) -> Keys:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def residual(name: str, inputs: int, outputs: int, skip: str) -> Keys:
    keys = layer(f"{name}.norm1", (inputs,)) | layer(f"{name}.conv1", (outputs, inputs, 3, 3))
    keys |= layer(f"{name}.norm2", (outputs,)) | layer(f"{name}.conv2", (outputs, outputs, 3, 3))
    return keys | (layer(f"{name}.{skip}", (outputs, inputs, 1, 1)) if inputs != outputs else {})


def ends(d: int, first: int, last: int, norm: str, quant: bool) -> Keys:
    keys = layer("encoder.conv_in", (first, 3, 3, 3)) | layer("decoder.conv_in", (last, d, 3, 3))
    keys |= layer(f"encoder.{norm}", (last,)) | layer(f"decoder.{norm}", (first,))
    keys |= layer("encoder.conv_out", (2 * d, last, 3, 3)) | layer("decoder.conv_out", (3, first, 3, 3))
    if quant:
        keys |= layer("quant_conv", (2 * d, 2 * d, 1, 1)) | layer("post_quant_conv", (d, d, 1, 1))
    return keys


def ldm_keys(
    d: int = 4, widths: tuple[int, ...] = (32, 32, 64), blocks: int = 2, attention: bool = True, quant: bool = True
) -> Keys:
    keys = ends(d, widths[0], widths[-1], "norm_out", quant)

    def attend(name: str, width: int) -> Keys:
        found = layer(f"{name}.norm", (width,))
        for leaf in ("q", "k", "v", "proj_out"):
            found |= layer(f"{name}.{leaf}", (width, width, 1, 1))
        return found

    deep = len(widths) - 1
    channels = widths[0]
    for level, width in enumerate(widths):
        for block in range(blocks):
            keys |= residual(f"encoder.down.{level}.block.{block}", channels, width, "nin_shortcut")
            channels = width
        if level < deep:
            keys |= layer(f"encoder.down.{level}.downsample.conv", (width, width, 3, 3))
    for level in range(deep, -1, -1):
        for block in range(blocks + 1):
            keys |= residual(f"decoder.up.{level}.block.{block}", channels, widths[level], "nin_shortcut")
            channels = widths[level]
        if level:
            keys |= layer(f"decoder.up.{level}.upsample.conv", (channels, channels, 3, 3))
    for side in ("encoder", "decoder"):
        keys |= residual(f"{side}.mid.block_1", widths[-1], widths[-1], "") | attend(f"{side}.mid.attn_1", widths[-1])
        keys |= residual(f"{side}.mid.block_2", widths[-1], widths[-1], "")
    if attention:
        for block in range(blocks):
            keys |= attend(f"encoder.down.{deep}.attn.{block}", widths[-1])
        for block in range(blocks + 1):
            keys |= attend(f"decoder.up.{deep}.attn.{block}", widths[-1])
    return keys


def diffusers_keys(d: int = 4, *, attention: bool, quant: bool, legacy: bool = False) -> Keys:
    widths, blocks = (32, 32, 64), 2
    keys = ends(d, 32, 64, "conv_norm_out", quant)

    def attend(name: str) -> Keys:
        found = layer(f"{name}.group_norm", (64,))
        for leaf in ("query", "key", "value", "proj_attn") if legacy else ("to_q", "to_k", "to_v", "to_out.0"):
            found |= layer(f"{name}.{leaf}", (64, 64))
        return found

    channels = 32
    for level, width in enumerate(widths):
        for block in range(blocks):
            keys |= residual(f"encoder.down_blocks.{level}.resnets.{block}", channels, width, "conv_shortcut")
            channels = width
        if level < 2:
            keys |= layer(f"encoder.down_blocks.{level}.downsamplers.0.conv", (width, width, 3, 3))
    for order, width in enumerate(reversed(widths)):
        for block in range(blocks + 1):
            keys |= residual(f"decoder.up_blocks.{order}.resnets.{block}", channels, width, "conv_shortcut")
            channels = width
        if order < 2:
            keys |= layer(f"decoder.up_blocks.{order}.upsamplers.0.conv", (width, width, 3, 3))
    for side in ("encoder", "decoder"):
        keys |= residual(f"{side}.mid_block.resnets.0", 64, 64, "") | residual(
            f"{side}.mid_block.resnets.1", 64, 64, ""
        )
        keys |= attend(f"{side}.mid_block.attentions.0")
    if attention:
        for block in range(blocks):
            keys |= attend(f"encoder.down_blocks.2.attentions.{block}")
        for block in range(blocks + 1):
            keys |= attend(f"decoder.up_blocks.0.attentions.{block}")
    return keys


CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.42.1",
    "act_fn": "silu",
    "block_out_channels": [32, 32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "force_upcast": True,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 16,
    "sample_size": 16,
    "scaling_factor": 0.13025,
}
ATTENTIVE = {
    **CONFIG,
    "down_block_types": ["DownEncoderBlock2D"] * 2 + ["AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}


def save(state: dict[str, Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3, "global_step": 7}, path)
    return str(path)


def folder(path: Path, config: dict[str, Any], keys: Keys) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(filled(keys), path / "diffusion_pytorch_model.safetensors")
    return str(path)


def read(form: str, source: str, **options: Any) -> Tokenizer:
    importer = underpaint.create("importer", form, **options)
    assert isinstance(importer, Importer)
    tokenizer = importer.read(source)
    assert isinstance(tokenizer, Tokenizer)
    assert not tokenizer.training
    return tokenizer


# ------------------------------------------------------------------------------ parity with the original code

IMAGES = formula("images", (2, 3, 24, 16)).double()


def agrees(tensor: Tensor, shape: tuple[int, ...], values: list[float], mean: float, std: float) -> None:
    """Compare six values, evenly spaced from the first to the last, and two moments of all."""
    assert tuple(tensor.shape) == shape
    flat = tensor.detach().flatten().double()
    places = [int(place) for place in torch.linspace(0, len(flat) - 1, 6)]
    torch.testing.assert_close(flat[places].tolist(), values, rtol=0, atol=1e-8)
    torch.testing.assert_close([float(flat.mean()), float(flat.std(correction=0))], [mean, std], rtol=0, atol=1e-8)


def moments(posterior: Posterior) -> Tensor:
    assert posterior.logvar is not None
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


@torch.no_grad()
def test_ldm_without_attention_gives_the_numbers_of_its_code(tmp_path: Path) -> None:
    tokenizer = read("ldm", save(filled(ldm_keys(attention=False)), tmp_path / "model.ckpt")).double()
    agrees(
        moments(tokenizer.posterior(IMAGES)),
        (2, 8, 6, 4),
        [0.0779762381, -0.3261768622, 0.1148392401, 0.3365131116, -0.1461160378, -0.1221850718],
        0.03202562587,
        0.20000865629,
    )
    agrees(
        tokenizer.decoder(formula("latents", (2, 4, 6, 4)).double()).image,
        (2, 3, 24, 16),
        [-0.0610763059, 0.4784720719, -0.1036930201, 0.0447742607, 0.0913954326, -0.0424161732],
        0.00989152141,
        0.29809855641,
    )


@torch.no_grad()
def test_ldm_with_attention_gives_the_numbers_of_its_code(tmp_path: Path) -> None:
    tokenizer = read("ldm", save(filled(ldm_keys()), tmp_path / "model.safetensors")).double()
    agrees(
        moments(tokenizer.posterior(IMAGES)),
        (2, 8, 6, 4),
        [-0.033276695, -0.4005289324, 0.2183373278, 0.1925351972, -0.0524752813, -0.0986004569],
        0.03272548758,
        0.22498992615,
    )
    agrees(
        tokenizer.decoder(formula("latents", (2, 4, 6, 4)).double()).image,
        (2, 3, 24, 16),
        [-0.0497355516, 0.5670928866, -0.0596387619, 0.1014767093, 0.0646725053, -0.0419929999],
        0.00990115554,
        0.29762643323,
    )


@torch.no_grad()
def test_flux_gives_the_numbers_of_its_code(tmp_path: Path) -> None:
    """FLUX's ``encode`` shifts and scales what it returns, and its ``decode`` undoes that first."""
    keys = ldm_keys(16, attention=False, quant=False)
    tokenizer = read("flux-vae", save(filled(keys), tmp_path / "ae.safetensors")).double()
    agrees(
        moments(tokenizer.posterior(IMAGES)),
        (2, 32, 6, 4),
        [-0.115724957, 0.0115521495, -0.0400326825, -0.1261074677, 0.1392878755, -0.0659975146],
        -0.00334045667,
        0.08929886662,
    )
    agrees(
        tokenizer.standardise(tokenizer.encode(IMAGES)),
        (2, 16, 6, 4),
        [-0.083639772, -0.0335114017, -0.0139704604, -0.0804479545, -0.0455042631, -0.0371409861],
        -0.04299103574,
        0.03230063782,
    )
    agrees(
        tokenizer.decoder(tokenizer.restore(formula("latents", (2, 16, 6, 4)).double())).image,
        (2, 3, 24, 16),
        [-0.0467916614, 0.6581307712, -0.0419680343, 0.4910202531, 0.1230371041, 0.1691537925],
        0.00999990613,
        0.32078524311,
    )


DIFFUSERS_PLAIN = (
    [-0.0357060733, -0.3153657512, 0.3142680189, 0.8419139169, -0.4642408744, -0.1739764512],
    (0.03362141933, 0.42775651342),
    [-0.0045780281, 0.327108207, -0.1310446519, -0.4182833985, 0.3305387714, -0.0860559373],
    (0.00773702478, 0.29521382903),
)
DIFFUSERS_ATTENTIVE = (
    [-0.2205876108, -0.59733056, -0.6520813357, -0.2732966544, 0.0014275573, -0.0648700309],
    (-0.01529012484, 0.30214326234),
    [0.0157030775, 0.1676924864, 0.0524609846, -0.277001152, -0.0277681254, -0.1218930163],
    (0.00817631554, 0.3019913072),
)


@pytest.mark.parametrize(
    ("config", "keys", "expected"),
    [
        (CONFIG, diffusers_keys(attention=False, quant=True), DIFFUSERS_PLAIN),
        (ATTENTIVE, diffusers_keys(attention=True, quant=False), DIFFUSERS_ATTENTIVE),
    ],
    ids=["like SDXL", "like SD3, with attention"],
)
@torch.no_grad()
def test_diffusers_gives_the_numbers_of_its_code(
    tmp_path: Path, config: dict[str, Any], keys: Keys, expected: Any
) -> None:
    tokenizer = read("diffusers", folder(tmp_path / "vae", config, keys)).double()
    encoded, encoded_moments, decoded, decoded_moments = expected
    agrees(moments(tokenizer.posterior(IMAGES)), (2, 8, 6, 4), encoded, *encoded_moments)
    image = tokenizer.decoder(formula("latents", (2, 4, 6, 4)).double()).image
    agrees(image, (2, 3, 24, 16), decoded, *decoded_moments)


@torch.no_grad()
def test_diffusers_first_names_of_attention_mean_the_same(tmp_path: Path) -> None:
    new, old = diffusers_keys(attention=True, quant=False), diffusers_keys(attention=True, quant=False, legacy=True)
    # The same values under both names; both lists are in one order.
    values = dict(zip(old, filled(new).values(), strict=True))
    first = read("diffusers", folder(tmp_path / "new", ATTENTIVE, new))
    path = folder(tmp_path / "old", ATTENTIVE, old)
    save_file(values, Path(path) / "diffusion_pytorch_model.safetensors")
    second = read("diffusers", path)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


# ------------------------------------------------------------------------------ whole sizes


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (ldm_keys(4, (128, 256, 512, 512), attention=False), 83_653_863),  # Stable Diffusion
        (ldm_keys(32, (128, 128, 256, 256, 512)), 69_836_067),  # VA-VAE, counted on its code
        (ldm_keys(16, (128, 256, 512, 512), attention=False, quant=False), 83_819_683),  # FLUX, counted on its code
    ],
)
def test_written_out_names_have_the_published_sizes(keys: Keys, expected: int) -> None:
    assert sum(math.prod(shape) for shape in keys.values()) == expected


@pytest.mark.slow
def test_stable_diffusions_vae_is_read_in_full_size_and_half_precision(tmp_path: Path) -> None:
    keys = ldm_keys(4, (128, 256, 512, 512), attention=False)
    state = {name: torch.full(shape, 0.25, dtype=torch.float16) for name, shape in keys.items()}
    tokenizer = read("ldm", save(state, tmp_path / "vae.safetensors"))
    assert (tokenizer.latent_channels, tokenizer.stride) == (4, 8)
    assert sum(p.numel() for p in tokenizer.parameters()) == 83_653_863
    assert all(p.dtype == torch.float32 and bool((p == 0.25).all()) for p in tokenizer.parameters())


# ------------------------------------------------------------------------------ what is around the weights


def test_first_stage_is_taken_out_of_a_whole_diffusion_model(tmp_path: Path) -> None:
    weights = filled(ldm_keys())
    state = {f"first_stage_model.{key}": value for key, value in weights.items()}
    state |= {"model.diffusion_model.out.0.weight": torch.ones(3), "scale_factor": torch.tensor(0.5)}
    state |= {"first_stage_model.loss.logvar": torch.zeros(())}
    alone, within = (read("ldm", save(s, tmp_path / f"{i}.ckpt")) for i, s in enumerate((weights, state)))
    for name, value in alone.state_dict().items():
        assert torch.equal(value, within.state_dict()[name]), name
    assert within.about["facts"] == [
        "Imported as 'ldm' from '1.ckpt', whose licence holds for the weights.",
        "1 tensor(s) left out: critic, perceptual network and other parts of the training loss.",
        "2 tensor(s) left out: the diffusion model around the autoencoder.",
    ]
    assert within.statistics is not None
    assert within.statistics.std == (2.0,) * 4
    assert "scale_factor of the file" in within.statistics.data
    assert alone.statistics is None  # stride 4: nothing says what its scale is


def test_stable_diffusions_scale_is_taken_for_its_shape_alone(tmp_path: Path) -> None:
    small = (32, 32, 32, 64)
    own = save(filled(ldm_keys(widths=small, blocks=1, attention=False)), tmp_path / "sd.ckpt")
    statistics = read("ldm", own).statistics
    assert statistics is not None
    assert (statistics.mean, statistics.count) == ((0.0,) * 4, 0)
    assert statistics.std == pytest.approx((1 / 0.18215,) * 4)
    assert "0.18215" in statistics.data
    other = save(filled(ldm_keys(8, widths=small, blocks=1, attention=False)), tmp_path / "other.ckpt")
    assert read("ldm", other).statistics is None


def test_options_give_the_scale(tmp_path: Path) -> None:
    source = save(filled(ldm_keys()), tmp_path / "model.ckpt")
    tokenizer = read("ldm", source, scale=0.13025, shift=0.5)
    latents = torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(tokenizer.standardise(latents), (latents - 0.5) * 0.13025)
    with pytest.raises(ConfigError, match="shift is 0.5 without a scale"):
        read("ldm", source, shift=0.5)


@pytest.mark.parametrize("value", [torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(2)])
def test_a_scale_factor_that_is_none_is_refused(tmp_path: Path, value: Tensor) -> None:
    state = {f"first_stage_model.{key}": item for key, item in filled(ldm_keys()).items()}
    with pytest.raises(DataError, match="'scale_factor' in .* is no positive number"):
        read("ldm", save({**state, "scale_factor": value}, tmp_path / "model.ckpt"))


def test_flux_scale_and_shift_are_options_with_the_published_defaults(tmp_path: Path) -> None:
    source = save(filled(ldm_keys(16, attention=False, quant=False)), tmp_path / "ae.safetensors")
    latents = torch.randn(1, 16, 2, 2)
    torch.testing.assert_close(read("flux-vae", source).standardise(latents), (latents - 0.1159) * 0.3611)
    other = read("flux-vae", source, scale=1.5305, shift=0.0609)
    torch.testing.assert_close(other.standardise(latents), (latents - 0.0609) * 1.5305)
    # The same file as 'ldm', for models such as Stable Diffusion 3: no scale is guessed.
    assert read("ldm", source).statistics is None


def test_diffusers_config_gives_the_scale(tmp_path: Path) -> None:
    keys = diffusers_keys(attention=True, quant=False)
    latents = torch.randn(1, 4, 2, 2)
    tokenizer = read("diffusers", folder(tmp_path / "vae", ATTENTIVE, keys))
    torch.testing.assert_close(tokenizer.standardise(latents), (latents - 0.0609) * 1.5305)
    # Pipelines standardise by these before they scale.
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    both = {**ATTENTIVE, "shift_factor": None, "latents_mean": mean, "latents_std": std}
    expected = (latents - torch.tensor(mean).view(1, 4, 1, 1)) * 1.5305 / torch.tensor(std).view(1, 4, 1, 1)
    torch.testing.assert_close(read("diffusers", folder(tmp_path / "vae", both, keys)).standardise(latents), expected)


def va_vae(extra: dict[str, Tensor] | None = None, widths: tuple[int, ...] = (32,) * 5) -> dict[str, Tensor]:
    return {**filled(ldm_keys(widths=widths, blocks=1)), **(extra or {})}


def test_va_vae_leaves_out_what_aligned_it(tmp_path: Path) -> None:
    extra = {
        "linear_proj.weight": torch.ones(8, 4, 1, 1),
        "loss.logvar": torch.zeros(()),
        "loss.discriminator.main.0.weight": torch.ones(3),
        "foundation_model.model.cls_token": torch.ones(1),
    }
    tokenizer = read("va-vae", save(va_vae(extra), tmp_path / "vavae.pt"))
    assert (tokenizer.stride, tokenizer.latent_channels, tokenizer.statistics) == (16, 4, None)
    assert sorted(tokenizer.about["facts"][1:]) == [
        "1 tensor(s) left out: frozen encoder of the alignment loss.",
        "1 tensor(s) left out: projection of the alignment loss.",
        "2 tensor(s) left out: critic, perceptual network and other parts of the training loss.",
    ]


def test_va_vae_takes_the_published_statistics(tmp_path: Path) -> None:
    source = save(va_vae(), tmp_path / "vavae.pt")
    mean, std = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    stats = tmp_path / "latents_stats.pt"
    torch.save({"mean": mean.view(1, 4, 1, 1), "std": std.view(1, 4, 1, 1)}, stats)
    tokenizer = read("va-vae", source, statistics=str(stats))
    latents = torch.randn(1, 4, 2, 2)
    expected = (latents - mean.view(1, 4, 1, 1)) / std.view(1, 4, 1, 1)
    torch.testing.assert_close(tokenizer.standardise(latents), expected)
    torch.save({"mean": mean[:3], "std": std[:3]}, stats)
    with pytest.raises(DataError, match="mean of 3 values, std of 3 values; mean and std of 4 values are needed"):
        read("va-vae", source, statistics=str(stats))
    torch.save({"mean": mean, "std": 0 * std}, stats)
    with pytest.raises(DataError, match="not positive"):
        read("va-vae", source, statistics=str(stats))


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("key", sorted(ldm_keys(widths=(32, 64), blocks=1))[::4])
def test_every_key_is_needed(tmp_path: Path, key: str) -> None:
    state = filled(ldm_keys(widths=(32, 64), blocks=1))
    del state[key]
    with pytest.raises(DataError, match=re.escape(key)):
        read("ldm", save(state, tmp_path / "model.safetensors"))


def test_unknown_keys_are_refused(tmp_path: Path) -> None:
    state = {**filled(ldm_keys()), **{f"extra.{i}": torch.ones(1) for i in range(5)}}
    with pytest.raises(DataError, match=r"5 unknown \(extra.0, extra.1, extra.2, …\)"):
        read("ldm", save(state, tmp_path / "model.ckpt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"post_quant_conv.weight": (8, 8, 1, 1)}, r"post_quant_conv.weight of 8×8×1×1 instead of 4×4×1×1"),
        ({"encoder.conv_out.bias": (6,)}, r"encoder.conv_out.bias of 6 instead of 8"),
        ({"encoder.mid.attn_1.q.weight": (64, 64, 3, 3)}, r"attn_1.q.weight of 64×64×3×3 instead of 64×64"),
        ({"decoder.mid.block_1.norm1.bias": ()}, "of one number instead of 64"),
    ],
)
def test_other_shapes_are_refused(tmp_path: Path, change: Keys, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read("ldm", save(filled({**ldm_keys(), **change}), tmp_path / "model.ckpt"))


def test_latents_of_two_sizes_are_refused(tmp_path: Path) -> None:
    """Moments of 2·8 channels and a decoder for 4."""
    eight = {key: shape for key, shape in ldm_keys(8).items() if not key.startswith(("decoder", "post"))}
    with pytest.raises(DataError, match=r"encoder.conv_out.bias of 16 instead of 8"):
        read("ldm", save(filled({**ldm_keys(4), **eight}), tmp_path / "model.ckpt"))


def test_files_of_another_layout_are_recognised(tmp_path: Path) -> None:
    def file(keys: Keys) -> str:
        return save(filled(keys), tmp_path / "model.ckpt")

    f16 = ldm_keys(widths=(32,) * 5, blocks=1)
    aligned = {**f16, "linear_proj.weight": (8, 4, 1, 1)}
    whole = {f"first_stage_model.{key}": shape for key, shape in f16.items()}
    cases: list[tuple[str, Keys, str]] = [
        ("ldm", diffusers_keys(attention=False, quant=True), "have no convolution .* import its folder"),
        ("ldm", aligned, r"1 unknown \(linear_proj.weight\).* import it as 'va-vae'"),
        ("ldm", {**f16, "extra.weight": (1,)}, "The rest is as it should be: the file is incomplete or was changed"),
        ("ldm", {**f16, "quantize.embedding.weight": (16, 4)}, "vector-quantised"),
        ("ldm", {"blocks.0.attn.qkv.weight": (96, 32)}, "looks like a transformer"),
        ("ldm", {"something.weight": (3,)}, "Its first tensors are 'something.weight'"),
        ("flux-vae", f16, "FLUX's have none.*import it as 'ldm'"),
        ("va-vae", ldm_keys(), "of stride 4, and VA-VAE's are of stride 16"),
        ("va-vae", whole, "whole latent diffusion model; import its autoencoder as 'ldm'"),
    ]
    for form, keys, message in cases:
        with pytest.raises(DataError, match=message):
            read(form, file(keys))


def test_attention_elsewhere_is_refused(tmp_path: Path) -> None:
    keys = {**ldm_keys(), **layer("encoder.down.1.attn.0.norm", (32,))}
    with pytest.raises(DataError, match="attention above its deepest level"):
        read("ldm", save(filled(keys), tmp_path / "model.ckpt"))


def test_levels_that_are_no_multiples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="begins with 64 channels and has levels of 64, 96"):
        read("ldm", save(filled(ldm_keys(widths=(64, 96), blocks=1)), tmp_path / "model.ckpt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name = 'AutoencoderTiny'; only 'AutoencoderKL'"),
        ({"act_fn": "gelu"}, "act_fn = 'gelu'"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention = False"),
        ({"latent_channels": 8}, "of another shape"),
        ({"norm_num_groups": 24}, "normalisation groups"),
        ({"scaling_factor": 0}, "scaling_factor = 0; it must be a positive number"),
        ({"scaling_factor": None}, "scaling_factor = None"),
        ({"layers_per_block": "two"}, "layers_per_block = 'two'"),
        ({"block_out_channels": []}, r"block_out_channels = \[\]"),
        ({"latents_mean": [0.0], "latents_std": [1.0]}, "both must have 4"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "only 3 of DownEncoderBlock2D"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "only 3 of UpDecoderBlock2D"),
        ({"use_quant_conv": False}, r"2 unknown \(quant_conv.bias, quant_conv.weight\)"),
        ({"layers_per_block": 3}, "missing"),
    ],
)
def test_other_autoencoders_of_diffusers_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    source = folder(tmp_path / "vae", {**CONFIG, **change}, diffusers_keys(attention=False, quant=True))
    with pytest.raises((DataError, ConfigError), match=message):
        read("diffusers", source)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no .*config.json.*in a pipeline's folder is 'vae'"):
        read("diffusers", str(tmp_path))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        read("diffusers", str(tmp_path))
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="no mapping"):
        read("diffusers", str(tmp_path))
    lacking = {key: value for key, value in CONFIG.items() if key != "latent_channels"}
    (tmp_path / "config.json").write_text(json.dumps(lacking), encoding="utf-8")
    with pytest.raises(DataError, match="lacks latent_channels"):
        read("diffusers", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    with pytest.raises(DataError, match="no weights file"):
        read("diffusers", str(tmp_path))

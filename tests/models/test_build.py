"""The stride that a recipe asks for: encoders are fitted to it, and what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from underpaint.config.structure import structure
from underpaint.config.tokenizer import TokenizerConfig
from underpaint.errors import ConfigError
from underpaint.models.build import build_tokenizer
from underpaint.models.folders import save_tokenizer
from underpaint.models.tokenizer import Tokenizer
from underpaint.run.recipes import load_recipe

DECODER = {"name": "vfmvae/decoder", "width": 16, "base": 16, "depths": [1, 1], "heads": 4}


def made(encoder: Any, adapter: Any, stride: int | None, **changes: Any) -> Tokenizer:
    plain = {"encoder": encoder, "adapter": adapter, "decoder": DECODER, "latent_channels": 8, "stride": stride}
    return build_tokenizer(structure({**plain, **changes}, TokenizerConfig, "tokenizer"), seed=0)


@pytest.mark.parametrize(
    "encoder",
    [
        "timm/vit_tiny_patch16_224@random",
        {"name": "timm/vit_small_patch14_reg4_dinov2@random", "layers": [2, -1]},
        "open_clip/ViT-B-32@random",
    ],
)
def test_any_encoder_gives_the_same_grid(encoder: Any) -> None:
    # Patches of 16, 14 and 32 px: images of 64 px are given to them as 128, 112 and 256 px.
    tokenizer = made(encoder, {"name": "vfmvae/adapter", "width": 16}, 16)
    assert (tokenizer.encoder.info.stride, tokenizer.stride) == (8, 16)
    images = torch.zeros(1, 3, 64, 32)
    with torch.no_grad():
        assert tokenizer.encode(images).shape == (1, 8, 4, 2)
        assert tokenizer.reconstruct(images).shape == images.shape


@pytest.mark.parametrize(
    ("name", "middle", "width", "patch"),
    [
        ("timm/vit_large_patch14_dinov2@random", 11, 1024, 14),
        ("timm/vit_base_patch16_siglip_512@random", 5, 768, 16),
        ("timm/vit_large_patch16_224@random", 11, 1024, 16),
        ("open_clip/ViT-L-14@random", 11, 1024, 14),
        ("open_clip/EVA02-L-14@random", 11, 1024, 14),
        ("timm/eva_giant_patch14_336@random", 19, 1408, 14),
    ],
)
def test_vfm_vaes_recipe_takes_encoders_of_every_family(name: str, middle: int, width: int, patch: int) -> None:
    entry = f"tokenizer.encoder={{name: {name}, embedding: true, layers: [{middle}, -1], norm: last}}"
    recipe = load_recipe("recipe:vfm-vae", [entry])
    with torch.device("meta"):
        tokenizer = build_tokenizer(recipe.tokenizer, seed=0)
        assert tokenizer.encoder.info.layers == (-1, middle, 2 * middle + 1)
        assert tokenizer.encoder.info.channels == (width,) * 3
        assert (tokenizer.encoder.info.patch, tokenizer.stride) == (patch, 16)
        assert tokenizer.encode(torch.empty(1, 3, 256, 192)).shape == (1, 32, 16, 12)


def test_without_it_encoder_and_adapter_decide() -> None:
    assert made("timm/vit_tiny_patch16_224@random", {"name": "vfmvae/adapter", "width": 16}, None).stride == 32


@pytest.mark.parametrize(
    ("encoder", "stride", "message"),
    [
        ({"name": "timm/vit_tiny_patch16_224@random", "stride": 16}, 16, "a latent cell covers 32 px: 16 of the enc"),
        ({"name": "tiny/vit@random", "width": 32, "depth": 1, "heads": 2}, 8, "8 of the encoder 'tiny/vit@random', t"),
        ("timm/vit_tiny_patch16_224@random", 15, "the adapter merges 2×2 cells of the encoder into one; use a mult"),
    ],
)
def test_what_cannot_be_is_refused(encoder: Any, stride: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(encoder, {"name": "vfmvae/adapter", "width": 16}, stride)


def test_a_loaded_tokenizer_has_its_own(tmp_path: Any) -> None:
    save_tokenizer(made("timm/vit_tiny_patch16_224@random", "aligntok/mlp", None), tmp_path / "t")
    load = {"load": str(tmp_path / "t")}
    assert build_tokenizer(structure({**load, "stride": 16}, TokenizerConfig, ""), seed=0).stride == 16
    with pytest.raises(ConfigError, match=r"tokenizer\.stride is 8, and a latent cell covers 16 px"):
        build_tokenizer(structure({**load, "stride": 8}, TokenizerConfig, ""), seed=0)

"""timm's vision transformers as encoders, against timm's own forward pass."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import underpaint
from underpaint import ConfigError, DataError, NotFoundError, UnreachableError, testing
from underpaint_timm import _ALIASES, _EXAMPLES
from underpaint_timm.config import TimmConfig
from underpaint_timm.encoder import TimmEncoder
from underpaint_timm.models import names

TINY = "timm/test_vit@random"  # timm's own test model: 64 channels, 6 blocks, patch 16, 160 px

# One small model for each way of pooling, norm and position embedding that timm has.
ARCHITECTURES = [
    "test_vit",  # class token, learned positions
    "test_vit2",  # one register, mean of the patches
    "test_vit3",  # one register, attention pool
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",  # class and distillation tokens
    "eva02_tiny_patch14_224",  # rotary and learned positions
    "vit_tiny_patch16_dinov3_qkvb",  # rotary positions, class token and four registers
]


@testing.parametrize(plugin="timm")
def test_conformance(case: testing.Case) -> None:
    case()


def make(model: str, **options: Any) -> Any:
    torch.manual_seed(3)
    encoder = underpaint.create("encoder", f"timm/{model}@random", **options).eval()
    disturb(encoder)
    return encoder


def disturb(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def reference(encoder: Any, model: str) -> Any:
    """The same weights in a model that timm made in its own default way, for one image size."""
    trunk = timm.create_model(model, num_classes=0).eval()
    trunk.load_state_dict(encoder.trunk.state_dict())
    return trunk


def own_pixels(images: Tensor, trunk: Any) -> Tensor:
    """Images in [-1, 1] as timm's own evaluation transform normalises them."""
    data = timm.data.resolve_model_data_config(trunk)
    mean, std = torch.tensor(data["mean"]).view(3, 1, 1), torch.tensor(data["std"]).view(3, 1, 1)
    return ((images + 1) / 2 - mean) / std


def picture(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_equals_timm_at_native_size(model: str) -> None:
    encoder = make(model)
    trunk = reference(encoder, model)
    patch = trunk.patch_embed.patch_size[0]
    side = trunk.patch_embed.img_size[0]
    encoder = make(model, stride=patch)
    images = picture(side, side)
    with torch.no_grad():
        tokens = trunk.forward_features(own_pixels(images, trunk))
        features = encoder(images)
        if isinstance(trunk.norm, torch.nn.Identity):
            tokens = trunk.fc_norm(tokens)
    assert features.maps[-1].shape == (2, trunk.embed_dim, side // patch, side // patch)
    patches = tokens[:, trunk.num_prefix_tokens :]
    torch.testing.assert_close(features.maps[-1].flatten(2).transpose(1, 2), patches, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "prefix"),
    [("test_vit", 1), ("test_vit2", 1), ("deit_tiny_distilled_patch16_224", 2), ("vit_tiny_patch16_dinov3_qkvb", 5)],
)
def test_prefix_tokens_are_dropped(model: str, prefix: int) -> None:
    encoder = make(model)
    side = 2 * encoder.info.stride
    tokens = encoder.trunk.forward_features(torch.zeros(1, 3, 2 * encoder.info.patch, 2 * encoder.info.patch))
    assert tokens.shape[1] == 4 + prefix
    assert encoder(picture(side, side)).maps[0].shape[-2:] == (2, 2)


@pytest.mark.parametrize(
    ("model", "pool_type"),
    [
        ("test_vit", "token"),
        ("test_vit3", "map"),
        (
            "vit_tiny_patch16_dinov3_qkvb",
            "token",
        ),  # DINOv3 uses the class token, timm the mean
    ],
)
def test_pooled_is_the_models_own(model: str, pool_type: str) -> None:
    encoder = make(model)
    trunk = timm.create_model(model, num_classes=0, global_pool=pool_type).eval()
    trunk.load_state_dict(encoder.trunk.state_dict())
    side = trunk.patch_embed.img_size[0]
    images = picture(side, side)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images).pooled, trunk(own_pixels(images, trunk)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["test_vit", "test_vit3", "vit_tiny_patch16_dinov3_qkvb"])
def test_class_tokens_are_those_of_the_maps_layers(model: str) -> None:
    encoder = make(model, layers=(1, -1), norm="none", embedding=True)
    trunk = reference(encoder, model)
    side = trunk.patch_embed.img_size[0]
    with torch.no_grad():
        features = encoder(picture(side, side))
        if trunk.cls_token is None:
            assert features.class_tokens is None
            return
        first, *others = features.class_tokens
        pixels = own_pixels(picture(side, side), trunk)
        wanted = trunk.forward_intermediates(
            pixels, indices=[1, len(trunk.blocks) - 1], return_prefix_tokens=True, intermediates_only=True
        )
        normed = make(model, layers=(1, -1), norm="last")(picture(side, side)).class_tokens
    # Before the first block it is the learned token, at its place; rotary positions are no part of it.
    place = 0 if trunk.pos_embed is None else trunk.pos_embed[0, 0]
    torch.testing.assert_close(first, (trunk.cls_token[0, 0] + place).expand(2, -1))
    for ours, (_, prefix) in zip(others, wanted, strict=True):
        torch.testing.assert_close(ours, prefix[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normed[0], others[0])
    torch.testing.assert_close(normed[1], trunk.norm(others[1]), rtol=1e-4, atol=1e-4)


def test_layers_are_sorted_and_each_is_normed_as_timm_does() -> None:
    encoder = make("test_vit", layers=(-1, 1, -3))
    assert encoder.info.layers == (1, 3, 5)
    assert encoder.info.channels == (64, 64, 64)
    images = picture(160, 160)
    trunk = reference(encoder, "test_vit")
    for norm in ("affine", "none"):
        maps = make("test_vit", layers=(-1, 1, -3), norm=norm)(images).maps
        wanted = trunk.forward_intermediates(
            own_pixels(images, trunk), indices=[1, 3, 5], norm=norm == "affine", intermediates_only=True
        )
        for one, other in zip(maps, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_plain_norm_standardises_every_token() -> None:
    (map_,) = make("test_vit", norm="plain")(picture(64, 96)).maps
    tokens = map_.flatten(2).double()
    torch.testing.assert_close(tokens.mean(1), torch.zeros(2, 24, dtype=torch.double), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        tokens.var(1, unbiased=False), torch.ones(2, 24, dtype=torch.double), rtol=1e-3, atol=1e-3
    )


def test_patch_14_gives_16_by_16_cells_at_256_px() -> None:
    # aligntok.md §2.2: the 256² image is resized to 224², 224/14 = 16.
    with torch.device("meta"):
        encoder = underpaint.create("encoder", "timm/vit_large_patch14_dinov2@random")
    assert encoder.grid(256, 256) == (16, 16)
    assert encoder.info.native_size == (518, 518)
    assert encoder.info.patch == 14
    assert encoder.info.stride == 16
    features = encoder(torch.empty(1, 3, 256, 256, device="meta"))
    assert features.maps[0].shape == (1, 1024, 16, 16)
    # aligntok.md §2.2: about 304 M parameters.
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(304e6, rel=0.005)


def test_stride_resizes_the_image_to_the_models_input() -> None:
    # vfm_vae.md §1.1 feeds a patch-16 encoder at twice the image's side.
    encoder = make("test_vit", stride=8)
    images = picture(80, 80)
    larger = torch.nn.functional.interpolate(images, size=(160, 160), mode="bicubic", antialias=True)
    same = make("test_vit")(larger).maps[0]
    torch.testing.assert_close(encoder(images).maps[0], same, rtol=1e-4, atol=1e-4)
    assert encoder.grid(80, 160) == (10, 20)


@pytest.mark.parametrize("model", ["test_vit", "eva02_tiny_patch14_224", "vit_tiny_patch16_dinov3_qkvb"])
def test_oblong_images_equal_a_model_made_for_them(model: str) -> None:
    encoder = make(model)
    patch = encoder.info.patch
    encoder = make(model, stride=patch)
    size = (6 * patch, 10 * patch)
    fixed = timm.create_model(model, num_classes=0).eval()
    fixed.load_state_dict(encoder.trunk.state_dict())
    fixed.set_input_size(size)
    images = picture(*size)
    with torch.no_grad():
        tokens = fixed.forward_features(own_pixels(images, fixed))
        tokens = fixed.fc_norm(tokens) if isinstance(fixed.norm, torch.nn.Identity) else tokens
        map_ = encoder(images).maps[0]
    assert map_.shape[-2:] == (6, 10)
    wanted = tokens[:, fixed.num_prefix_tokens :]
    torch.testing.assert_close(map_.flatten(2).transpose(1, 2), wanted, rtol=1e-4, atol=1e-4)


def test_nothing_is_random_in_training_mode() -> None:
    encoder = make("vit_tiny_patch16_dinov3_qkvb").train()
    images = picture(64, 64)
    assert torch.equal(encoder(images).maps[0], encoder(images).maps[0])
    assert torch.equal(encoder(images).maps[0], encoder.eval()(images).maps[0])


def test_copies_and_pickles() -> None:
    encoder = make("test_vit")
    images = picture(64, 64)
    for again in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(again(images).maps[0], encoder(images).maps[0])
        assert again.info == encoder.info


# ------------------------------------------------------------------------------ names and tags


def test_every_alias_is_a_tag_that_timm_publishes() -> None:
    published = set(timm.list_pretrained())
    for alias, name in _ALIASES.items():
        model, _, tag = name.removeprefix("timm/").partition("@")
        assert f"{model}.{tag}" in published, alias
        assert model in names()


def test_published_constants_and_licences() -> None:
    imagenet, clip = (0.485, 0.456, 0.406), (0.48145466, 0.4578275, 0.40821073)
    expected = {  # alias: channels, native size, patch, mean, licence of the publisher
        "dinov2-l": (1024, 518, 14, imagenet, "Apache-2.0"),
        "dinov2-reg-b": (768, 518, 14, imagenet, "Apache-2.0"),
        "dinov3-b": (768, 256, 16, imagenet, "DINOv3 License"),
        "siglip2-so400m": (1152, 256, 16, (0.5, 0.5, 0.5), "Apache-2.0"),
        "mae-l": (1024, 224, 16, imagenet, "CC-BY-NC-4.0"),
        "eva02-l": (1024, 224, 14, clip, "MIT"),
        "clip-b": (768, 224, 16, clip, "MIT"),
    }
    for alias, (channels, side, patch, mean, licence) in expected.items():
        model, _, tag = _ALIASES[alias].removeprefix("timm/").partition("@")
        with torch.device("meta"):
            info = TimmEncoder(TimmConfig(), model=model, weights=tag, load=False).info
        assert info.channels == (channels,)
        assert (info.native_size, info.patch) == ((side, side), patch)
        assert info.mean == pytest.approx(mean)
        assert info.licence == licence
        assert info.source.startswith("hf-hub:")


def test_families_asked_for_are_served() -> None:
    served = set(names())
    assert {example.removeprefix("timm/").partition("@")[0] for example in _EXAMPLES} <= served
    for pattern in ("*dinov2*", "*dinov3*", "*siglip*", "eva02*", "vit_*clip_quickgelu*", "deit*_patch16_224"):
        found = [name for name in timm.list_models(pattern) if not name.startswith(("naflex", "convnext"))]
        assert found
        assert set(found) <= served, pattern


@pytest.mark.slow
def test_every_model_runs_at_an_oblong_size() -> None:
    for model in names():
        with torch.device("meta"):
            encoder = TimmEncoder(TimmConfig(), model=model, weights="random")
            stride = encoder.info.stride
            features = encoder(torch.empty(1, 3, 5 * stride, 7 * stride))
        assert features.maps[0].shape == (1, encoder.info.channels[0], 5, 7), model
        assert features.pooled is not None
        assert features.pooled.shape == (1, encoder.info.channels[0]), model


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("timm/vit_base_patch14_dino2@random", NotFoundError, "'vit_base_patch14_dinov2'"),
        ("timm/vit_base_patch14_dinov2.lvd142m", NotFoundError, "'timm/vit_base_patch14_dinov2@lvd142m'"),
        ("timm/resnet50@random", NotFoundError, "not a plain vision transformer"),
        ("timm/vit_base_patch16_224@mea", NotFoundError, "Did you mean 'mae'?"),
        ("timm/vit_base_patch16_224@file:mae.safetensors", ConfigError, "'tag'"),
        ("timm/vit_tiny_patch16_18x2", NotFoundError, "no model"),
    ],
)
def test_wrong_names_say_what_to_type(name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=r".") as caught:
        underpaint.create("encoder", name)
    assert words in str(caught.value)


def test_wrong_options_say_what_exists() -> None:
    with pytest.raises(ConfigError, match="has 6 blocks; use 0 to 5"):
        underpaint.create("encoder", TINY, layers=(6,))
    with pytest.raises(ConfigError, match="twice"):
        underpaint.create("encoder", TINY, layers=(5, -1))
    with pytest.raises(ConfigError, match="empty"):
        underpaint.create("encoder", TINY, layers=())
    with pytest.raises(ConfigError, match="remove it"):
        underpaint.create("encoder", "timm/vit_base_patch16_224@mae", tag="dino")
    with pytest.raises(ConfigError, match="without a norm"):
        underpaint.create("encoder", "timm/vit_base_patch16_radio_v3@random", norm="plain")


# ------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("model", ["test_vit", "test_vit3", "vit_tiny_patch16_dinov3_qkvb"])
def test_file_round_trip(model: str, tmp_path: Path) -> None:
    encoder = make(model)
    images = picture(64, 64)
    wanted = encoder(images).maps[0]
    save_file(encoder.trunk.state_dict(), tmp_path / "timm.safetensors")
    save_file(encoder.state_dict(), tmp_path / "ours.safetensors")
    torch.save(encoder.trunk.state_dict(), tmp_path / "timm.pt")
    for file in ("timm.safetensors", "ours.safetensors", "timm.pt"):
        again = underpaint.create("encoder", f"timm/{model}@file:{tmp_path / file}")
        assert torch.equal(again.eval()(images).maps[0], wanted)
        assert again.info.source == f"file:{tmp_path / file}"


def test_file_with_a_classifier_and_another_grid(tmp_path: Path) -> None:
    whole = timm.create_model("test_vit", img_size=96)
    save_file(whole.state_dict(), tmp_path / "a.safetensors")
    assert "head.weight" in load_file(tmp_path / "a.safetensors")
    encoder = underpaint.create("encoder", f"timm/test_vit@file:{tmp_path / 'a.safetensors'}")
    assert encoder.trunk.pos_embed.shape == (1, 101, 64)  # 160 px / 16 = 10; 10² + class token
    # A corner keeps its place when 6×6 positions become 10×10.
    old = whole.pos_embed[:, 1:].reshape(6, 6, 64)
    new = encoder.trunk.pos_embed[:, 1:].reshape(10, 10, 64)
    assert torch.nn.functional.cosine_similarity(old[0, 0], new[0, 0], dim=0) > 0.9
    assert torch.equal(encoder.trunk.pos_embed[:, 0], whole.pos_embed[:, 0])


def test_tag_sets_the_normalisation_of_a_file(tmp_path: Path) -> None:
    state = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
    save_file(state, tmp_path / "dino.safetensors")
    name = f"timm/vit_small_patch16_224@file:{tmp_path / 'dino.safetensors'}"
    assert underpaint.create("encoder", name, tag="dino").info.mean == pytest.approx((0.485, 0.456, 0.406))
    assert underpaint.create("encoder", name, tag="augreg_in1k").info.mean == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(ConfigError, match="'tag'"):
        underpaint.create("encoder", name)


def test_wrong_files_name_the_tensors(tmp_path: Path) -> None:
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    cases = {
        "missing": {k: v for k, v in state.items() if not k.startswith("blocks.5")},
        "unexpected": {**state, "blocks.6.norm1.weight": torch.ones(64)},
        "mis-shaped": {**state, "norm.weight": torch.ones(65)},
    }
    for word, wrong in cases.items():
        save_file(wrong, tmp_path / f"{word}.safetensors")
        with pytest.raises(DataError, match=word) as caught:
            underpaint.create("encoder", f"timm/test_vit@file:{tmp_path / word}.safetensors")
        assert "norm" in str(caught.value)
    save_file({"something": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="something"):
        underpaint.create("encoder", f"timm/test_vit@file:{tmp_path / 'other.safetensors'}")
    with pytest.raises(DataError, match="no weights file"):
        underpaint.create("encoder", f"timm/test_vit@file:{tmp_path / 'absent.safetensors'}")


def test_unreachable_hub_ends_at_once_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    calls = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **_: calls.append(a))
    with pytest.raises(UnreachableError) as caught:
        underpaint.create("encoder", "dinov2-b")
    message = str(caught.value)
    assert not calls  # the client that retries is never started
    for words in ("vit_base_patch14_dinov2", "lvd142m", "hub could not be reached", "@file:PATH", "@random"):
        assert words in message
    assert message.count(". ") == 0


@pytest.mark.slow
def test_offline_switch_of_the_hub(tmp_path: Path) -> None:
    program = """
import underpaint
try:
    underpaint.create("encoder", "dinov2-s")
except underpaint.DataError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "hub could not be reached" in done.stdout, done.stderr
    assert "Retrying" not in done.stderr


def test_other_failures_of_the_download_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def broken(*_: Any, **__: Any) -> None:
        raise AttributeError("a mistake of ours")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "get_session", broken)
    with pytest.raises(AttributeError):
        underpaint.create("encoder", "dinov2-b")


def test_cached_weights_need_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    published = timm.create_model("test_vit")
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def cached(repo: str, file: str) -> str | None:
        asked.append((repo, file))
        return str(tmp_path / file) if (tmp_path / file).is_file() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("the network was used"))
    encoder = underpaint.create("encoder", "timm/test_vit@r160_in1k")
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]
    assert encoder.info.source == "hf-hub:timm/test_vit.r160_in1k"
    assert torch.equal(encoder.trunk.blocks[3].mlp.fc1.weight, published.blocks[3].mlp.fc1.weight)


def test_listing_and_config_import_no_torch() -> None:
    program = """
import json, sys, underpaint
catalogue = underpaint.registry()
catalogue.config("encoder", "dinov2-b", {"layers": [3, -1]})
print(json.dumps([m for m in ("torch", "timm", "open_clip") if m in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []

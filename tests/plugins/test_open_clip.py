"""open_clip's image towers as encoders, against open_clip's own `encode_image` and preprocessing."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import underpaint
from underpaint import ConfigError, DataError, NotFoundError, UnreachableError, testing
from underpaint_open_clip.config import OpenClipConfig
from underpaint_open_clip.encoder import OpenClipEncoder
from underpaint_open_clip.models import names, tags

NATIVE, TRUNK = "ViT-S-32", "PE-Core-T-16-384"
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's published mean and std


@testing.parametrize(plugin="open_clip")
def test_conformance(case: testing.Case) -> None:
    case()


def make(model: str, **options: Any) -> Any:
    torch.manual_seed(3)
    return underpaint.create("encoder", f"open_clip/{model}@random", **options).eval()


def whole_model(encoder: Any, model: str) -> Any:
    """Both towers as open_clip makes them, with the encoder's weights in the image tower."""
    whole = open_clip.create_model(model).eval()
    whole.visual.load_state_dict(encoder.tower.visual.state_dict())
    return whole


def picture(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def own_pixels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return ((images + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize(
    ("model", "side", "patch", "mean", "std"),
    [(NATIVE, 224, 32, *CLIP), (TRUNK, 384, 16, (0.5,) * 3, (0.5,) * 3)],
)
def test_equals_open_clip_at_native_size(
    model: str, side: int, patch: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    encoder = make(model, layers=(1, -1), norm="none")
    assert encoder.info.native_size == (side, side)
    images = picture(side, side)
    whole = whole_model(encoder, model)
    with torch.no_grad():
        features = encoder(images)
        pixels = own_pixels(images, mean, std)
        pooled = whole.encode_image(pixels)
        wanted = whole.visual.forward_intermediates(
            pixels, indices=[1, encoder.tower.depth - 1], output_extra_tokens=True
        )
    torch.testing.assert_close(features.pooled, pooled, rtol=1e-4, atol=1e-5)
    for map_, other in zip(features.maps, wanted["image_intermediates"], strict=True):
        assert map_.shape[-2:] == (side // patch, side // patch)
        torch.testing.assert_close(map_, other, rtol=1e-4, atol=1e-4)
    prefixes = wanted.get("image_intermediates_prefix")
    if not prefixes:
        assert features.class_tokens is None
        return
    for token, prefix in zip(features.class_tokens, prefixes, strict=True):
        torch.testing.assert_close(token, prefix[:, 0], rtol=1e-4, atol=1e-4)


def test_maps_take_the_final_norm_and_no_projection() -> None:
    encoder = make(NATIVE)
    images = picture(64, 96)
    raw = make(NATIVE, norm="none")(images).maps[0].movedim(1, -1)
    post = encoder.tower.visual.ln_post
    affine = torch.nn.functional.layer_norm(raw, (384,), post.weight, post.bias, 1e-5)
    torch.testing.assert_close(encoder(images).maps[0].movedim(1, -1), affine)
    plain = make(NATIVE, norm="plain")(images).maps[0].double()
    torch.testing.assert_close(plain.mean(1), torch.zeros(2, 2, 3, dtype=torch.double), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", [NATIVE, TRUNK])
def test_embedding_is_what_the_first_block_is_given(model: str) -> None:
    encoder = make(model, layers=(0, -1), norm="last", embedding=True)
    assert encoder.info.layers == (-1, 0, encoder.tower.depth - 1)
    visual = encoder.tower.visual
    block = visual.transformer.resblocks[0] if model == NATIVE else visual.trunk.blocks[0]
    given: list[Tensor] = []
    block.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    images = picture(96, 64)
    features = encoder(images)
    first, *others = (m.flatten(2).transpose(1, 2) for m in features.maps)
    prefix = given[0].shape[1] - first.shape[1]
    torch.testing.assert_close(first, given[0][:, prefix:])
    raw = make(model, layers=(0, -1), norm="none")(images)
    plain = [m.flatten(2).transpose(1, 2) for m in raw.maps]
    torch.testing.assert_close(others[0], plain[0])
    torch.testing.assert_close(others[1], encoder.tower.final_norm()(plain[1]), rtol=1e-4, atol=1e-4)
    if prefix:
        torch.testing.assert_close(features.class_tokens[0], given[0][:, 0])
        torch.testing.assert_close(features.class_tokens[1], raw.class_tokens[0])


def test_preprocessing_equals_open_clips_transform() -> None:
    # An 8-bit picture at the native size: open_clip's transform then only normalises.
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    transform = open_clip.image_transform(224, is_train=False, mean=CLIP[0], std=CLIP[1])
    wanted = transform(Image.fromarray(pixels))
    seen: list[Tensor] = []
    encoder = make(NATIVE)
    encoder.tower.visual.conv1.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    encoder(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1)
    torch.testing.assert_close(seen[0][0], wanted, rtol=1e-5, atol=1e-5)


def test_positions_are_interpolated_in_place() -> None:
    # At another grid the result equals open_clip's own resize of the checkpoint's positions.
    encoder = make(NATIVE)
    images = picture(320, 320)
    cfg = open_clip.get_model_config(NATIVE)["vision_cfg"]
    other = open_clip.transformer.VisionTransformer(
        320, 32, cfg["width"], cfg["layers"], cfg["width"] // 64, 4.0, output_dim=384
    ).eval()
    state = {f"visual.{key}": value for key, value in encoder.tower.visual.state_dict().items()}
    shell = torch.nn.Module()
    shell.visual = other
    open_clip.model.resize_pos_embed(state, shell)
    other.load_state_dict({key.removeprefix("visual."): value for key, value in state.items()})
    with torch.no_grad():
        torch.testing.assert_close(encoder(images).pooled, other(own_pixels(images, *CLIP)), rtol=1e-4, atol=1e-5)


def test_grid_and_stride() -> None:
    with torch.device("meta"):
        encoder = underpaint.create("encoder", "open_clip/ViT-L-14@random")
        assert encoder(torch.empty(1, 3, 256, 512)).maps[0].shape == (1, 1024, 16, 32)
    assert (encoder.info.patch, encoder.info.stride) == (14, 16)
    assert encoder.grid(256, 256) == (16, 16)
    # CLIP's ViT-L/14 image tower has 304 M parameters (303.97 M with its projection).
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(304e6, rel=0.001)
    assert make(NATIVE, stride=16)(picture(32, 64)).maps[0].shape[-2:] == (2, 4)


def test_only_the_image_tower_is_built() -> None:
    encoder = make(TRUNK)
    assert all(name.startswith("tower.visual.") for name, _ in encoder.named_parameters())
    assert not any("text" in name or "token_embedding" in name for name, _ in encoder.named_parameters())


def test_quick_gelu_follows_the_tag() -> None:
    def activations(model: str, tag: str) -> set[str]:
        with torch.device("meta"):
            encoder = OpenClipEncoder(OpenClipConfig(), model=model, weights=tag, load=False)
        return {type(m).__name__ for m in encoder.modules() if type(m).__name__ in ("GELU", "QuickGELU")}

    assert activations("ViT-B-32", "openai") == {"QuickGELU"}
    assert activations("ViT-B-32", "laion2b_s34b_b79k") == {"GELU"}
    assert activations("ViT-B-32-quickgelu", "metaclip_400m") == {"QuickGELU"}
    assert activations("ViT-B-16-SigLIP2-256", "webli") == {"GELU"}


def test_published_constants_licences_and_sources() -> None:
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    expected = {
        ("ViT-L-14", "openai"): (CLIP, "MIT", 224),
        ("ViT-L-14", "laion2b_s32b_b82k"): (half, "MIT", 224),  # its publisher trained with 0.5
        ("ViT-B-16-SigLIP2-256", "webli"): (half, "Apache-2.0", 256),
        ("EVA02-L-14", "merged2b_s4b_b131k"): (CLIP, "MIT", 224),
        ("ViT-B-16-quickgelu", "metaclip_400m"): (CLIP, "CC-BY-NC-4.0", 224),
    }
    for (model, tag), ((mean, std), licence, side) in expected.items():
        with torch.device("meta"):
            info = OpenClipEncoder(OpenClipConfig(), model=model, weights=tag, load=False).info
        assert (info.mean, info.std) == (mean, std), model
        assert (info.licence, info.native_size) == (licence, (side, side)), model
        assert info.source.startswith("hf-hub:"), model


def test_copies_and_pickles() -> None:
    encoder = make(TRUNK)
    images = picture(32, 48)
    for again in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(again(images).maps[0], encoder(images).maps[0])


@pytest.mark.slow
def test_every_model_runs_at_an_oblong_size() -> None:
    for model in names():
        with torch.device("meta"):
            encoder = underpaint.create("encoder", f"open_clip/{model}@random")
            stride = encoder.info.stride
            features = encoder(torch.empty(1, 3, 3 * stride, 5 * stride))
        assert features.maps[0].shape == (1, encoder.info.channels[0], 3, 5), model
        assert features.pooled is not None
        assert features.pooled.shape == (1, open_clip.get_model_config(model)["embed_dim"]), model


def test_families_asked_for_are_served() -> None:
    served = set(names())
    assert {"ViT-L-14", "ViT-B-16-SigLIP2-256", "EVA02-L-14", "PE-Core-B-16", "ViT-H-14-quickgelu"} <= served
    assert not served & {"RN50", "convnext_base", "ViTamin-B", "swin_base_patch4_window7_224"}
    assert "openai" in tags("ViT-L-14")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("open_clip/ViT-L14@openai", NotFoundError, "'ViT-L-14'"),
        ("open_clip/RN50@openai", NotFoundError, "not a plain vision transformer"),
        ("open_clip/ViT-L-14@openia", NotFoundError, "Did you mean 'openai'?"),
        ("open_clip/ViT-S-32@openai", NotFoundError, "It has none"),
        ("open_clip/ViT-L-14", ConfigError, "'@openai'"),
        ("open_clip/ViT-S-32", ConfigError, "'@random'"),
        ("open_clip/ViT-L-14@file:x.safetensors", ConfigError, "'tag'"),
    ],
)
def test_wrong_names_say_what_to_type(name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=r".") as caught:
        underpaint.create("encoder", name)
    assert words in str(caught.value)


def test_wrong_options_say_what_exists() -> None:
    with pytest.raises(ConfigError, match="has 12 blocks; use 0 to 11"):
        make(NATIVE, layers=(12,))
    with pytest.raises(ConfigError, match="twice"):
        make(NATIVE, layers=(11, -1))
    with pytest.raises(ConfigError, match="without a norm"), torch.device("meta"):
        make("coca_ViT-B-32", norm="plain")


# ------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("model", [NATIVE, TRUNK])
def test_file_round_trip(model: str, tmp_path: Path) -> None:
    encoder = make(model)
    images = picture(64, 64)
    wanted = encoder(images)
    visual = {f"visual.{key}": value for key, value in encoder.tower.visual.state_dict().items()}
    save_file({**visual, "token_embedding.weight": torch.ones(2, 2)}, tmp_path / "both.safetensors")
    save_file(encoder.state_dict(), tmp_path / "ours.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in visual.items()}}, tmp_path / "parallel.pt")
    for file in ("both.safetensors", "ours.safetensors", "parallel.pt"):
        again = underpaint.create("encoder", f"open_clip/{model}@file:{tmp_path / file}").eval()
        assert torch.equal(again(images).maps[0], wanted.maps[0])
        assert torch.equal(again(images).pooled, wanted.pooled)
        assert again.info.mean == encoder.info.mean


def test_file_of_another_grid_is_resampled_as_open_clip_does(tmp_path: Path) -> None:
    encoder = make(NATIVE)
    visual = dict(encoder.tower.visual.state_dict())
    larger = {**visual, "positional_embedding": torch.randn(1 + 10 * 10, 384)}
    save_file({f"visual.{key}": value for key, value in larger.items()}, tmp_path / "a.safetensors")
    again = underpaint.create("encoder", f"open_clip/{NATIVE}@file:{tmp_path / 'a.safetensors'}")
    state = {"visual.positional_embedding": larger["positional_embedding"]}
    shell = torch.nn.Module()
    shell.visual = again.tower.visual
    open_clip.model.resize_pos_embed(state, shell)
    torch.testing.assert_close(again.tower.visual.positional_embedding.data, state["visual.positional_embedding"])


def test_wrong_files_name_the_tensors(tmp_path: Path) -> None:
    state = {f"visual.{key}": value for key, value in make(NATIVE).tower.visual.state_dict().items()}
    cases = {
        "missing": {key: value for key, value in state.items() if "ln_post" not in key},
        "unexpected": {**state, "visual.ln_post.extra": torch.ones(2)},
        "mis-shaped": {**state, "visual.ln_post.weight": torch.ones(385)},
    }
    for word, wrong in cases.items():
        save_file(wrong, tmp_path / f"{word}.safetensors")
        with pytest.raises(DataError, match=word) as caught:
            underpaint.create("encoder", f"open_clip/{NATIVE}@file:{tmp_path / word}.safetensors")
        assert "ln_post" in str(caught.value)
    with pytest.raises(DataError, match="no weights file"):
        underpaint.create("encoder", f"open_clip/{NATIVE}@file:{tmp_path / 'absent.safetensors'}")


def test_unreachable_hub_ends_at_once_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("it went on"))
    with torch.device("meta"), pytest.raises(UnreachableError) as caught:
        underpaint.create("encoder", "open_clip/ViT-B-16-SigLIP2-256")
    message = str(caught.value)
    for words in ("ViT-B-16-SigLIP2-256", "webli", "hub could not be reached", "@file:PATH", "@random"):
        assert words in message
    assert message.count(". ") == 0


def test_cached_weights_need_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    encoder = make(TRUNK)
    state = {f"visual.{key}": value for key, value in encoder.tower.visual.state_dict().items()}
    save_file({**state, "text.cls_emb": torch.ones(2)}, tmp_path / "open_clip_model.safetensors")

    def cached(repository: str, file: str) -> str | None:
        assert repository == "timm/PE-Core-T-16-384"
        return str(tmp_path / file) if (tmp_path / file).is_file() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("the network was used"))
    again = underpaint.create("encoder", f"open_clip/{TRUNK}@meta").eval()
    images = picture(32, 32)
    assert torch.equal(again(images).pooled, encoder(images).pooled)
    assert again.info.source == "hf-hub:timm/PE-Core-T-16-384"

"""Builds a timm model with the weights asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from underpaint import DataError, check_fit, hub_file, load_weights
from underpaint_timm.models import Weights

__all__ = ["build"]


def build(model: str, weights: Weights, load: bool = True) -> Any:
    """Return the model without classifier, for any image size, with its weights unless `load` is False.

    Raises:
        DataError: The hub cannot be reached, or the file does not hold weights of the model.
    """
    hub = load and weights.kind == "hub"
    overlay: dict[str, Any] = {}
    if hub:
        # custom_load belongs to the original files of some models, never to those on the hub.
        overlay = {"file": _download(model, weights.tag), "custom_load": False}
    trunk = timm.create_model(
        model,
        pretrained=hub,
        pretrained_cfg=weights.tag,
        pretrained_cfg_overlay=overlay,
        num_classes=0,
        dynamic_img_size=True,
        drop_path_rate=0.0,
    )
    if load and weights.kind == "file":
        _load_file(trunk, model, weights.location)
    return trunk


# ------------------------------------------------------------------------------ timm's own weights


def _download(model: str, tag: str | None) -> str:
    """Return the path of timm's weights file in the local cache, fetched when it is not there."""
    cfg = timm.get_pretrained_cfg(f"{model}.{tag}")
    return hub_file(
        cfg.hf_hub_id,
        _file_names(cfg.hf_hub_filename),
        what=f"The weights '{tag}' of timm's '{model}'",
        instead=f"write 'timm/{model}@file:PATH' with a downloaded file, or 'timm/{model}@random'",
    )


def _file_names(given: str | None) -> list[str]:
    name = given or "pytorch_model.bin"
    safe = "model.safetensors" if given is None else str(Path(name).with_suffix(".safetensors"))
    return list(dict.fromkeys([safe, name]))


# ------------------------------------------------------------------------------ the user's file


def _load_file(trunk: nn.Module, model: str, location: str) -> None:
    state = load_weights(location)
    if state and all(key.startswith("trunk.") for key in state):
        state = {key.removeprefix("trunk."): tensor for key, tensor in state.items()}
    try:
        state = _convert(trunk, model, state)
    except (KeyError, RuntimeError, ValueError, AttributeError, IndexError, AssertionError) as error:
        raise DataError(
            f"The file '{location}' does not hold weights of timm's '{model}' ({type(error).__name__} while reading "
            "its layout); check that file and model belong together."
        ) from error
    # Heads belong to the files, but not to an encoder that was built without them.
    dropped = tuple(f"{head}." for head in ("head", "head_dist", "fc_norm", "attn_pool") if not _has(trunk, head))
    state = {key: tensor for key, tensor in state.items() if not key.startswith(dropped)}
    check_fit(trunk.state_dict(), state, what=f"timm's '{model}'", location=location)
    trunk.load_state_dict(state)


def _convert(trunk: nn.Module, model: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring published layouts to timm's, and position embeddings to the model's grid, as timm does."""
    # timm resamples these two families bilinearly, everything else bicubically.
    how = {"interpolation": "bilinear", "antialias": False} if "flexi" in model or "radio" in model else {}
    if isinstance(trunk, eva.Eva):
        return dict(eva.checkpoint_filter_fn(state, trunk, **how))
    return dict(vision_transformer.checkpoint_filter_fn(state, trunk, adapt_layer_scale=True, **how))


def _has(trunk: nn.Module, name: str) -> bool:
    part = getattr(trunk, name, None)
    return isinstance(part, nn.Module) and next(part.parameters(), None) is not None

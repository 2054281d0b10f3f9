"""Builds a timm model with the weights asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import timm
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from underpaint import DataError, UnreachableError, load_weights
from underpaint_timm.models import Weights

__all__ = ["build"]

_SECONDS = 5.0
"""Patience with a hub that does not answer."""


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
    files = _file_names(cfg.hf_hub_filename)
    for file in files:
        cached = huggingface_hub.try_to_load_from_cache(cfg.hf_hub_id, file)
        if isinstance(cached, str):
            return cached
    try:
        # The hub's client retries for a minute when there is no network; this asks once.
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_SECONDS)
        for file in files[:-1]:
            try:
                return str(huggingface_hub.hf_hub_download(cfg.hf_hub_id, file))
            except huggingface_hub.errors.RemoteEntryNotFoundError:
                continue
        return str(huggingface_hub.hf_hub_download(cfg.hf_hub_id, files[-1]))
    except Exception as error:
        if not _is_download_failure(error):
            raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UnreachableError(
            f"The weights '{tag}' of timm's '{model}' are not on this machine and the hub could not be reached or "
            f"refused ({reason}); try again, or write 'timm/{model}@file:PATH' with a downloaded file, or "
            f"'timm/{model}@random'."
        ) from error


def _is_download_failure(error: Exception) -> bool:
    # By package name: which HTTP library lies below the hub's client changes with its version.
    packages = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return isinstance(error, OSError) or bool(packages & {"huggingface_hub", "httpx", "httpx2", "httpcore", "requests"})


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
    _check(trunk.state_dict(), state, model, location)
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


def _check(wanted: dict[str, Tensor], given: dict[str, Tensor], model: str, location: str) -> None:
    missing = [key for key in wanted if key not in given]
    unknown = [key for key in given if key not in wanted]
    shaped = [
        f"{key} {tuple(given[key].shape)} for {tuple(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    found = [("missing", missing), ("unexpected", unknown), ("mis-shaped", shaped)]
    problems = [f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' * (len(keys) > 3)})" for what, keys in found if keys]
    if problems:
        raise DataError(
            f"The file '{location}' does not fit timm's '{model}': {'; '.join(problems)} of {len(wanted)} tensors; "
            "check that file and model belong together."
        )

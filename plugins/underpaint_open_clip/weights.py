"""Weights of image towers: from the hub or from the user's file."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub
import open_clip
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from underpaint import DataError, UnreachableError, load_weights
from underpaint_open_clip.models import Weights
from underpaint_open_clip.towers import Tower, TrunkTower

__all__ = ["load_tower"]

_SECONDS = 5.0
"""Patience with a hub that does not answer."""


def load_tower(tower: Tower, model: str, weights: Weights) -> None:
    """Read the weights into a tower.

    Raises:
        DataError: The hub cannot be reached, or the file does not hold an image tower of the model.
    """
    if weights.kind == "random":
        return
    location = weights.location if weights.kind == "file" else f"file:{_download(model, str(weights.tag))}"
    state = _visual(load_weights(location))
    _resample(tower, state)
    _check(tower.visual.state_dict(), state, model, location)
    tower.visual.load_state_dict(state)


def _visual(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the image tower by open_clip's names; files may hold both towers, or ours."""
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    for prefix in ("tower.visual.", "visual."):
        found = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        if found:
            return found
    return state


def _resample(tower: Tower, state: dict[str, Tensor]) -> None:
    """Bring the file's square grid of learned positions to the tower's, as open_clip and timm do."""
    if isinstance(tower, TrunkTower):
        trunk = tower.visual.trunk
        key, grid = "trunk.pos_embed", trunk.patch_embed.grid_size
        prefix = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
    else:
        key, grid, prefix = "positional_embedding", tower.visual.grid_size, 1
    given = state.get(key)
    if given is None or given.shape[-2] == grid[0] * grid[1] + prefix:
        return
    side = round(max(given.shape[-2] - prefix, 0) ** 0.5)
    if side and side * side + prefix == given.shape[-2]:
        rows = given.reshape(1, *given.shape[-2:])
        moved = resample_abs_pos_embed(rows, new_size=list(grid), old_size=[side, side], num_prefix_tokens=prefix)
        state[key] = moved.reshape(*given.shape[:-2], *moved.shape[-2:])


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
            f"The file '{location}' does not fit the image tower of open_clip's '{model}': {'; '.join(problems)} of "
            f"{len(wanted)} tensors; check that file and model belong together."
        )


# ------------------------------------------------------------------------------ the hub


def _download(model: str, tag: str) -> str:
    """Return the path of the weights in the local cache, fetched when they are not there."""
    repository, name = os.path.split(open_clip.get_pretrained_cfg(model, tag)["hf_hub"])
    files = _file_names(name)
    for file in files:
        cached = huggingface_hub.try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return cached
    try:
        # The hub's client retries for a minute when there is no network; this asks once.
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_SECONDS)
        for file in files[:-1]:
            try:
                return str(huggingface_hub.hf_hub_download(repository, file))
            except huggingface_hub.errors.RemoteEntryNotFoundError:
                continue
        return str(huggingface_hub.hf_hub_download(repository, files[-1]))
    except Exception as error:
        if not _is_download_failure(error):
            raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UnreachableError(
            f"The weights '{tag}' of open_clip's '{model}' are not on this machine and the hub could not be reached "
            f"or refused ({reason}); try again, or write 'open_clip/{model}@file:PATH' with a downloaded file, or "
            f"'open_clip/{model}@random'."
        ) from error


def _file_names(given: str) -> list[str]:
    name = given or "open_clip_pytorch_model.bin"
    safe = str(Path(given).with_suffix(".safetensors")) if given else "open_clip_model.safetensors"
    return list(dict.fromkeys([safe, name]))


def _is_download_failure(error: Exception) -> bool:
    # By package name: which HTTP library lies below the hub's client changes with its version.
    packages = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return isinstance(error, OSError) or bool(packages & {"huggingface_hub", "httpx", "httpx2", "httpcore", "requests"})

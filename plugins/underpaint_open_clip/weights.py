"""Weights of image towers: from the hub or from the user's file."""

from __future__ import annotations

import os
from pathlib import Path

import open_clip
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from underpaint import check_fit, hub_file, load_weights
from underpaint_open_clip.models import Weights
from underpaint_open_clip.towers import Tower, TrunkTower

__all__ = ["load_tower"]


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
    check_fit(tower.visual.state_dict(), state, what=f"the image tower of open_clip's '{model}'", location=location)
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


# ------------------------------------------------------------------------------ the hub


def _download(model: str, tag: str) -> str:
    """Return the path of the weights in the local cache, fetched when they are not there."""
    repository, name = os.path.split(open_clip.get_pretrained_cfg(model, tag)["hf_hub"])
    return hub_file(
        repository,
        _file_names(name),
        what=f"The weights '{tag}' of open_clip's '{model}'",
        instead=f"write 'open_clip/{model}@file:PATH' with a downloaded file, or 'open_clip/{model}@random'",
    )


def _file_names(given: str) -> list[str]:
    name = given or "open_clip_pytorch_model.bin"
    safe = str(Path(given).with_suffix(".safetensors")) if given else "open_clip_model.safetensors"
    return list(dict.fromkeys([safe, name]))

"""An image tower of open_clip as an encoder."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import ConfigError, Encoder, EncoderInfo, Features
from underpaint_open_clip.config import OpenClipConfig
from underpaint_open_clip.models import Weights, preprocessing, resolve
from underpaint_open_clip.towers import make_tower
from underpaint_open_clip.weights import load_tower

__all__ = ["OpenClipEncoder"]

# open_clip states no licences; these are the publishers', by the start of the tag.
_LICENCES = {
    "openai": "MIT",
    "laion": "MIT",
    "frozen_laion": "MIT",
    "mscoco_finetuned_laion": "MIT",
    "datacomp": "MIT",
    "commonpool": "MIT",
    "merged2b": "MIT",
    "webli": "Apache-2.0",
    "meta": "Apache-2.0",
    "metaclip": "CC-BY-NC-4.0",
    "dfndr": "Apple Machine Learning Research Model License",
    "dfn": "Apple Sample Code License",
}


class OpenClipEncoder(Encoder):
    """Patch tokens of an open_clip image tower, as maps.

    Only the image tower is built. Images are resized to the tower's own input (its tag's interpolation,
    antialiased, not clamped), then normalised with the tag's mean and std. Position embeddings are
    interpolated to the grid. The class token of each map's layer is given beside the map, where the tower has one.

    ``pooled`` is the tower's own output, in the space it shares with the text tower, not normalised.

    Args:
        config: Options.
        model: Name in open_clip.
        weights: A tag of open_clip, ``random``, ``file:PATH`` or a URL; None where the model has one tag only.
        load: False builds the network that `weights` belong to without reading them, for a saved state to fill.

    Raises:
        NotFoundError: open_clip has no such model or tag.
        ConfigError: An option does not fit the model.
        DataError: The weights cannot be had, or do not fit.
    """

    def __init__(self, config: OpenClipConfig, *, model: str, weights: str | None = None, load: bool = True) -> None:
        super().__init__()
        chosen = resolve(model, weights, config.tag)
        self.tower = make_tower(model, _quick_gelu(model, chosen))
        if load:
            load_tower(self.tower, model, chosen)
        blocks = _block_indices(config.layers, self.tower.depth, model)
        maps = ((-1,) if config.embedding else ()) + blocks
        patch = self.tower.patch
        self.norm = config.norm
        if self.norm == "plain" and isinstance(self.tower.final_norm(), nn.Identity):
            raise ConfigError(
                f"The tokens of open_clip's '{model}' end without a norm, so norm 'plain' has none to strip; use "
                "'none'."
            )
        images = preprocessing(model, chosen.tag)
        self.interpolation = str(images["interpolation"])
        side = open_clip.get_model_config(model)["vision_cfg"].get("image_size", 224)
        height, width = (side, side) if isinstance(side, int) else side
        self.info = EncoderInfo(
            channels=(self.tower.width,) * len(maps),
            stride=config.stride or (16 if patch == 14 else patch),
            patch=patch,
            native_size=(int(height), int(width)),
            mean=tuple(images["mean"]),
            std=tuple(images["std"]),
            layers=maps,
            licence=_licence(model, chosen),
            source=_source(model, chosen),
        )

    def forward(self, images: Tensor) -> Features:
        """Encode B×3×H×W images in [-1, 1] to B×C×(H/stride)×(W/stride) maps, in the tower's dtype."""
        h, w = self.grid(images.shape[-2], images.shape[-1])
        pixels = self._prepare(images, (h * self.info.patch, w * self.info.patch))
        blocks, tokens, pooled = self.tower(pixels, self.info.layers)
        finished = [self._finish(item, layer) for item, layer in zip(blocks, self.info.layers, strict=True)]
        maps = (item.transpose(1, 2).contiguous() for item in finished)
        return Features(
            maps=tuple(m.view(*m.shape[:2], h, w) for m in maps),
            pooled=pooled,
            class_tokens=None if tokens is None else tuple(map(self._finish, tokens, self.info.layers)),
        )

    def _prepare(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        # At least float32: bicubic weights and the mean lose two digits in bfloat16.
        x = images.to(torch.promote_types(images.dtype, torch.float32))
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode=self.interpolation, antialias=True, align_corners=False)
        # Python numbers, not buffers: a buffer would be rounded when the module becomes bfloat16.
        scaled = [
            x[:, i : i + 1] * (0.5 / std) + (0.5 - mean) / std
            for i, (mean, std) in enumerate(zip(self.info.mean, self.info.std, strict=True))
        ]
        return torch.cat(scaled, dim=1).to(next(self.tower.parameters()).dtype)

    def _finish(self, tokens: Tensor, layer: int) -> Tensor:
        # The embedding, layer -1, was never meant for the final norm.
        if self.norm == "none" or layer < 0 or (self.norm == "last" and layer != self.tower.depth - 1):
            return tokens
        norm: Any = self.tower.final_norm()
        if self.norm in ("affine", "last"):
            result: Tensor = norm(tokens)
            return result
        return F.layer_norm(tokens, tokens.shape[-1:], eps=norm.eps)


def _quick_gelu(model: str, weights: Weights) -> bool:
    """Whether the weights want QuickGELU: the model's name or the tag says so, as OpenAI's tags do."""
    tagged = open_clip.get_pretrained_cfg(model, weights.tag) if weights.tag else {}
    return bool(open_clip.get_model_config(model).get("quick_gelu") or tagged.get("quick_gelu"))


def _block_indices(layers: tuple[int, ...], depth: int, model: str) -> tuple[int, ...]:
    wrong = [index for index in layers if not -depth <= index < depth]
    if wrong:
        raise ConfigError(
            f"layers has {wrong[0]}, but open_clip's '{model}' has {depth} blocks; use 0 to {depth - 1}, or -1 for "
            "the last."
        )
    found = sorted({index % depth for index in layers})
    if len(found) < len(layers):
        raise ConfigError(f"layers {list(layers)} names a block of open_clip's '{model}' twice; it has {depth} blocks.")
    return tuple(found)


def _licence(model: str, weights: Weights) -> str:
    if weights.kind == "file":
        return "Not stated by the file."
    if weights.kind == "random":
        return "MIT"
    if "CLIPA" in model:
        return "Apache-2.0"
    starts = [start for start in _LICENCES if str(weights.tag).startswith(start)]
    return _LICENCES[max(starts, key=len)] if starts else "Not stated by open_clip; see the source."


def _source(model: str, weights: Weights) -> str:
    if weights.kind == "random":
        return "random initialisation"
    if weights.kind == "file":
        return weights.location
    return "hf-hub:" + str(open_clip.get_pretrained_cfg(model, weights.tag)["hf_hub"]).rstrip("/")

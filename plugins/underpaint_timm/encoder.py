"""A vision transformer of timm as an encoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import ConfigError, Encoder, EncoderInfo, Features
from underpaint_timm.config import TimmConfig
from underpaint_timm.models import Weights, resolve
from underpaint_timm.weights import build

__all__ = ["TimmEncoder"]

_LICENCES = {
    "apache-2.0": "Apache-2.0",
    "mit": "MIT",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "dinov3-license": "DINOv3 License",
    "apple-ascl": "Apple Sample Code License",
    "apple-amlr": "Apple Machine Learning Research Model License",
    "nvidia-open-model-license": "NVIDIA Open Model License",
}


class TimmEncoder(Encoder):
    """Patch tokens of a timm vision transformer, as maps.

    Images are resized to the model's own input (its interpolation, antialiased unless the config says otherwise, not
    clamped), then normalised with its mean and std. Position embeddings are interpolated or, for rotary models,
    computed for the grid. Class and register tokens are dropped from the maps; the class token of each map's layer is
    given beside it where the model has one, with the map's norm.

    ``pooled`` summarises the last block: the attention pool where the model has one (SigLIP), else the class
    token, else the mean of the patches; always with the final norm as trained.

    Args:
        config: Options.
        model: Name in timm.
        weights: A tag of timm, ``random``, ``file:PATH`` or a URL; None is timm's default tag.
        load: False builds the network that `weights` belong to without reading them, for a saved state to fill.

    Raises:
        NotFoundError: timm has no such model or tag.
        ConfigError: An option does not fit the model.
        DataError: The weights cannot be had, or do not fit.
    """

    def __init__(self, config: TimmConfig, *, model: str, weights: str | None = None, load: bool = True) -> None:
        super().__init__()
        chosen = resolve(model, weights, config.tag)
        self.trunk: Any = build(model, chosen, load)
        cfg = self.trunk.pretrained_cfg
        layers = _block_indices(config.layers, len(self.trunk.blocks), model)
        patch = int(self.trunk.patch_embed.patch_size[0])
        self.norm = config.norm
        self.antialias = config.antialias
        if self.norm == "plain" and isinstance(self._final_norm(), nn.Identity):
            raise ConfigError(f"timm's '{model}' ends without a norm, so norm 'plain' has none to strip; use 'none'.")
        self.interpolation = config.interpolation or str(cfg["interpolation"])
        self.embedding = config.embedding
        maps = ((-1,) if self.embedding else ()) + layers
        self.info = EncoderInfo(
            channels=(int(self.trunk.embed_dim),) * len(maps),
            stride=config.stride or (16 if patch == 14 else patch),
            patch=patch,
            native_size=(int(cfg["input_size"][-2]), int(cfg["input_size"][-1])),
            mean=tuple(cfg["mean"]),
            std=tuple(cfg["std"]),
            layers=maps,
            licence=_licence(cfg, chosen),
            source=_source(cfg, chosen),
        )

    def forward(self, images: Tensor) -> Features:
        """Encode B×3×H×W images in [-1, 1] to B×C×(H/stride)×(W/stride) maps, in the model's dtype."""
        h, w = self.grid(images.shape[-2], images.shape[-1])
        pixels = self._prepare(images, (h * self.info.patch, w * self.info.patch))
        layers = [layer for layer in self.info.layers if layer >= 0]
        # Where there is a class token it is the first of the prefix.
        has_class = self.trunk.cls_token is not None
        tokens, blocks = self.trunk.forward_intermediates(
            pixels, indices=layers, output_fmt="NLC", return_prefix_tokens=has_class
        )
        patches = [block[0] if has_class else block for block in blocks]
        classes = [block[1][:, 0] for block in blocks] if has_class else []
        if self.embedding:
            embedded = self._embed(pixels)
            patches.insert(0, embedded[:, self.trunk.num_prefix_tokens :])
            classes.insert(0, embedded[:, 0])
        finished = [self._finish(item, layer) for item, layer in zip(patches, self.info.layers, strict=True)]
        maps = (item.transpose(1, 2).contiguous() for item in finished)
        return Features(
            maps=tuple(m.view(*m.shape[:2], h, w) for m in maps),
            pooled=self._pool(tokens),
            class_tokens=tuple(map(self._finish, classes, self.info.layers)) if has_class else None,
        )

    def _embed(self, pixels: Tensor) -> Tensor:
        # Computed twice: forward_intermediates does not give it, and it is a thousandth of the network's work.
        embedded = self.trunk._pos_embed(self.trunk.patch_embed(pixels))
        tokens: Tensor = self.trunk.norm_pre(embedded[0] if isinstance(embedded, tuple) else embedded)
        return tokens

    def _prepare(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        # At least float32: bicubic weights and the mean lose two digits in bfloat16.
        x = images.to(torch.promote_types(images.dtype, torch.float32))
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode=self.interpolation, antialias=self.antialias, align_corners=False)
        # Python numbers, not buffers: a buffer would be rounded when the module becomes bfloat16.
        scaled = [
            x[:, i : i + 1] * (0.5 / std) + (0.5 - mean) / std
            for i, (mean, std) in enumerate(zip(self.info.mean, self.info.std, strict=True))
        ]
        return torch.cat(scaled, dim=1).to(self.trunk.patch_embed.proj.weight.dtype)

    def _final_norm(self) -> nn.Module:
        """Return the last norm; where timm pools first (`fc_norm`), it was trained on tokens or on their mean."""
        norm: nn.Module = self.trunk.norm
        fc_norm: nn.Module = self.trunk.fc_norm
        return fc_norm if isinstance(norm, nn.Identity) else norm

    def _finish(self, tokens: Tensor, layer: int) -> Tensor:
        is_last = layer == len(self.trunk.blocks) - 1
        # The embedding, layer -1, was never meant for the final norm.
        if self.norm == "none" or layer < 0 or (self.norm == "last" and not is_last):
            return tokens
        norm: Any = self._final_norm()
        if self.norm in ("affine", "last"):
            result: Tensor = norm(tokens)
            return result
        if isinstance(norm, nn.LayerNorm):
            return F.layer_norm(tokens, tokens.shape[-1:], eps=norm.eps)
        return F.rms_norm(tokens, tokens.shape[-1:], eps=norm.eps)

    def _pool(self, tokens: Tensor) -> Tensor:
        # `tokens` has passed trunk.norm, so only fc_norm is left to do.
        if self.trunk.attn_pool is not None:
            pooled = self.trunk.pool(tokens)
        elif self.trunk.cls_token is not None:
            pooled = tokens[:, 0]
        else:
            pooled = tokens[:, self.trunk.num_prefix_tokens :].mean(dim=1)
        result: Tensor = self.trunk.fc_norm(pooled)
        return result


def _block_indices(layers: tuple[int, ...], depth: int, model: str) -> tuple[int, ...]:
    wrong = [index for index in layers if not -depth <= index < depth]
    if wrong:
        raise ConfigError(
            f"layers has {wrong[0]}, but timm's '{model}' has {depth} blocks; use 0 to {depth - 1}, or -1 for the last."
        )
    found = sorted({index % depth for index in layers})
    if len(found) < len(layers):
        raise ConfigError(f"layers {list(layers)} names a block of timm's '{model}' twice; it has {depth} blocks.")
    return tuple(found)


def _licence(cfg: dict[str, Any], weights: Weights) -> str:
    if weights.kind == "random":
        return "Apache-2.0"
    stated = cfg.get("license")
    licence = _LICENCES.get(stated, stated) if stated else "not stated by timm"
    if weights.tag == "openai":
        # timm prints its own default here; OpenAI's release says MIT.
        licence = "MIT"
    if weights.kind == "file":
        return f"Not stated by the file; timm's '{weights.tag}' weights: {licence}."
    return licence


def _source(cfg: dict[str, Any], weights: Weights) -> str:
    if weights.kind == "random":
        return "random initialisation"
    if weights.kind == "file":
        return weights.location
    return f"hf-hub:{cfg['hf_hub_id']}"

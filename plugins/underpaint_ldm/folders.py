"""Folders of diffusers' ``AutoencoderKL``, read without diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import fsspec

from underpaint import DataError, Importer, LatentStatistics, Tokenizer, load_weights
from underpaint_ldm.layout import DIFFUSERS, DIFFUSERS_LEGACY, Shape, factors, read

__all__ = ["Diffusers"]

# Values that diffusers assumes where an older config lacks the key.
_DEFAULTS: Mapping[str, Any] = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
# What 'ldm/encoder' and 'ldm/decoder' are, and cannot be otherwise.
_FIXED = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "mid_block_add_attention": True,
}
_NEEDED = ("block_out_channels", "layers_per_block", "latent_channels", "down_block_types", "up_block_types")


class Diffusers(Importer):
    """A folder with ``config.json`` and ``diffusion_pytorch_model.safetensors``, such as ``vae`` of a pipeline.

    The scale and shift of its config become the statistics of the latents.
    """

    def read(self, source: str) -> Tokenizer:
        """Return the tokenizer of a folder.

        Raises:
            DataError: A file is missing, or it holds another kind of autoencoder.
        """
        folder = source.removeprefix("file:") if not source.startswith("file://") else source
        folder = folder.rstrip("/")
        config = {**_DEFAULTS, **_config(folder)}
        shape = _shape(config, source)
        weights = load_weights(f"{folder}/diffusion_pytorch_model.safetensors")
        legacy = any(".query." in key for key in weights)
        tokenizer = read("diffusers", shape, weights, DIFFUSERS_LEGACY if legacy else DIFFUSERS, {}, source)
        tokenizer.statistics = _statistics(config, shape.latent_channels, source)
        return tokenizer


def _config(folder: str) -> dict[str, Any]:
    path = f"{folder}/config.json"
    try:
        with fsspec.open(path, "rt", encoding="utf-8") as file:
            config = json.load(file)
    except FileNotFoundError:
        raise DataError(
            f"There is no '{path}'; give the folder of an AutoencoderKL, which in a pipeline's folder is 'vae'."
        ) from None
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"The config '{path}' cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise DataError(f"The config '{path}' is no mapping; give the folder of an AutoencoderKL.")
    return config


def _shape(config: Mapping[str, Any], source: str) -> Shape:
    for key, value in _FIXED.items():
        if config.get(key) != value:
            raise DataError(
                f"The config of '{source}' has {key} = {config.get(key)!r}; only {value!r} can be imported."
            )
    lacking = [key for key in _NEEDED if key not in config]
    if lacking:
        raise DataError(f"The config of '{source}' lacks {', '.join(lacking)}; give the folder of an AutoencoderKL.")
    widths = tuple(config["block_out_channels"])
    if not widths or not all(isinstance(width, int) and width > 0 for width in widths):
        raise DataError(f"The config of '{source}' has block_out_channels = {list(widths)}; they must be channels.")
    # Attention is at the deepest level, which is the last of the encoder and the first of the decoder.
    down = _attention(list(reversed(config["down_block_types"])), "DownEncoderBlock2D", len(widths), source)
    up = _attention(config["up_block_types"], "UpDecoderBlock2D", len(widths), source)
    return Shape(
        base=widths[0],
        widths=widths,
        blocks=int(_number(config, "layers_per_block", source)),
        attention=(down, up),
        latent_channels=int(_number(config, "latent_channels", source)),
        quant_conv=bool(config["use_quant_conv"]),
        post_quant_conv=bool(config["use_post_quant_conv"]),
        groups=int(_number(config, "norm_num_groups", source)),
    )


def _attention(types: list[str], plain: str, levels: int, source: str) -> bool:
    if len(types) != levels or set(types[1:]) - {plain} or types[0] not in (plain, f"Attn{plain}"):
        raise DataError(
            f"The config of '{source}' has the blocks {', '.join(types)}, from the deepest level; only {levels} of "
            f"{plain}, the first perhaps Attn{plain}, can be imported."
        )
    return types[0] != plain


def _number(config: Mapping[str, Any], key: str, source: str) -> float:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise DataError(f"The config of '{source}' has {key} = {value!r}; it must be a positive number.")
    return value


def _statistics(config: Mapping[str, Any], channels: int, source: str) -> LatentStatistics:
    scale = _number(config, "scaling_factor", source)
    shift = float(config["shift_factor"] or 0.0)
    mean, std = config["latents_mean"], config["latents_std"]
    if mean is None or std is None:
        return factors(channels, scale, shift, "config of diffusers")
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise DataError(
            f"The config of '{source}' has latents_mean and latents_std of {len(mean)} and {len(std)} values; "
            f"both must have {channels}, the deviations above 0."
        )
    # Pipelines first standardise by these, then multiply with the scale.
    return LatentStatistics(
        mean=tuple(float(value) for value in mean),
        std=tuple(float(value) / scale for value in std),
        count=0,
        data=f"published latents_mean, latents_std and scale {scale}: config of diffusers",
    )

"""Checkpoints of LightningDiT to our conventions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

import underpaint
from underpaint import Denoiser, Importer
from underpaint_lightningdit import SIZES
from underpaint_lightningdit.foreign import NAMES, TABLE, Source, block_names
from underpaint_lightningdit.positions import grid_positions

__all__ = ["LightningDiTImporter"]

_NAMES = {
    "embed.weight": "x_embedder.proj.weight",
    "embed.bias": "x_embedder.proj.bias",
    **NAMES,
}


class LightningDiTImporter(Importer):
    """The format ``lightningdit``: training files and exports of LightningDiT, with or without QK-norm and shift.

    LightningDiT's time τ runs from noise to data, and its output is x0 − ε. With τ = 1 − t, each pair [cos, sin] of the
    time embedding is a reflection of ours, which goes into the weights that read it; the head changes its sign.

    Attributes:
        left_out: Keys that are checked and not kept, with the reason.
    """

    left_out: ClassVar[Mapping[str, str]] = {
        "pos_embed": "fixed sine-cosine positions, computed for any grid",
        "feat_rope.freqs_cos": "fixed rotary positions, computed for any grid",
        "feat_rope.freqs_sin": "fixed rotary positions, computed for any grid",
    }

    def read(self, source: str) -> Denoiser:
        """Return the backbone with its class table, in evaluation mode on the CPU.

        Args:
            source: File or fsspec URL of a checkpoint. Of a training file the averaged weights are taken.

        Raises:
            DataError: The source is not of that layout; the message names the first keys that do not fit.
        """
        file = Source("lightningdit", source)
        file.require(
            *(_NAMES[key] for key in ("embed.weight", "head.weight")),
            *("blocks.0.norm1.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.w12.weight"),
            *(TABLE, *self.left_out),
            dims={_NAMES["embed.weight"]: 4, "pos_embed": 3, "feat_rope.freqs_cos": 2, TABLE: 2},
        )
        tensors = file.tensors
        width, channels, patch, _ = tensors[_NAMES["embed.weight"]].shape
        side = file.side(tensors["pos_embed"].shape[1])
        depth = file.depth()
        if len(tensors[_NAMES["head.weight"]]) == 2 * channels * patch**2:
            raise file.refuse("it predicts a variance besides the velocity, as no published LightningDiT does")
        qk_norm = "blocks.0.attn.q_norm.weight" in tensors
        names = dict(_NAMES)
        for index in range(depth):
            names |= block_names(f"layers.{index}.", f"blocks.{index}.", qk_norm=qk_norm)
        file.check_keys([*names.values(), TABLE, *self.left_out])
        file.check_fixed("pos_embed", grid_positions(side, side, width)[None])

        name, options = _name(depth, width, file.heads("feat_rope", side, width), patch)
        shift = len(tensors["blocks.0.adaLN_modulation.1.weight"]) == 6 * width
        backbone = underpaint.create(
            "backbone",
            name,
            latent_channels=channels,
            grid=(side * patch, side * patch),
            pooled_dim=width,
            token_dim=0,
            qk_norm=qk_norm,
            shift=shift,
            **options,
        )
        file.fill(
            backbone,
            names,
            {
                "embed.weight": lambda w: w.flatten(1),
                "time.0.weight": _mirror_time,
                "head.weight": torch.neg,
                "head.bias": torch.neg,
            },
        )
        return file.with_labels(backbone, guided_channels=3)


def _mirror_time(weight: Tensor) -> Tensor:
    # cos(f − f·t) = cos f·cos f·t + sin f·sin f·t and sin(f − f·t) = sin f·cos f·t − cos f·sin f·t.
    cosines, sines = weight.chunk(2, dim=1)
    count = cosines.shape[1]
    f = 10_000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    return torch.cat((cosines * f.cos() + sines * f.sin(), cosines * f.sin() - sines * f.cos()), dim=1)


def _name(depth: int, width: int, heads: int, patch: int) -> tuple[str, dict[str, Any]]:
    for size, dimensions in SIZES.items():
        if dimensions == (depth, width, heads) and patch in (1, 2):
            return f"lightningdit/{size}-{patch}", {}
    # A size that nobody published: the smallest name, with its presets replaced.
    return "lightningdit/S-1", {"depth": depth, "width": width, "heads": heads, "patch": patch}

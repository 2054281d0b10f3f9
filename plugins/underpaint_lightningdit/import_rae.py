"""DiT^DH checkpoints of RAE to our conventions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

import underpaint
from underpaint import Denoiser, Importer
from underpaint_lightningdit import DH_SIZES, SIZES
from underpaint_lightningdit.foreign import NAMES, TABLE, Source, block_names
from underpaint_lightningdit.positions import grid_positions

__all__ = ["RAEImporter"]

_NAMES = {
    "embed.weight": "s_embedder.proj.weight",
    "embed.bias": "s_embedder.proj.bias",
    "head_embed.weight": "x_embedder.proj.weight",
    "head_embed.bias": "x_embedder.proj.bias",
    "times.frequencies": "t_embedder.W",
    **NAMES,
}
_WIDEN = {"widen.weight": "s_projector.weight", "widen.bias": "s_projector.bias"}
_HEAD_DEPTH = 2


class RAEImporter(Importer):
    """The format ``rae-dit``: training files and exports of RAE's DiT^DH, one cell of the latent a token.

    Time and velocity run our way. RAE's time embedding is [sin, cos] of 2π·t·W; its halves change places in the weights
    that read it, and W, which is drawn anew for each training, comes from the file.

    Attributes:
        left_out: Keys that are checked and not kept, with the reason.
    """

    left_out: ClassVar[Mapping[str, str]] = {
        "pos_embed": "fixed sine-cosine positions, computed for any grid",
        "enc_feat_rope.freqs_cos": "fixed rotary positions, computed for any grid",
        "enc_feat_rope.freqs_sin": "fixed rotary positions, computed for any grid",
        "dec_feat_rope.freqs_cos": "fixed rotary positions, computed for any grid",
        "dec_feat_rope.freqs_sin": "fixed rotary positions, computed for any grid",
    }

    def read(self, source: str) -> Denoiser:
        """Return the backbone with its class table, in evaluation mode on the CPU.

        Args:
            source: File or fsspec URL of a checkpoint. Of a training file the averaged weights are taken.

        Raises:
            DataError: The source is not of that layout; the message names the first keys that do not fit.
        """
        file = Source("rae-dit", source)
        file.require(
            *(_NAMES[key] for key in ("embed.weight", "head_embed.weight", "times.frequencies")),
            *("blocks.0.norm1.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.w12.weight"),
            *(TABLE, *self.left_out),
            dims={
                _NAMES["embed.weight"]: 4,
                _NAMES["head_embed.weight"]: 4,
                "pos_embed": 3,
                "enc_feat_rope.freqs_cos": 2,
                "dec_feat_rope.freqs_cos": 2,
                TABLE: 2,
            },
        )
        tensors = file.tensors
        width, channels, patch, _ = tensors[_NAMES["embed.weight"]].shape
        wide = len(tensors[_NAMES["head_embed.weight"]])
        if patch != 1:
            raise file.refuse(f"its tokens are patches of {patch}×{patch} cells, which RAE's own code cannot run")
        side = file.side(tensors["pos_embed"].shape[1])
        head_depth = _head_depth(tensors, file.depth(), width, wide)
        depth = file.depth() - head_depth
        qk_norm = "blocks.0.attn.q_norm.weight" in tensors
        names = _NAMES | (_WIDEN if wide != width else {})
        for index in range(depth):
            names |= block_names(f"layers.{index}.", f"blocks.{index}.", qk_norm=qk_norm)
        for index in range(head_depth):
            names |= block_names(f"head_layers.{index}.", f"blocks.{depth + index}.", qk_norm=qk_norm)
        file.check_keys([*names.values(), TABLE, *self.left_out])
        file.check_fixed("pos_embed", grid_positions(side, side, width)[None])
        heads = file.heads("enc_feat_rope", side, width)
        head_heads = file.heads("dec_feat_rope", side, wide)

        name, options = _name(depth, width, heads, head_depth, wide, head_heads)
        backbone = underpaint.create(
            "backbone",
            name,
            latent_channels=channels,
            grid=(side, side),
            pooled_dim=width,
            token_dim=0,
            qk_norm=qk_norm,
            **options,
        )
        file.fill(
            backbone,
            names,
            {
                "embed.weight": lambda w: w.flatten(1),
                "head_embed.weight": lambda w: w.flatten(1),
                "time.0.weight": lambda w: torch.cat(w.chunk(2, dim=1)[::-1], dim=1),
            },
        )
        return file.with_labels(backbone)


def _head_depth(tensors: Mapping[str, Tensor], depth: int, width: int, wide: int) -> int:
    # Only where both parts are equally wide does the file not say where the head begins; RAE's heads have two blocks.
    if wide == width:
        return min(_HEAD_DEPTH, depth - 1)
    norms = (tensors.get(f"blocks.{index}.norm1.weight") for index in range(depth))
    return sum(norm is not None and len(norm) == wide for norm in norms)


def _name(
    depth: int, width: int, heads: int, head_depth: int, head_width: int, head_heads: int
) -> tuple[str, dict[str, Any]]:
    head = {"head_depth": head_depth, "head_width": head_width, "head_heads": head_heads}
    for size in DH_SIZES:
        if SIZES[size] == (depth, width, heads):
            return f"ditdh/{size}", head
    # A size that nobody published: the smallest name, with its presets replaced.
    return "ditdh/S", {"depth": depth, "width": width, "heads": heads, **head}

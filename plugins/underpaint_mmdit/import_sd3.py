"""The importer of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

import underpaint
from underpaint import Backbone, Denoiser, Importer
from underpaint_mmdit.published import count_blocks, fill, read_tensors, refuse

__all__ = ["SD3Importer"]

_WHAT = "a transformer of Stable Diffusion 3"
_HEAD = 64
"""Channels of a head, in all published sizes."""

_TOP = {
    "embed": "x_embedder.proj",
    "time": "t_embedder.mlp",
    "pooled": "y_embedder.mlp",
    "tokens": "context_embedder",
    "modulation": "final_layer.adaLN_modulation.1",
    "head": "final_layer.linear",
    "positions": "pos_embed",
    "layers": "joint_blocks",
}
_INNER = {
    ".image.": ".x_block.",
    ".text.": ".context_block.",
    ".attention.": ".attn.",
    ".second.": ".attn2.",
    ".out.": ".proj.",
    ".heads.query.": ".ln_q.",
    ".heads.key.": ".ln_k.",
    ".mlp.0.": ".mlp.fc1.",
    ".mlp.2.": ".mlp.fc2.",
    ".modulation.": ".adaLN_modulation.1.",
}


class SD3Importer(Importer):
    """The transformer in a single file of Stable Diffusion 3 or 3.5, alone or with the rest of the pipeline.

    Size, normalisation of queries and keys, and second attentions are read off the tensors. Direction and sign are
    ours already: noise level 0 is data, the output is noise − data, and time enters as 1000 times the level. The
    latents it was trained on are (z − 0.0609)·1.5305 of its autoencoder's. Its text conditions hide no padding.
    """

    def read(self, source: str) -> Denoiser:
        """Return an ``mmdit/*`` backbone, in float32; see `Importer.read`."""
        tensors = read_tensors(source, "joint_blocks.", _WHAT)
        width, channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4, source)
        depth, dual = count_blocks(tensors, "joint_blocks"), _dual_blocks(tensors, source)
        table = math.isqrt(_shape(tensors, "pos_embed", 3, source)[1])
        if width % _HEAD or table**2 != tensors["pos_embed"].shape[1]:
            refuse(source, _WHAT, f"its width is {width} and its table of positions {tensors['pos_embed'].shape[1]}")
        name = "sd3.5-large" if depth == 38 else "sd3.5-medium" if dual else "sd3-medium"
        with torch.device("meta"):
            model = underpaint.create(
                "backbone",
                f"mmdit/{name}",
                depth=depth,
                width=width,
                heads=width // _HEAD,
                patch=patch,
                mlp_ratio=_shape(tensors, "joint_blocks.0.x_block.mlp.fc1.weight", 2, source)[0] / width,
                qk_norm=_qk_norm(tensors),
                table=table,
                dual=dual,
                latent_channels=channels,
                grid=(min(64, table) * patch,) * 2,
                pooled_dim=_shape(tensors, "y_embedder.mlp.0.weight", 2, source)[1],
                token_dim=_shape(tensors, "context_embedder.weight", 2, source)[1],
            )
        assert isinstance(model, Backbone)
        fill(model, _converted(tensors, channels, patch, table, source), _published, source, _WHAT)
        return Denoiser(model).eval()


def _shape(tensors: Mapping[str, Tensor], key: str, dimensions: int, source: str) -> tuple[int, ...]:
    if key not in tensors or tensors[key].dim() != dimensions:
        refuse(source, _WHAT, f"it has no '{key}' of {dimensions} dimensions")
    return tuple(tensors[key].shape)


def _qk_norm(tensors: Mapping[str, Tensor]) -> str:
    if "joint_blocks.0.x_block.attn.ln_q.weight" not in tensors:
        return "none"
    return "ln" if "joint_blocks.0.x_block.attn.ln_q.bias" in tensors else "rms"


def _dual_blocks(tensors: Mapping[str, Tensor], source: str) -> int:
    found = sorted({int(key.split(".")[1]) for key in tensors if key.endswith(".x_block.attn2.qkv.weight")})
    if found != list(range(len(found))):
        refuse(source, _WHAT, f"blocks {found} have a second attention, and not the first {len(found)}")
    return len(found)


def _published(name: str) -> str:
    top, dot, rest = name.partition(".")
    for ours, theirs in _INNER.items():
        rest = rest.replace(ours, theirs)
    return _TOP[top] + dot + rest


def _converted(tensors: Mapping[str, Tensor], channels: int, patch: int, table: int, source: str) -> dict[str, Tensor]:
    """Bring the four tensors that are laid out otherwise to our shapes."""
    made = dict(tensors)
    # Their patches are cut by a convolution, so the input is flattened as ours; the output is written cell by cell.
    made["x_embedder.proj.weight"] = tensors["x_embedder.proj.weight"].flatten(1)
    made["pos_embed"] = tensors["pos_embed"].reshape(table, table, -1)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if key not in tensors or len(tensors[key]) != channels * patch**2:
            refuse(source, _WHAT, f"it has no '{key}' of {channels * patch**2} rows")
        made[key] = tensors[key].reshape(patch**2, channels, -1).transpose(0, 1).reshape(tensors[key].shape)
    return made

"""The importer of FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import underpaint
from underpaint import Backbone, Denoiser, Importer
from underpaint_mmdit.published import count_blocks, fill, read_tensors, refuse

__all__ = ["FluxImporter"]

_WHAT = "a transformer of FLUX.1"
_PATCH = 2
"""The published program packs 2×2 cells before it calls the network."""

_TOP = {
    "embed": "img_in",
    "tokens": "txt_in",
    "time.0": "time_in.in_layer",
    "time.2": "time_in.out_layer",
    "pooled.0": "vector_in.in_layer",
    "pooled.2": "vector_in.out_layer",
    "strength.0": "guidance_in.in_layer",
    "strength.2": "guidance_in.out_layer",
    "modulation": "final_layer.adaLN_modulation.1",
    "head": "final_layer.linear",
}
_INNER = {
    "joint_layers.": "double_blocks.",
    "single_layers.": "single_blocks.",
    ".image.attention.heads.": ".img_attn.norm.",
    ".text.attention.heads.": ".txt_attn.norm.",
    ".heads.": ".norm.",
    ".query.weight": ".query_norm.scale",
    ".key.weight": ".key_norm.scale",
    ".image.attention.": ".img_attn.",
    ".text.attention.": ".txt_attn.",
    ".out.": ".proj.",
    ".image.mlp.": ".img_mlp.",
    ".text.mlp.": ".txt_mlp.",
    ".image.modulation.": ".img_mod.lin.",
    ".text.modulation.": ".txt_mod.lin.",
    ".modulation.": ".modulation.lin.",
    ".first.": ".linear1.",
    ".second.": ".linear2.",
}


class FluxImporter(Importer):
    """The transformer in a single file of FLUX.1: dev, Krea, Kontext (its text-to-image part) or schnell.

    Sizes are read off the tensors; the axes of the rotary positions are not in the file and are taken as published, an
    eighth of a head for the first and the rest in halves. Direction and sign are ours already, and time enters times
    1000. The latents it was trained on are (z − 0.1159)·0.3611 of its autoencoder's. dev is told guidance 3.5.
    Its text conditions hide no padding.
    """

    def read(self, source: str) -> Denoiser:
        """Return a ``flux/*`` backbone, in float32; see `Importer.read`."""
        tensors = read_tensors(source, "double_blocks.", _WHAT)
        width, cells = _matrix(tensors, "img_in.weight", source)
        written, _ = _matrix(tensors, "final_layer.linear.weight", source)
        if written != cells or cells % _PATCH**2:
            refuse(
                source,
                _WHAT,
                f"its tokens have {cells} channels and it writes {written}; models that are given an image as well, "
                "such as Canny, Depth and Fill, cannot be imported",
            )
        scale = "double_blocks.0.img_attn.norm.query_norm.scale"
        head = tensors[scale].numel() if scale in tensors else 0
        if not head or width % head or head % 32:
            refuse(source, _WHAT, f"its heads have {head} channels, of a width of {width}")
        with torch.device("meta"):
            model = underpaint.create(
                "backbone",
                "flux/dev" if "guidance_in.in_layer.weight" in tensors else "flux/schnell",
                double=count_blocks(tensors, "double_blocks"),
                single=count_blocks(tensors, "single_blocks"),
                width=width,
                heads=width // head,
                patch=_PATCH,
                axes=[head // 8, head * 7 // 16, head * 7 // 16],
                mlp_ratio=_matrix(tensors, "double_blocks.0.img_mlp.0.weight", source)[0] / width,
                latent_channels=cells // _PATCH**2,
                grid=(64 * _PATCH,) * 2,
                pooled_dim=_matrix(tensors, "vector_in.in_layer.weight", source)[1],
                token_dim=_matrix(tensors, "txt_in.weight", source)[1],
            )
        assert isinstance(model, Backbone)
        fill(model, tensors, _published, source, _WHAT)
        return Denoiser(model).eval()


def _matrix(tensors: Mapping[str, Tensor], key: str, source: str) -> tuple[int, int]:
    if key not in tensors or tensors[key].dim() != 2:
        refuse(source, _WHAT, f"it has no matrix '{key}'")
    return tensors[key].shape[0], tensors[key].shape[1]


def _published(name: str) -> str:
    for ours, theirs in _TOP.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    for ours, theirs in _INNER.items():
        name = name.replace(ours, theirs)
    return name

"""The layout of RAE's decoder files: which of their tensors make which of ours, and what sizes they have."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import attrs
import torch
from torch import Tensor

from underpaint import DataError
from underpaint_rae.decoder import grid_positions

__all__ = ["Sizes", "check_positions", "convert", "decoder_tensors", "measure"]

_LAYER = re.compile(r"decoder_layers\.(\d+)\.")
_POSITIONS = "decoder_pos_embed"
_TOP = {"embed": "decoder_embed", "norm": "decoder_norm", "pixels": "decoder_pred"}
_BLOCK = {
    "norm1": ("layernorm_before",),
    "qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "out": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.0": ("intermediate.dense",),
    "mlp.2": ("output.dense",),
}


@attrs.frozen(kw_only=True)
class Sizes:
    """What the shapes in a decoder file say.

    Attributes:
        latent_channels: d of the latents.
        width: Channels of a token.
        depth: Number of blocks.
        hidden: Width of the blocks' MLPs.
        patch: Pixels of a patch, per side.
        grid: Height and width of the latents it was trained on.
    """

    latent_channels: int
    width: int
    depth: int
    hidden: int
    patch: int
    grid: tuple[int, int]


def decoder_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the decoder's tensors under the names that they have in a published file.

    A training file holds the whole autoencoder. Its encoder is left out: it was frozen, so its weights are those that
    it was published with.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        while name.startswith(("module.", "_orig_mod.")):
            name = name.partition(".")[2]
        plain[name] = tensor
    if not any(name.startswith("decoder.") for name in plain):
        return plain
    return {name.removeprefix("decoder."): tensor for name, tensor in plain.items() if not name.startswith("encoder.")}


def measure(tensors: Mapping[str, Tensor], source: str) -> Sizes:
    """Check that exactly the tensors of a decoder are there, and read its sizes from their shapes.

    Raises:
        DataError: Tensors are missing or unknown, or of shapes that no decoder has.
    """
    depth = max((int(found[1]) + 1 for name in tensors if (found := _LAYER.match(name))), default=0)
    wanted = [_POSITIONS, *(name for names in _names(max(depth, 1)).values() for name in names)]
    missing = [name for name in wanted if name not in tensors]
    unknown = sorted(set(tensors) - set(wanted))
    if missing or unknown:
        parts = [_first(missing, "missing")] if missing else []
        parts += [_first(unknown, "unknown")] if unknown else []
        raise DataError(f"'{source}' is no decoder file of RAE: {'; '.join(parts)}.{_looks_like(tensors)}")
    embed, inner = tensors["decoder_embed.weight"], tensors["decoder_layers.0.intermediate.dense.weight"]
    pixels, positions = tensors["decoder_pred.weight"], tensors[_POSITIONS]
    patch, side = (
        math.isqrt(len(pixels) // 3),
        math.isqrt(max(positions.shape[-2] - 1, 0)) if positions.ndim == 3 else 0,
    )
    shapes = [
        f"{name} {tuple(tensors[name].shape)}"
        for name, fits in (
            ("decoder_embed.weight", embed.ndim == 2),
            ("decoder_layers.0.intermediate.dense.weight", inner.ndim == 2),
            ("decoder_pred.weight", pixels.ndim == 2 and len(pixels) == 3 * patch**2),
            (_POSITIONS, side > 0 and positions.shape == (1, side**2 + 1, len(embed))),
        )
        if not fits
    ]
    if shapes:
        raise DataError(f"'{source}' is no decoder file of RAE: the shape of {' and of '.join(shapes)} fits none.")
    return Sizes(
        latent_channels=embed.shape[1],
        width=len(embed),
        depth=depth,
        hidden=len(inner),
        patch=patch,
        grid=(side, side),
    )


def check_positions(tensors: Mapping[str, Tensor], sizes: Sizes, source: str) -> None:
    """Check that the stored positions, which are not taken over, are those that our decoder computes.

    Raises:
        DataError: They are others.
    """
    stored = tensors[_POSITIONS]
    wanted = torch.cat((torch.zeros(1, sizes.width), grid_positions(*sizes.grid, sizes.width)))
    # A moving average of a constant drifts by its rounding; half precision rounds once.
    gap = float((stored[0].float() - wanted).abs().max())
    if not gap <= max(1e-3, 2.0 * torch.finfo(stored.dtype).eps):
        raise DataError(
            f"The positions '{_POSITIONS}' in '{source}' are not RAE's fixed sines and cosines, but up to {gap:.2g} "
            "off; a decoder with positions of its own cannot be imported."
        )


def convert(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], sizes: Sizes, source: str
) -> dict[str, Tensor]:
    """Return the tensors under our names, float32, queries, keys and values stacked.

    Args:
        tensors: Those of the file, whose names `measure` has checked.
        wanted: State of our decoder, for its shapes.
        sizes: Sizes of the decoder.
        source: The file, for messages.

    Raises:
        DataError: Tensors have other shapes than the decoder's.
    """
    found: dict[str, Tensor] = {}
    wrong: list[str] = []
    for name, theirs in _names(sizes.depth).items():
        shape = (wanted[name].shape[0] // len(theirs), *wanted[name].shape[1:])
        wrong += [f"{t} {tuple(tensors[t].shape)} for {shape}" for t in theirs if tensors[t].shape != shape]
        if not wrong:
            found[name] = torch.cat([tensors[t].float() for t in theirs])
    if wrong:
        raise DataError(
            f"{len(wrong)} tensors in '{source}' have shapes that do not go with the others: {', '.join(wrong[:3])}; "
            "the file is damaged."
        )
    return found


def _names(depth: int) -> dict[str, tuple[str, ...]]:
    """Return the names in the file, by our name; several are stacked to one of ours."""
    names: dict[str, tuple[str, ...]] = {"class_token": ("trainable_cls_token",)}
    for kind in ("weight", "bias"):
        names |= {f"{ours}.{kind}": (f"{theirs}.{kind}",) for ours, theirs in _TOP.items()}
        names |= {
            f"blocks.{index}.{ours}.{kind}": tuple(f"decoder_layers.{index}.{name}.{kind}" for name in theirs)
            for index in range(depth)
            for ours, theirs in _BLOCK.items()
        }
    return names


def _first(names: list[str], what: str) -> str:
    return f"{len(names)} tensors are {what} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"


def _looks_like(names: Iterable[str]) -> str:
    """Say what a file with other names probably is."""
    known = set(names)
    if known <= {"mean", "var"}:
        return " It looks like RAE's latent statistics: give it with the option 'statistics'."
    if any(name.endswith("mask_token") or name.startswith("vit.") for name in known):
        return " It looks like weights of MAE pre-training, which RAE's decoder does not start from."
    if any(name.startswith(("blocks.", "dec_net.")) or "final_layer" in name for name in known):
        return " It looks like a diffusion model: import it with the format of its own."
    return ""

"""Reads the tokenizers that the authors of VFM-VAE published."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

import underpaint
from underpaint import Adapter, DataError, Decoder, Encoder, Importer, Tokenizer, load_weights
from underpaint_vfmvae.config import ImporterConfig

__all__ = ["LEFT_OUT", "VfmVae"]

LEFT_OUT: Mapping[str, str] = {
    r"vfm_encoder\..+": "the frozen encoder, which is read from its own source",
    r"ldm_adapter\.linear_proj\.weight": "head of the VF loss, used in training only",
    r"mapping\.x_avg": "average of the style code, for a truncation that is off",
    r"ldm_adapter\..+\.attn\.zero_k_bias": "zeros: keys have no bias",
    r"synthesis\.blocks\.\d+\.(seperate|last)_upsample_conv\.blur_weight": "the fixed binomial blur",
}
"""Keys of the file that have no place in the tokenizer, as patterns, each with the reason."""

_NOISE = {
    "none": "the file has none",
    "fixed": "multiplied by their factors, and fixed",
    "learned": "kept with their factors, which can be trained",
}

_PROJECTION = {
    "attention_norm": "norm1",
    "mlp_norm": "norm2",
    "skip_norm": "norm3",
    "skip": "proj",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp.norm": "mlp.norm",
    "mlp.gate": "mlp.w0",
    "mlp.value": "mlp.w1",
    "mlp.out": "mlp.w2",
}
_CONVNEXT = {
    "depthwise": "dwconv",
    "norm": "norm",
    "style": "affine_pw1.proj",
    "widen": "pwconv1",
    "narrow": "pwconv2",
}
_ATTENTION = {
    "norm.gain": "attn.norm.gamma",
    "null": "attn.null_kv",
    "query.weight": "attn.to_q.weight",
    "key.weight": "attn.to_k.weight",
    "value.weight": "attn.to_v.weight",
    "out.weight": "attn.to_out.weight",
    "mlp_norm.gain": "ff.0.gamma",
    "mlp_in": "ff.1",
    "mlp_out": "ff.3",
}
_FUSION = {"depthwise": "{0}.0", "pointwise": "{0}.1", "norm": "{0}.2", "mix": "{1}.0", "mix_norm": "{1}.1"}
# Where a fusion rearranges first, or between its halves, the rearranging has a number of its own.
_FUSION_INDICES = ((1, 2), (1, 2), (0, 1), (0, 2))


class VfmVae(Importer):
    """A training file (``G_ema`` is taken), or its state dict alone, to a tokenizer.

    All sizes of the networks are read off the tensors. `LEFT_OUT` lists what is not taken; constants among it are
    checked. The authors offer their weights for research use only.
    """

    def __init__(self, config: ImporterConfig) -> None:
        self._config = config

    def read(self, source: str) -> Tokenizer:
        """Return the tokenizer, without latent statistics, which lie in another file of the authors.

        Raises:
            DataError: The file is of another layout, or was trained on another encoder than the options say.
            ConfigError: The options do not make an encoder.
        """
        state = load_weights(source, nested=("G_ema",))
        sizes = _Sizes.of(state, source)
        encoder = underpaint.create("encoder", self._config.encoder, **self._config.options)
        assert isinstance(encoder, Encoder)
        sizes.check_encoder(encoder, source)
        _check_copy(state, encoder, source)
        adapter = underpaint.create(
            "adapter",
            "vfmvae/adapter",
            in_channels=encoder.info.channels,
            latent_channels=sizes.latent,
            width=sizes.width,
            stride=sizes.merge,
        )
        assert isinstance(adapter, Adapter)
        noise = "learned" if sizes.noise else "none"
        with torch.device("meta"):
            pattern = _decoder(sizes, noise)
        wanted = {**_adapter_keys(adapter), **_decoder_keys(pattern)}
        _check_keys(state, wanted, source)
        _check_constants(state, source)
        values = {ours: _shaped(state[theirs], like, theirs, source) for ours, (theirs, like) in wanted.items()}
        weights = _part(values, "decoder.")
        if self._config.noise == "fold" and sizes.noise:
            noise, weights = "fixed", _folded(weights)
        decoder = _decoder(sizes, noise)
        adapter.load_state_dict(_part(values, "adapter."))
        decoder.load_state_dict(weights)
        about = {
            "title": "VFM-VAE",
            "facts": [
                "Imported from the published weights of VFM-VAE (Bi et al. 2025, arXiv 2510.18457).",
                "Their authors offer them for research use only.",
                f"Noise maps: {_NOISE[noise]}.",
                *_left_out(state),
            ],
        }
        return Tokenizer(encoder, adapter, decoder, about=about).eval()


@attrs.frozen(kw_only=True)
class _Sizes:
    """Sizes of the networks of a file."""

    channels: tuple[int, ...]
    latent: int
    width: int
    merge: int
    code: int
    base: int
    blocks: int
    depths: tuple[int, int]
    heads: int
    noise: bool

    @property
    def stride(self) -> int:
        return int(2 ** (self.blocks - 2))

    @classmethod
    def of(cls, state: Mapping[str, Tensor], source: str) -> _Sizes:
        def shape(key: str) -> tuple[int, ...]:
            if key not in state:
                raise _other_layout(state, source, f"it lacks '{key}'")
            return tuple(state[key].shape)

        def count(pattern: str) -> int:
            return len({match[0] for key in state if (match := re.match(pattern, key))})

        maps = count(r"ldm_adapter\.patch_quants\.\d+\.")
        blocks = count(r"synthesis\.blocks\.\d+\.")
        first = "ldm_adapter.patch_quants.{}.0.blocks.0"
        width = shape(f"{first.format(0)}.proj.weight")[0]
        joined = shape("ldm_adapter.final_quant.blocks.0.norm1.weight")[0]
        code, latent = shape("ldm_adapter.post_quant.blocks.0.proj.weight")
        return cls(
            channels=tuple(shape(f"{first.format(i)}.norm1.weight")[0] for i in range(maps)),
            latent=latent,
            width=width,
            merge=max(1, math.isqrt(joined // (maps * width))),
            code=code,
            base=shape(f"synthesis.blocks.{max(blocks - 1, 0)}.torgb.weight")[1],
            blocks=blocks,
            depths=(
                1 + count(r"synthesis\.blocks\.0\.convs1\.\d+\."),
                1 + count(rf"synthesis\.blocks\.{max(blocks - 1, 4)}\.convs1\.\d+\."),
            ),
            heads=shape("synthesis.blocks.0.self_attns.0.attn.null_kv")[1],
            noise="synthesis.blocks.0.conv0.noise_strength" in state,
        )

    def check_encoder(self, encoder: Encoder, source: str) -> None:
        info = encoder.info
        if info.channels != self.channels:
            raise DataError(
                f"The tokenizer in '{source}' takes maps of {', '.join(map(str, self.channels))} channels, and the "
                f"encoder '{encoder.spec.name}' gives {', '.join(map(str, info.channels))}; set the importer's options "
                "'encoder' and 'options' to what it was trained on."
            )
        if info.stride * self.merge != self.stride:
            raise DataError(
                f"The decoder in '{source}' has a stride of {self.stride} px, and its adapter merges "
                f"{self.merge}×{self.merge} cells of an encoder of stride {self.stride // self.merge}, but the stride "
                f"of '{encoder.spec.name}' is {info.stride}; set 'stride' in the importer's 'options'."
            )


# ------------------------------------------------------------------------------------------------ names


_Wanted = dict[str, tuple[str, Tensor]]
"""Our key to theirs, with the tensor whose shape is wanted."""


def _adapter_keys(adapter: Adapter) -> _Wanted:
    return {f"adapter.{ours}": (_adapter_key(ours), like) for ours, like in adapter.state_dict().items()}


def _adapter_key(ours: str) -> str:
    if match := re.match(r"maps\.(\d+)\.(.+)", ours):
        return f"ldm_adapter.patch_quants.{match[1]}.0.blocks.0.{_projection_key(match[2])}"
    return f"ldm_adapter.final_quant.blocks.0.{_projection_key(ours.removeprefix('final.'))}"


def _projection_key(ours: str) -> str:
    biases = {"attention.query_bias": "attn.q_bias", "attention.value_bias": "attn.v_bias"}
    return biases.get(ours) or _renamed(ours, _PROJECTION)


def _decoder_keys(decoder: Decoder) -> _Wanted:
    return {f"decoder.{ours}": (_decoder_key(ours), like) for ours, like in decoder.state_dict().items()}


def _decoder_key(ours: str) -> str:
    part, _, rest = ours.partition(".")
    if part == "expand":
        return f"ldm_adapter.post_quant.blocks.0.{_projection_key(rest)}"
    if part == "mapping":
        return f"mapping.mlp.{_renamed(rest, {'hidden': 'fc0', 'out': 'fc1'})}"
    index, _, rest = rest.partition(".")
    if part == "fusion":
        numbers = _FUSION_INDICES[int(index)]
        names = {name: pattern.format(*numbers) for name, pattern in _FUSION.items()}
        return f"synthesis.z_convs.{index}.{_renamed(rest, names)}"
    return f"synthesis.blocks.{index}.{_block_key(rest)}"


def _block_key(ours: str) -> str:
    part, _, rest = ours.partition(".")
    if part == "rgb":
        return "torgb." + (rest if rest in ("weight", "bias") else _renamed(rest, {"style": "affine.proj"}))
    if part in ("upsample", "rgb_upsample"):
        return f"{'seperate' if part == 'upsample' else 'last'}_upsample_conv.{rest}"
    index, _, rest = rest.partition(".")
    if part == "attention":
        return f"self_attns.{index}.{_ATTENTION.get(rest) or _renamed(rest, _ATTENTION)}"
    layer = "conv0" if index == "0" else f"convs1.{int(index) - 1}"
    whole = {"gamma": "gamma", "noise.map": "noise_const", "noise.strength": "noise_strength"}
    return f"{layer}.{whole.get(rest) or _renamed(rest, _CONVNEXT)}"


def _renamed(ours: str, names: Mapping[str, str]) -> str:
    """Rename the module of ``module.weight`` or ``module.bias``."""
    module, _, leaf = ours.rpartition(".")
    return f"{names[module]}.{leaf}"


def _decoder(sizes: _Sizes, noise: str) -> Decoder:
    decoder = underpaint.create(
        "decoder",
        "vfmvae/decoder",
        latent_channels=sizes.latent,
        stride=sizes.stride,
        width=sizes.code,
        base=sizes.base,
        depths=sizes.depths,
        heads=sizes.heads,
        noise=noise,
    )
    assert isinstance(decoder, Decoder)
    return decoder


# ----------------------------------------------------------------------------------------------- checks


def _check_keys(state: Mapping[str, Tensor], wanted: _Wanted, source: str) -> None:
    taken = {theirs for theirs, _ in wanted.values()}
    missing = sorted(taken - state.keys())
    if missing:
        raise _other_layout(state, source, f"it lacks {_first(missing)}")
    strange = sorted(key for key in state.keys() - taken if not any(re.fullmatch(known, key) for known in LEFT_OUT))
    if strange:
        raise _other_layout(state, source, f"it has {_first(strange)}, which this layout does not know")


def _check_copy(state: Mapping[str, Tensor], encoder: Encoder, source: str) -> None:
    """Compare the encoder's own copy in the file, if it is there, with `encoder`, by the weights that see the image."""
    kernels = [parameter.detach() for parameter in encoder.parameters() if parameter.ndim == 4]
    advice = "set the importer's options 'encoder' and 'options' to what the tokenizer was trained on."
    for key, value in state.items():
        if not key.startswith("vfm_encoder.") or value.ndim != 4:
            continue
        same = [kernel for kernel in kernels if kernel.shape == value.shape]
        if not same:
            raise DataError(
                f"'{source}' was trained on another encoder than '{encoder.spec.name}', which has no weights of the "
                f"shape {list(value.shape)}, that of '{key}'; {advice}"
            )
        # Half precision, and the libraries' own ways of converting the same weights, leave far more than this.
        if not any(F.cosine_similarity(kernel.flatten(), value.flatten().to(kernel), dim=0) > 0.99 for kernel in same):
            raise DataError(
                f"'{source}' was trained on another encoder than '{encoder.spec.name}': '{key}' has other values than "
                f"its weights; {advice}"
            )


def _check_constants(state: Mapping[str, Tensor], source: str) -> None:
    for key, value in state.items():
        if key.endswith(".zero_k_bias"):
            right = not bool(value.any())
        elif key.endswith(".blur_weight"):
            right = torch.allclose(value.float(), _binomial(value.shape[-1]).expand_as(value), atol=1e-3)
            right &= value.shape[-1] == (3 if int(key.split(".")[2]) < 3 else 5)
        else:
            continue
        if not right:
            raise DataError(
                f"'{key}' in '{source}' is not the constant that VFM-VAE has there; a file of a changed network cannot "
                "be imported."
            )


def _binomial(side: int) -> Tensor:
    row = torch.tensor([float(math.comb(side - 1, k)) for k in range(side)])
    return torch.outer(row, row) / row.sum() ** 2


def _shaped(value: Tensor, like: Tensor, key: str, source: str) -> Tensor:
    # Some of their vectors carry axes of length 1.
    if [n for n in value.shape if n != 1] != [n for n in like.shape if n != 1]:
        raise DataError(
            f"'{key}' in '{source}' has the shape {list(value.shape)}, and the sizes of the other tensors ask for "
            f"{list(like.shape)}; the file is not of a VFM-VAE as published."
        )
    return value.reshape(like.shape).to(like.dtype)


def _other_layout(state: Mapping[str, Tensor], source: str, problem: str) -> DataError:
    heads = dict.fromkeys(key.partition(".")[0] for key in state)
    holds = f"it holds {len(state)} tensors under {_first(heads)}" if state else "it is empty"
    return DataError(
        f"'{source}' is not a tokenizer of VFM-VAE: {problem}; {holds}. Give the authors' training file, or the state "
        "dict under its 'G_ema'."
    )


def _first(keys: Mapping[str, Any] | list[str], limit: int = 3) -> str:
    names = [f"'{key}'" for key in keys]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ----------------------------------------------------------------------------------------------- values


def _left_out(state: Mapping[str, Tensor]) -> list[str]:
    """Say what of the file is not in the tokenizer, and why."""
    found = {pattern: [key for key in state if re.fullmatch(pattern, key)] for pattern in LEFT_OUT}
    return [
        f"Left out: {len(keys)} tensor{'s' * (len(keys) > 1)} such as '{keys[0]}' ({LEFT_OUT[pattern]})."
        for pattern, keys in found.items()
        if keys
    ]


def _part(values: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _folded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply every noise map by its factor, which then falls away."""
    folded = dict(weights)
    for name in weights:
        module, _, leaf = name.rpartition(".")
        if module.endswith(".noise") and leaf == "strength":
            folded[f"{module}.map"] = folded[f"{module}.map"] * folded.pop(name)
    return folded

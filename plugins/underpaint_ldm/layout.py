"""Published convolutional autoencoders in our parts: shapes, names of parameters, strictness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from underpaint import DataError, LatentStatistics, Tokenizer, create
from underpaint_ldm.layers import Attention, Double, Halve

__all__ = ["DIFFUSERS", "DIFFUSERS_LEGACY", "LDM", "Shape", "Spelling", "factors", "looks_like", "read"]


@attrs.frozen(kw_only=True)
class Shape:
    """What a published autoencoder is made of.

    Attributes:
        base: Channels that the first convolution of the encoder gives.
        widths: Channels of each level, from full resolution to the latent's.
        blocks: Residual blocks of an encoder level; the decoder's have one more.
        attention: Whether the deepest level of the encoder, and that of the decoder, has attention.
        latent_channels: d of the latent.
        quant_conv: Whether there is a 1×1 convolution after the encoder.
        post_quant_conv: Whether there is one before the decoder.
        groups: Groups of all normalisations.
    """

    base: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[bool, bool]
    latent_channels: int
    quant_conv: bool
    post_quant_conv: bool
    groups: int = 32

    @property
    def stride(self) -> int:
        """Pixels per latent cell, per side."""
        return int(2 ** (len(self.widths) - 1))


@attrs.frozen(kw_only=True)
class Spelling:
    """How a project names the layers. ``level`` counts from full resolution, ``order`` as the layers are run.

    Attributes:
        down: Residual block of an encoder level.
        down_attention: Attention after it.
        halve: Convolution between encoder levels.
        up: Residual block of a decoder level.
        up_attention: Attention after it.
        double: Convolution between decoder levels.
        middle: The three layers at the deepest resolution.
        norm_out: Last normalisation of ``part``.
        skip: Skip convolution of a residual block.
        attention: Norm, query, key, value and output of an attention layer.
    """

    down: str
    down_attention: str
    halve: str
    up: str
    up_attention: str
    double: str
    middle: tuple[str, str, str]
    norm_out: str
    skip: str
    attention: tuple[str, str, str, str, str]


LDM = Spelling(
    down="encoder.down.{level}.block.{block}",
    down_attention="encoder.down.{level}.attn.{block}",
    halve="encoder.down.{level}.downsample.conv",
    up="decoder.up.{level}.block.{block}",
    up_attention="decoder.up.{level}.attn.{block}",
    double="decoder.up.{level}.upsample.conv",
    middle=("{part}.mid.block_1", "{part}.mid.attn_1", "{part}.mid.block_2"),
    norm_out="{part}.norm_out",
    skip="nin_shortcut",
    attention=("norm", "q", "k", "v", "proj_out"),
)
DIFFUSERS = Spelling(
    down="encoder.down_blocks.{order}.resnets.{block}",
    down_attention="encoder.down_blocks.{order}.attentions.{block}",
    halve="encoder.down_blocks.{order}.downsamplers.0.conv",
    up="decoder.up_blocks.{order}.resnets.{block}",
    up_attention="decoder.up_blocks.{order}.attentions.{block}",
    double="decoder.up_blocks.{order}.upsamplers.0.conv",
    middle=("{part}.mid_block.resnets.0", "{part}.mid_block.attentions.0", "{part}.mid_block.resnets.1"),
    norm_out="{part}.conv_norm_out",
    skip="conv_shortcut",
    attention=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
)
# Files of the first diffusers versions, among them Stable Diffusion's own, keep these names.
DIFFUSERS_LEGACY = attrs.evolve(DIFFUSERS, attention=("group_norm", "query", "key", "value", "proj_attn"))


def read(
    form: str, shape: Shape, weights: Mapping[str, Tensor], spelling: Spelling, left_out: Mapping[str, str], source: str
) -> Tokenizer:
    """Make the tokenizer of published weights, in float32 and evaluation mode, without statistics.

    Args:
        form: Name of the importer.
        shape: What the weights belong to.
        weights: Published tensors by name.
        spelling: How they are named.
        left_out: Beginnings of names that have no place in a tokenizer, with the reason.
        source: Where they come from, for messages.

    Returns:
        The tokenizer. Its facts say what it was imported from, and how many tensors were left out for which reason.

    Raises:
        DataError: A tensor is missing, unknown or of another shape, or we have no such autoencoder.
    """
    tokenizer = _build(shape, source)
    counts = _fill(form, tokenizer, weights, spelling, left_out, source)
    name = PurePosixPath(source).name
    facts = [f"Imported as '{form}' from '{name}', whose licence holds for the weights."]
    facts += [f"{count} tensor(s) left out: {reason}." for reason, count in counts.items()]
    tokenizer.about.update({"title": f"The autoencoder '{name}'", "facts": facts})
    return tokenizer.eval()


def factors(channels: int, scale: float, shift: float, origin: str) -> LatentStatistics:
    """Return statistics with which `Tokenizer.standardise` gives (z − shift) · scale, as published models want it."""
    return LatentStatistics(
        mean=(shift,) * channels,
        std=(1.0 / scale,) * channels,
        count=0,
        data=f"published scale {scale:g} and shift {shift:g}: {origin}",
    )


def _build(shape: Shape, source: str) -> Tokenizer:
    if any(width % shape.base for width in shape.widths):
        raise DataError(
            f"The autoencoder '{source}' begins with {shape.base} channels and has levels of "
            f"{', '.join(map(str, shape.widths))}; only multiples of the first number can be imported."
        )
    multipliers = tuple(width // shape.base for width in shape.widths)
    common: dict[str, Any] = {"base": shape.base, "multipliers": multipliers, "groups": shape.groups}
    encoder = create("encoder", "ldm/encoder", blocks=shape.blocks, attention=shape.attention[0], **common)
    adapter = create(
        "adapter",
        "ldm/gaussian",
        quant_conv=shape.quant_conv,
        in_channels=encoder.info.channels,
        latent_channels=shape.latent_channels,
    )
    decoder = create(
        "decoder",
        "ldm/decoder",
        blocks=shape.blocks + 1,
        attention=shape.attention[1],
        post_quant_conv=shape.post_quant_conv,
        latent_channels=shape.latent_channels,
        stride=shape.stride,
        **common,
    )
    return Tokenizer(encoder, adapter, decoder)


def _fill(
    form: str,
    tokenizer: Tokenizer,
    state: Mapping[str, Tensor],
    spelling: Spelling,
    left_out: Mapping[str, str],
    source: str,
) -> dict[str, int]:
    wanted = dict(_names(tokenizer, spelling))
    own = tokenizer.state_dict()
    assert wanted.keys() == own.keys()
    used = {key for keys in wanted.values() for key in keys}
    counts: dict[str, int] = {}
    unknown = []
    for key in state:
        if key in used:
            continue
        reason = next((why for start, why in left_out.items() if key.startswith(start)), None)
        if reason is None:
            unknown.append(key)
        else:
            counts[reason] = counts.get(reason, 0) + 1
    missing = sorted(key for key in used if key not in state)
    shapes = []
    for name, keys in wanted.items():
        rows = own[name].shape[0] // len(keys)
        expected = (rows, *own[name].shape[1:])
        # Attention is a linear layer here, and a 1×1 convolution in LDM.
        allowed = (expected, (*expected, 1, 1)) if len(expected) == 2 else (expected,)
        shapes += [
            f"{key} of {_sides(state[key].shape)} instead of {_sides(expected)}"
            for key in keys
            if key in state and tuple(state[key].shape) not in allowed
        ]
    faults = [
        f"{len(found)} {label} ({', '.join(found[:3])}{', …' * (len(found) > 3)})"
        for label, found in (("missing", missing), ("unknown", sorted(unknown)), ("of another shape", shapes))
        if found
    ]
    if faults:
        raise DataError(f"The weights '{source}' do not fit: {'; '.join(faults)}. {looks_like(state, form)}")
    tokenizer.load_state_dict(
        {
            name: torch.cat([state[key] for key in keys]).reshape(own[name].shape).float()
            for name, keys in wanted.items()
        }
    )
    return counts


def looks_like(keys: Mapping[str, Tensor], form: str) -> str:
    """Say what a file seems to hold, and how to import that, when the importer `form` could not."""
    for part, (forms, sentence) in _SIGNS.items():
        if any(part in key for key in keys):
            return "The rest is as it should be: the file is incomplete or was changed." if form in forms else sentence
    return f"Its first tensors are {', '.join(repr(key) for key in sorted(keys)[:3])}; check what file this is."


_SIGNS = {
    "quantize.embedding": (
        (),
        "It is a vector-quantised autoencoder, whose latents are not Gaussian; take a KL one.",
    ),
    "_blocks.0.resnets": (
        ("diffusers",),
        "It is in the layout of diffusers; import its folder, with config.json, as 'diffusers'.",
    ),
    "linear_proj.": (("va-vae",), "It looks like VA-VAE; import it as 'va-vae'."),
    "first_stage_model.": (("ldm",), "It looks like a whole latent diffusion model; import its autoencoder as 'ldm'."),
    "quant_conv.": (("ldm", "va-vae"), "It looks like an LDM autoencoder; import it as 'ldm'."),
    "encoder.down.": (
        ("flux-vae", "ldm"),
        "It looks like an autoencoder without quant_conv, such as FLUX's; import it as 'flux-vae'.",
    ),
    "blocks.": (
        (),
        "It looks like a transformer, not like an autoencoder; 'underpaint plugins list importer' shows all importers.",
    ),
}
"""By a part of a tensor's name: the importers that it is for, and what to say to the others.

The first that is found decides, so the particular stand before the general.
"""


def _sides(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "one number"


def _names(tokenizer: Tokenizer, spelling: Spelling) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield our name of every parameter with theirs: one, or three that are joined."""
    for part in ("encoder", "decoder"):
        module = getattr(tokenizer, part)
        yield from _plain(f"{part}.conv_in", f"{part}.conv_in")
        for place, layer, theirs in _layers(module.levels, spelling, part):
            yield from _parameters(f"{part}.levels.{place}", layer, theirs, spelling)
        for place, (layer, theirs) in enumerate(zip(module.middle, spelling.middle, strict=True)):
            yield from _parameters(f"{part}.middle.{place}", layer, theirs.format(part=part), spelling)
        yield from _plain(f"{part}.norm_out", spelling.norm_out.format(part=part))
    # Ours ends the encoder before its last convolution, which is the adapter's.
    yield from _plain("adapter.conv_out", "encoder.conv_out")
    yield from _plain("decoder.conv_out", "decoder.conv_out")
    if isinstance(tokenizer.adapter.quant_conv, nn.Conv2d):
        yield from _plain("adapter.quant_conv", "quant_conv")
    if isinstance(tokenizer.decoder.post_quant_conv, nn.Conv2d):
        yield from _plain("decoder.post_quant_conv", "post_quant_conv")


def _plain(ours: str, theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for kind in ("weight", "bias"):
        yield f"{ours}.{kind}", (f"{theirs}.{kind}",)


def _layers(levels: nn.Sequential, spelling: Spelling, part: str) -> Iterator[tuple[int, nn.Module, str]]:
    """Yield each layer of the levels with its place and with their name of it."""
    last = sum(isinstance(layer, (Halve, Double)) for layer in levels)
    down = part == "encoder"
    order = blocks = 0
    for place, layer in enumerate(levels):
        where = {"order": order, "level": order if down else last - order}
        if isinstance(layer, (Halve, Double)):
            yield place, layer, (spelling.halve if down else spelling.double).format(**where)
            order, blocks = order + 1, 0
        elif isinstance(layer, Attention):
            template = spelling.down_attention if down else spelling.up_attention
            yield place, layer, template.format(block=blocks - 1, **where)
        else:
            yield place, layer, (spelling.down if down else spelling.up).format(block=blocks, **where)
            blocks += 1


def _parameters(ours: str, layer: nn.Module, theirs: str, spelling: Spelling) -> Iterator[tuple[str, tuple[str, ...]]]:
    normalise, query, key, value, out = spelling.attention
    parts = {"norm": (normalise,), "qkv": (query, key, value), "out": (out,), "skip": (spelling.skip,)}
    for name in layer.state_dict():
        module, _, kind = name.rpartition(".")
        if isinstance(layer, (Halve, Double)):
            yield f"{ours}.{name}", (f"{theirs}.{kind}",)
        else:
            yield f"{ours}.{name}", tuple(f"{theirs}.{leaf}.{kind}" for leaf in parts.get(module, (module,)))

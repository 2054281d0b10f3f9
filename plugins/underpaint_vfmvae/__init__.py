"""VFM-VAE (Bi et al. 2025, arXiv 2510.18457): adapter, multi-scale decoder, pyramid loss, importer and recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from underpaint import hookimpl

_SOURCE = "Bi et al. 2025, arXiv 2510.18457"


@hookimpl
def register_adapters(register: Any) -> None:
    """Register ``vfmvae/adapter``."""
    register(
        "vfmvae/adapter",
        "underpaint_vfmvae.adapter:Adapter",
        config="underpaint_vfmvae.config:AdapterConfig",
        tiny={"width": 8},
        summary="Attention projections of several layers, joined and merged to a Gaussian latent",
        source=_SOURCE,
    )


@hookimpl
def register_decoders(register: Any) -> None:
    """Register ``vfmvae/decoder``."""
    register(
        "vfmvae/decoder",
        "underpaint_vfmvae.decoder:Decoder",
        config="underpaint_vfmvae.config:DecoderConfig",
        tiny={"width": 32, "base": 16, "depths": (2, 1), "heads": 4},
        summary="Style-modulated ConvNeXt blocks from a quarter of the latent grid up, an image at every size; 128 M",
        source=_SOURCE,
        expected_failures={
            "pixels_in_place": "It normalises the channels of a cell, so it cannot see a shift of all of them at once.",
        },
    )


@hookimpl
def register_losses(register: Any) -> None:
    """Register ``vfmvae/pyramid``."""
    register(
        "vfmvae/pyramid",
        "underpaint_vfmvae.pyramid:Pyramid",
        config="underpaint_vfmvae.config:PyramidConfig",
        summary="Mean absolute errors of the decoder's coarser images, summed over their sizes",
        source=_SOURCE,
        expected_failures={
            "finite_at_the_optimum": "It refuses a decoder without coarser images, and the kit's optimum has none.",
        },
    )


@hookimpl
def register_importers(register: Any) -> None:
    """Register ``vfm-vae``."""
    register(
        "vfm-vae",
        "underpaint_vfmvae.importer:VfmVae",
        config="underpaint_vfmvae.config:ImporterConfig",
        summary="Published VFM-VAE tokenizers: the averaged generator ('G_ema') of a training file",
        licence="research use only, as their authors state",
        source=_SOURCE,
    )


@hookimpl
def register_recipes(register: Any) -> None:
    """Register every recipe of the folder ``recipes`` under the name of its file."""
    register.folder(Path(__file__).with_name("recipes"))

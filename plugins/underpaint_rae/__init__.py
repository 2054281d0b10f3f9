"""RAE (Zheng et al. 2025, arXiv 2510.11690): frozen features as latents, ViT decoders, published weights, recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from underpaint import hookimpl

_SOURCE = "Zheng et al. 2025, arXiv 2510.11690"

# Width, depth, heads, MLP width and millions of parameters at 768 channels and stride 16.
_DECODERS = {
    "b": (768, 12, 12, 3072, "86 M"),
    "l": (1024, 24, 16, 4096, "304 M"),
    "xl": (1152, 28, 16, 4096, "415 M"),
}


@hookimpl
def register_adapters(register: Any) -> None:
    """Register ``rae/identity``."""
    register(
        "rae/identity",
        "underpaint_rae.adapter:Identity",
        config="underpaint_rae.config:IdentityConfig",
        context={"in_channels": (12, 8), "latent_channels": 8},
        summary="The encoder's last map itself is the latent, with noise while training",
        source=_SOURCE,
    )


@hookimpl
def register_decoders(register: Any) -> None:
    """Register ``rae/vit-b``, ``rae/vit-l`` and ``rae/vit-xl``."""
    for size, (width, depth, heads, hidden, parameters) in _DECODERS.items():
        register(
            f"rae/vit-{size}",
            "underpaint_rae.decoder:ViTDecoder",
            config="underpaint_rae.config:ViTDecoderConfig",
            options={"width": width, "depth": depth, "heads": heads, "hidden": hidden},
            tiny={"width": 16, "depth": 2, "heads": 2, "hidden": 32},
            summary=f"MAE-style ViT-{size.upper()} decoder, one patch for each latent cell, {parameters} parameters",
            source=_SOURCE,
        )


@hookimpl
def register_importers(register: Any) -> None:
    """Register ``rae``."""
    register(
        "rae",
        "underpaint_rae.importer:RaeImporter",
        config="underpaint_rae.config:ImportConfig",
        summary="Decoder file of RAE, with its encoder and latent statistics",
        source="github bytetriper/RAE",
    )


@hookimpl
def register_recipes(register: Any) -> None:
    """Register every recipe of the folder ``recipes`` under the name of its file."""
    register.folder(Path(__file__).with_name("recipes"))

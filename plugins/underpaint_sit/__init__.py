"""Scalable interpolant transformers (Ma et al. 2024), and their training with encoders: REPA and REG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from underpaint import hookimpl

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Blocks, width and heads of the published sizes (Peebles & Xie 2023)."""


@hookimpl
def register_backbones(register: Any) -> None:
    """Register ``sit/S-1`` to ``sit/XL-8``: four sizes, four patch sizes; and ``reg/S-1`` to ``reg/XL-2``."""
    for size, (depth, width, heads) in SIZES.items():
        for patch in (1, 2, 4, 8):
            register(
                f"sit/{size}-{patch}",
                "underpaint_sit.model:SiT",
                config="underpaint_sit.config:SiTConfig",
                options={"depth": depth, "width": width, "heads": heads, "patch": patch},
                tiny={"depth": 2, "width": 64, "heads": 4},
                context={"grid": (2 * patch, 2 * patch)} if patch > 1 else None,
                summary=f"{depth} blocks of width {width}, {patch}×{patch} latent cells a token",
                source="Ma et al. 2024 (SiT), Peebles & Xie 2023 (DiT)",
            )
        for patch in (1, 2):
            register(
                f"reg/{size}-{patch}",
                "underpaint_sit.reg:REG",
                config="underpaint_sit.config:REGConfig",
                options={"depth": depth, "width": width, "heads": heads, "patch": patch},
                tiny={"depth": 2, "width": 64, "heads": 4, "companion": 24},
                summary=f"sit/{size}-{patch} that denoises a vector of the image beside the latent",
                source="Wu et al. 2025 (REG)",
            )


@hookimpl
def register_losses(register: Any) -> None:
    """Register ``repa`` and ``companion``."""
    register(
        "repa",
        "underpaint_sit.alignment:Repa",
        config="underpaint_sit.config:RepaConfig",
        tiny={"encoder": "tiny/vit@random", "options": {"width": 16, "depth": 1, "heads": 2}, "projector": 16},
        summary="Hidden states of the backbone against features of a frozen encoder; trains a projector",
        source="Yu et al. 2024 (REPA), Singh et al. 2025 (iREPA)",
    )
    register(
        "companion",
        "underpaint_sit.companion:Companion",
        summary="Mean squared error of the velocity of a backbone's companion vector",
        source="Wu et al. 2025 (REG)",
    )


@hookimpl
def register_recipes(register: Any) -> None:
    """Register every recipe of the folder ``recipes`` under the name of its file."""
    register.folder(Path(__file__).with_name("recipes"))


@hookimpl
def register_importers(register: Any) -> None:
    """Register ``dit``, ``sit``, ``repa`` and ``reg``, which share one layout."""
    for name, target, summary in (
        ("dit", "DiTImporter", "DiT; its sampler guides channels 0 to 2 only"),
        ("sit", "SiTImporter", "SiT, without the variance; its sampler guides channels 0 to 2 only"),
        ("repa", "RepaImporter", "SiT trained with REPA, without its projectors; its sampler guides all channels"),
        ("reg", "REGImporter", "SiT trained with REG, without its projectors; its sampler guides all channels"),
    ):
        register(
            name,
            f"underpaint_sit.importers:{target}",
            config="underpaint_sit.config:ImportConfig",
            summary=f"Backbone and labels of {summary}",
        )

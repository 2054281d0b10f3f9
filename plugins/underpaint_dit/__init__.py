"""Diffusion transformers (Peebles & Xie 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from underpaint import hookimpl

_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@hookimpl
def register_losses(register: Any) -> None:
    """Register ``dit/hybrid``."""
    register(
        "dit/hybrid",
        "underpaint_dit.hybrid:Hybrid",
        summary="Squared error of the noise, and the likelihood's bound for the variance, as DiT is trained",
        source="Nichol & Dhariwal 2021; Peebles & Xie 2023 (DiT)",
    )


@hookimpl
def register_backbones(register: Any) -> None:
    """Register ``dit/S-2`` to ``dit/XL-8``: four sizes, three patch sizes."""
    for size, (depth, width, heads) in _SIZES.items():
        for patch in (2, 4, 8):
            register(
                f"dit/{size}-{patch}",
                "underpaint_dit.model:DiT",
                config="underpaint_dit.config:DiTConfig",
                options={"depth": depth, "width": width, "heads": heads, "patch": patch},
                tiny={"depth": 2, "width": 64, "heads": 4},
                context={"grid": (2 * patch, 2 * patch)},
                summary=f"{depth} blocks of width {width}, {patch}×{patch} latent cells a token; predicts noise",
                source="Peebles & Xie 2023 (DiT)",
            )


@hookimpl
def register_recipes(register: Any) -> None:
    """Register every recipe of the folder ``recipes`` under the name of its file."""
    register.folder(Path(__file__).with_name("recipes"))

"""LightningDiT (Yao et al. 2025) and DiT^DH (Zheng et al. 2025)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from underpaint import hookimpl

SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "1p0B": (24, 1536, 24),
    "1p6B": (28, 1792, 28),
}
"""Depth, width and heads by size. LightningDiT has no S; it is DiT's."""
DH_SIZES = ("S", "B", "L", "XL")
"""Sizes of DiT^DH: those of its conditioning transformer."""


@hookimpl
def register_backbones(register: Any) -> None:
    """Register ``lightningdit/S-1`` to ``lightningdit/1p6B-2`` and ``ditdh/S`` to ``ditdh/XL``."""
    for size, (depth, width, heads) in SIZES.items():
        for patch in (1, 2):
            register(
                f"lightningdit/{size}-{patch}",
                "underpaint_lightningdit.model:LightningDiT",
                config="underpaint_lightningdit.config:LightningDiTConfig",
                options={"depth": depth, "width": width, "heads": heads, "patch": patch},
                tiny={"depth": 2, "width": 64, "heads": 4},
                context={"grid": (4, 4)} if patch > 1 else None,
                summary=f"{depth} blocks of width {width}, {patch}×{patch} latent cells a token; SwiGLU, RoPE, QK-norm",
                source="Yao et al. 2025 (LightningDiT)",
            )
    for size in DH_SIZES:
        depth, width, heads = SIZES[size]
        register(
            f"ditdh/{size}",
            "underpaint_lightningdit.ditdh:DiTDH",
            config="underpaint_lightningdit.config:DiTDHConfig",
            options={"depth": depth, "width": width, "heads": heads},
            tiny={"depth": 2, "width": 64, "heads": 4, "head_depth": 1, "head_width": 64, "head_heads": 4},
            summary=f"{depth} blocks of width {width} condition a head of 2 blocks of width 2048; one token a cell",
            source="Zheng et al. 2025 (RAE)",
        )


@hookimpl
def register_recipes(register: Any) -> None:
    """Register every recipe of the folder ``recipes`` under the name of its file."""
    register.folder(Path(__file__).with_name("recipes"))


@hookimpl
def register_importers(register: Any) -> None:
    """Register ``lightningdit`` and ``rae-dit``."""
    register(
        "lightningdit",
        "underpaint_lightningdit.import_lightningdit:LightningDiTImporter",
        summary="LightningDiT's checkpoints: backbone and label table",
        licence="MIT",
        source="Yao et al. 2025 (LightningDiT)",
    )
    register(
        "rae-dit",
        "underpaint_lightningdit.import_rae:RAEImporter",
        summary="DiT^DH checkpoints of RAE: backbone and label table",
        licence="MIT",
        source="Zheng et al. 2025 (RAE)",
    )

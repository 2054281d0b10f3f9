"""Scalable interpolant transformers (Ma et al. 2024): the transformer of DiT (Peebles & Xie 2023) on a flow."""

from __future__ import annotations

from typing import Any

from underpaint import hookimpl

_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@hookimpl
def register_backbones(register: Any) -> None:
    """Register ``sit/S-1`` to ``sit/XL-8``: four sizes, four patch sizes."""
    for size, (depth, width, heads) in _SIZES.items():
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

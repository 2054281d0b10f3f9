"""A small vision transformer of our own, for quick runs and tests without downloads."""

from __future__ import annotations

from typing import Any

from underpaint import hookimpl


@hookimpl
def register_encoders(register: Any) -> None:
    """Register ``tiny/vit``."""
    register(
        "tiny/vit",
        "underpaint_tiny.encoder:TinyViT",
        config="underpaint_tiny.config:TinyViTConfig",
        takes_weights=True,
        tiny={"width": 48, "depth": 2, "heads": 2},
        summary="Small ViT for images of 32 to 128 px; random weights from a fixed seed, or '@file:PATH'.",
        licence="Apache-2.0",
        source="random initialisation",
    )

"""A small vision transformer of our own with its weights, for quick runs and tests without downloads."""

from __future__ import annotations

from pathlib import Path
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
        summary="Small ViT for 32 to 128 px, trained without labels on Tiny ImageNet; or '@random', '@file:PATH'.",
        licence="Apache-2.0",
        source="underpaint's recipe:tiny-encoder",
    )


@hookimpl
def register_losses(register: Any) -> None:
    """Register the losses that train ``tiny/vit``."""
    register(
        "tiny/contrast",
        "underpaint_tiny.contrast:Contrast",
        config="underpaint_tiny.config:ContrastConfig",
        tiny={"hidden": 32, "channels": 8, "pixels": 1.0},
        summary="Self-supervision of an encoder: a view finds its image among the batch (InfoNCE)",
        source="van den Oord et al. 2018, arXiv 1807.03748",
    )
    register(
        "tiny/supervised",
        "underpaint_tiny.supervised:Supervised",
        config="underpaint_tiny.config:SupervisedConfig",
        summary="Cross-entropy of a linear head on an encoder's pooled features",
    )


@hookimpl
def register_recipes(register: Any) -> None:
    """Register every recipe of the folder ``recipes`` under the name of its file."""
    register.folder(Path(__file__).with_name("recipes"))

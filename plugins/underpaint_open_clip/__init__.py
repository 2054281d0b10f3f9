"""The image towers of open_clip as encoders: CLIP, SigLIP, EVA-CLIP, MetaCLIP, DFN, Perception Encoder."""

from __future__ import annotations

from typing import Any

from underpaint import hookimpl


@hookimpl
def register_encoders(register: Any) -> None:
    """Register the family ``open_clip/*``."""
    register(
        "open_clip/*",
        "underpaint_open_clip.encoder:OpenClipEncoder",
        config="underpaint_open_clip.config:OpenClipConfig",
        takes_weights=True,
        models="underpaint_open_clip.models:names",
        examples=("open_clip/ViT-S-32@random", "open_clip/PE-Core-T-16-384@random"),
        summary="Every ViT image tower of open_clip; '@tag' takes published weights, '@file:PATH' yours.",
        licence="as published with each tag",
        source="open_clip",
    )

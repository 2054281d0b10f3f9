"""Texts as a condition, through frozen text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from underpaint import hookimpl

_CLIP = {"name": "text/open_clip", "options": {"model": "ViT-S-32-alt", "weights": "random"}}


@hookimpl
def register_conditioners(register: Any) -> None:
    """Register ``text/open_clip``, ``text/hf`` and ``text/joint``."""
    register(
        "text/open_clip",
        "underpaint_text.open_clip_text:OpenClipText",
        config="underpaint_text.config:OpenClipTextConfig",
        tiny=_CLIP["options"],
        summary="Text tower of a CLIP model of open_clip: its tokens and its pooled vector",
        licence="as published with each tag",
        source="open_clip",
    )
    register(
        "text/hf",
        "underpaint_text.hf:HuggingFaceText",
        config="underpaint_text.config:HuggingFaceTextConfig",
        tiny={"folder": "random", "length": 40},
        extra="text",
        summary="A local folder of a text encoder of transformers: T5, CLIP or a sentence encoder",
        licence="as published with each model",
        source="transformers",
    )
    register(
        "text/joint",
        "underpaint_text.joint:JointText",
        config="underpaint_text.config:JointTextConfig",
        tiny={"parts": [{**_CLIP, "tokens": "none"}, _CLIP, {**_CLIP, "tokens": "beside", "pooled": False}]},
        summary="Several text encoders at once, as Stable Diffusion 3 and FLUX have them",
        source="Esser et al. 2024 (Stable Diffusion 3)",
    )


@hookimpl
def on_train_start(folder: Path, config: Mapping[str, Any]) -> None:
    """Say of a few long texts only that they were cut, and count the others."""
    from underpaint_text.lost import losses

    losses.train(True)


@hookimpl
def on_stage_end(folder: Path, stage: str, step: int) -> None:
    """Say how many long texts of the stage were counted."""
    from underpaint_text.lost import losses

    losses.sum_up(f"Stage '{stage}': ")


@hookimpl
def on_train_end(folder: Path, error: BaseException | None) -> None:
    """Say how many were counted after the last stage, in samples of captions."""
    from underpaint_text.lost import losses

    losses.train(False)

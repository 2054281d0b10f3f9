"""Logging services."""

from __future__ import annotations

from typing import Any

from underpaint import hookimpl


@hookimpl
def register_trackers(register: Any) -> None:
    """Register ``tensorboard`` and ``wandb``."""
    register(
        "tensorboard",
        "underpaint_trackers.tensorboard:TensorBoard",
        summary="Event files for TensorBoard in the run folder",
    )
    register(
        "wandb",
        "underpaint_trackers.wandb:WeightsAndBiases",
        config="underpaint_trackers.config:WandbConfig",
        tiny={"mode": "offline"},
        extra="wandb",
        summary="Weights & Biases, online or offline",
    )

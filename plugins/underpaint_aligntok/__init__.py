"""AlignTok (Chen et al. 2025, arXiv 2509.25162): adapter, semantic preservation loss and recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from underpaint import hookimpl

_SOURCE = "Chen et al. 2025, arXiv 2509.25162; what the paper leaves open is ours"


@hookimpl
def register_adapters(register: Any) -> None:
    """Register ``aligntok/mlp``."""
    register(
        "aligntok/mlp",
        "underpaint_aligntok.adapter:Mlp",
        config="underpaint_aligntok.config:MlpConfig",
        summary="Two linear layers for each token, to a deterministic latent, or a Gaussian one if asked for",
        source=_SOURCE,
    )


@hookimpl
def register_losses(register: Any) -> None:
    """Register ``aligntok/semantic`` and ``aligntok/latent-scale``."""
    register(
        "aligntok/semantic",
        "underpaint_aligntok.semantic:Semantic",
        config="underpaint_aligntok.config:SemanticConfig",
        summary="Distance of the latent to that of the frozen teacher (semantic preservation)",
        source=_SOURCE,
    )
    register(
        "aligntok/latent-scale",
        "underpaint_aligntok.semantic:LatentScale",
        summary="Logs the standard deviation of the latent's channels; for the weight 0",
        expected_failures={"gradients_reach_outputs": "It only measures."},
    )


@hookimpl
def register_recipes(register: Any) -> None:
    """Register every recipe of the folder ``recipes`` under the name of its file."""
    register.folder(Path(__file__).with_name("recipes"))

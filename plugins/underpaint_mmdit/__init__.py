"""Transformers of text-to-image models: MMDiT of Stable Diffusion 3 (Esser et al. 2024), and FLUX.1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from underpaint import hookimpl

_TEXT = {"token_dim": 6}
_MMDIT_TINY = {"depth": 2, "width": 32, "heads": 4, "table": 8}
_FLUX_TINY = {"double": 1, "single": 1, "width": 32, "heads": 4, "axes": [2, 2, 4]}

# Blocks, side of the table of positions, normalisation of queries and keys, blocks with a second attention.
_PUBLISHED = {
    "sd3-medium": (24, 192, "none", 0),
    "sd3.5-medium": (24, 384, "rms", 13),
    "sd3.5-large": (38, 192, "rms", 0),
}


@hookimpl
def register_backbones(register: Any) -> None:
    """Register ``mmdit/*`` and ``flux/*``: sizes to train, and those of published models."""
    for depth in (6, 12, 24):
        for patch in (1, 2):
            _mmdit(register, f"d{depth}-{patch}", depth, 64, "rms", 0, patch)
    for name, (depth, table, qk_norm, dual) in _PUBLISHED.items():
        _mmdit(register, name, depth, table, qk_norm, dual, 2)
    for patch in (1, 2):
        _flux(register, f"B-{patch}", 768, 12, 3, 6, patch)
        _flux(register, f"2b-{patch}", 2048, 16, 7, 15, patch)
    _flux(register, "dev", 3072, 24, 19, 38, 2, guidance=3.5)
    _flux(register, "schnell", 3072, 24, 19, 38, 2)


def _mmdit(register: Any, name: str, depth: int, table: int, qk_norm: str, dual: int, patch: int) -> None:
    register(
        f"mmdit/{name}",
        "underpaint_mmdit.mmdit:MMDiT",
        config="underpaint_mmdit.config:MMDiTConfig",
        options={
            "depth": depth,
            "width": 64 * depth,
            "heads": depth,
            "patch": patch,
            "qk_norm": qk_norm,
            "table": table,
            "dual": dual,
        },
        tiny={**_MMDIT_TINY, "dual": min(dual, 1)},
        context=_TEXT,
        summary=f"{depth} joint blocks of width {64 * depth}, {patch}×{patch} latent cells a token",
        source="Esser et al. 2024 (Stable Diffusion 3)",
    )


def _flux(
    register: Any,
    name: str,
    width: int,
    heads: int,
    double: int,
    single: int,
    patch: int,
    guidance: float | None = None,
) -> None:
    head = width // heads
    register(
        f"flux/{name}",
        "underpaint_mmdit.flux:Flux",
        config="underpaint_mmdit.config:FluxConfig",
        options={
            "double": double,
            "single": single,
            "width": width,
            "heads": heads,
            "patch": patch,
            "axes": [head // 8, head * 7 // 16, head * 7 // 16],
            "guidance": guidance,
        },
        tiny=_FLUX_TINY,
        context=_TEXT,
        summary=f"{double} double and {single} single blocks of width {width}, {patch}×{patch} latent cells a token",
        source="Black Forest Labs 2024 (FLUX.1)",
    )


@hookimpl
def register_importers(register: Any) -> None:
    """Register ``sd3`` and ``flux``."""
    register(
        "sd3",
        "underpaint_mmdit.import_sd3:SD3Importer",
        summary="Transformer of Stable Diffusion 3 and 3.5, from a published file",
        source="Esser et al. 2024 (Stable Diffusion 3)",
    )
    register(
        "flux",
        "underpaint_mmdit.import_flux:FluxImporter",
        summary="Transformer of FLUX.1, from a published file",
        source="Black Forest Labs 2024 (FLUX.1)",
    )


@hookimpl
def register_recipes(register: Any) -> None:
    """Register every recipe of the folder ``recipes`` under the name of its file."""
    register.folder(Path(__file__).with_name("recipes"))

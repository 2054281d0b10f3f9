"""The convolutional decoder of latent diffusion models."""

from __future__ import annotations

from typing import Any

from underpaint import hookimpl


@hookimpl
def register_decoders(register: Any) -> None:
    """Register ``ldm/decoder``."""
    register(
        "ldm/decoder",
        "underpaint_ldm.decoder:Decoder",
        config="underpaint_ldm.config:DecoderConfig",
        tiny={"base": 32, "blocks": 1},
        summary="Convolutional decoder of LDM and VA-VAE, 41.4 M parameters at stride 16",
        source="Rombach et al. 2022; settings of Yao et al. 2025 (VA-VAE)",
    )

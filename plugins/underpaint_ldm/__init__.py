"""The convolutional autoencoder of latent diffusion models: its parts, KL-VAE and VA-VAE, and importers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from underpaint import hookimpl

_SOURCE = "Rombach et al. 2022; settings of Yao et al. 2025 (VA-VAE)"


@hookimpl
def register_encoders(register: Any) -> None:
    """Register ``ldm/encoder``."""
    register(
        "ldm/encoder",
        "underpaint_ldm.encoder:Encoder",
        config="underpaint_ldm.config:EncoderConfig",
        tiny={"base": 32, "multipliers": [1, 1, 2], "blocks": 1},
        summary="Convolutional encoder of LDM and VA-VAE, trained from scratch; 28.4 M parameters with its adapter",
        source=_SOURCE,
        expected_failures={
            "cells_in_place": "Published halvings pad below and on the right only: a cell of the map is centred on the "
            "lower right corner of its pixels, and the normalisations span the whole image."
        },
    )


@hookimpl
def register_adapters(register: Any) -> None:
    """Register ``ldm/gaussian``."""
    register(
        "ldm/gaussian",
        "underpaint_ldm.gaussian:Gaussian",
        config="underpaint_ldm.config:GaussianConfig",
        summary="Convolution to mean and log-variance of a latent, for the loss 'kl'",
        source=_SOURCE,
    )


@hookimpl
def register_decoders(register: Any) -> None:
    """Register ``ldm/decoder``."""
    register(
        "ldm/decoder",
        "underpaint_ldm.decoder:Decoder",
        config="underpaint_ldm.config:DecoderConfig",
        tiny={"base": 32, "blocks": 1},
        summary="Convolutional decoder of LDM and VA-VAE, 41.4 M parameters at stride 16",
        source=_SOURCE,
    )


@hookimpl
def register_importers(register: Any) -> None:
    """Register ``ldm``, ``flux-vae``, ``va-vae`` and ``diffusers``."""
    register(
        "ldm",
        "underpaint_ldm.importers:Ldm",
        config="underpaint_ldm.config:LdmConfig",
        summary="KL autoencoder of LDM and Stable Diffusion: a file of it alone, or of the whole diffusion model",
        source="Rombach et al. 2022",
    )
    register(
        "flux-vae",
        "underpaint_ldm.importers:FluxVae",
        config="underpaint_ldm.config:FluxVaeConfig",
        summary="Autoencoder of FLUX.1: ae.safetensors",
        source="Black Forest Labs 2024",
    )
    register(
        "va-vae",
        "underpaint_ldm.importers:VaVae",
        config="underpaint_ldm.config:VaVaeConfig",
        summary="VA-VAE, stride 16: its weights file, and the statistics of its latents as an option",
        source="Yao et al. 2025",
    )
    register(
        "diffusers",
        "underpaint_ldm.folders:Diffusers",
        summary="Folder of diffusers' AutoencoderKL: config.json and diffusion_pytorch_model.safetensors",
    )


@hookimpl
def register_recipes(register: Any) -> None:
    """Register every recipe of the folder ``recipes`` under the name of its file."""
    register.folder(Path(__file__).with_name("recipes"))

"""Built-in losses of tokenizers and of flows."""

from __future__ import annotations

from typing import Any

from underpaint import hookimpl


@hookimpl
def register_losses(register: Any) -> None:
    """Register ``l1``, ``mse``, ``kl``, ``velocity``, ``features``, ``lpips``, ``ssim`` and ``vf``."""
    register("l1", "underpaint_losses.pixels:L1", summary="Mean absolute error of the pixels")
    register("mse", "underpaint_losses.pixels:Mse", summary="Mean squared error of the pixels")
    register("kl", "underpaint_losses.kl:Kl", summary="KL divergence of the latent posterior from N(0, I)")
    register(
        "velocity",
        "underpaint_losses.velocity:Velocity",
        config="underpaint_losses.config:VelocityConfig",
        summary="Mean squared error of the velocity, with LightningDiT's cosine term if asked for",
        source="Lipman et al. 2023; cosine term of Yao et al. 2025",
    )
    register(
        "features",
        "underpaint_losses.features:FeatureDistance",
        config="underpaint_losses.config:FeaturesConfig",
        tiny={"encoder": "tiny/vit@random"},
        summary="Perceptual distance on the features of any registered encoder",
    )
    register(
        "lpips",
        "underpaint_losses.lpips:Lpips",
        config="underpaint_losses.config:LpipsConfig",
        tiny={"weights": "random"},
        summary="LPIPS on VGG-16, found in torch's hub folder, downloaded, or given as a file",
        source="Zhang et al. 2018",
    )
    register(
        "ssim",
        "underpaint_losses.ssim:Ssim",
        summary="1 − structural similarity, Gaussian window of 11 px",
        source="Wang et al. 2004",
    )
    register(
        "vf",
        "underpaint_losses.vf:VisionAlignment",
        config="underpaint_losses.config:VfConfig",
        summary="Alignment of latents with the features of the tokenizer's encoder, or of another",
        source="Yao et al. 2025 (VA-VAE)",
    )

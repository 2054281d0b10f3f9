"""Built-in losses of tokenizers and of flows."""

from __future__ import annotations

from typing import Any

from underpaint import hookimpl


@hookimpl
def register_losses(register: Any) -> None:
    """Register ``l1``, ``mse``, ``kl``, ``velocity``, ``features`` and ``lpips``."""
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
        summary="LPIPS on VGG-16; needs its weights as files",
        source="Zhang et al. 2018",
    )

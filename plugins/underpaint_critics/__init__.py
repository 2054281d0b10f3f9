"""Critics and the adversarial losses that own them."""

from __future__ import annotations

from typing import Any

from underpaint import hookimpl
from underpaint_critics.config import DINO

# Augmentation is drawn for each sample, so that with it no two batches have the same terms.
_TINY_PROJECTED = {
    "encoder": "tiny/vit@random",
    "options": {"width": 48, "depth": 2, "heads": 2},
    "layers": (0, 1),
    "summary": "pooled",
    "color": False,
    "translation": 0.0,
    "cutout": 0.0,
}


@hookimpl
def register_losses(register: Any) -> None:
    """Register ``critics/patchgan``, ``critics/multiscale``, ``critics/projected`` and its presets."""
    register(
        "critics/patchgan",
        "underpaint_critics.patchgan:PatchGan",
        config="underpaint_critics.config:PatchGanConfig",
        tiny={"channels": 4},
        summary="Adversarial loss with a PatchGAN critic, as in latent diffusion's autoencoders",
        source="Isola et al. 2017; Rombach et al. 2022",
    )
    register(
        "critics/multiscale",
        "underpaint_critics.patchgan:MultiScale",
        config="underpaint_critics.config:MultiScaleConfig",
        tiny={"channels": 4},
        summary="Adversarial loss with PatchGAN critics at several scales, and feature matching",
        source="Wang et al. 2018 (pix2pixHD)",
    )
    register(
        "critics/projected",
        "underpaint_critics.projected:Projected",
        config="underpaint_critics.config:ProjectedConfig",
        tiny=_TINY_PROJECTED,
        summary="Adversarial loss with critic heads on the frozen features of any registered encoder",
        source="Sauer et al. 2021 and 2023 (StyleGAN-T)",
    )
    register(
        "critics/vfm-vae",
        "underpaint_critics.projected:Projected",
        config="underpaint_critics.config:ProjectedConfig",
        options=DINO,
        tiny=_TINY_PROJECTED,
        summary="The projected critic of VFM-VAE, on DINO's ViT-S/16",
        source="Bi et al. 2025 (VFM-VAE)",
    )
    register(
        "critics/rae",
        "underpaint_critics.projected:Projected",
        config="underpaint_critics.config:ProjectedConfig",
        options={
            "encoder": "timm/vit_small_patch8_224@dino",
            "layers": (2, 5, 8, 11),
            "options": {"norm": "none"},
            "second_last_head": True,
            "summary": "none",
            "virtual_batch": 1,
            "cutout": 0.0,
            "crop": 0.0,
            "quantise": True,
        },
        tiny=_TINY_PROJECTED,
        summary="The projected critic with the settings of RAE's decoders",
        source="Zheng et al. 2025 (RAE)",
    )

"""Every vision transformer of timm as an encoder: DINOv2, DINOv3, SigLIP 2, MAE, CLIP, EVA-02, plain ViT."""

from __future__ import annotations

from typing import Any

from underpaint import hookimpl

# One small model for each way of position embedding, prefix tokens, pooling and final norm.
_EXAMPLES = (
    "timm/vit_tiny_patch16_224@random",
    "timm/vit_small_patch14_reg4_dinov2@random",
    "timm/vit_tiny_patch16_dinov3_qkvb@random",
    "timm/eva02_tiny_patch14_224@random",
    "timm/deit_tiny_distilled_patch16_224@random",
    "timm/test_vit3@random",  # pools by attention, as SigLIP does
)

_ALIASES = {
    "dinov2-s": "timm/vit_small_patch14_dinov2@lvd142m",
    "dinov2-b": "timm/vit_base_patch14_dinov2@lvd142m",
    "dinov2-l": "timm/vit_large_patch14_dinov2@lvd142m",
    "dinov2-g": "timm/vit_giant_patch14_dinov2@lvd142m",
    "dinov2-reg-s": "timm/vit_small_patch14_reg4_dinov2@lvd142m",
    "dinov2-reg-b": "timm/vit_base_patch14_reg4_dinov2@lvd142m",
    "dinov2-reg-l": "timm/vit_large_patch14_reg4_dinov2@lvd142m",
    "dinov3-s": "timm/vit_small_patch16_dinov3@lvd1689m",
    "dinov3-b": "timm/vit_base_patch16_dinov3@lvd1689m",
    "dinov3-l": "timm/vit_large_patch16_dinov3@lvd1689m",
    "siglip2-b": "timm/vit_base_patch16_siglip_256@v2_webli",
    "siglip2-l": "timm/vit_large_patch16_siglip_256@v2_webli",
    "siglip2-so400m": "timm/vit_so400m_patch16_siglip_256@v2_webli",
    "mae-b": "timm/vit_base_patch16_224@mae",
    "mae-l": "timm/vit_large_patch16_224@mae",
    "eva02-l": "timm/eva02_large_patch14_224@mim_m38m",
    # OpenAI trained with QuickGELU; timm's names without "quickgelu" put GELU in its place.
    "clip-b": "timm/vit_base_patch16_clip_quickgelu_224@openai",
    "clip-l": "timm/vit_large_patch14_clip_quickgelu_224@openai",
}


@hookimpl
def register_encoders(register: Any) -> None:
    """Register the family ``timm/*`` and the short names of its common models."""
    register(
        "timm/*",
        "underpaint_timm.encoder:TimmEncoder",
        config="underpaint_timm.config:TimmConfig",
        takes_weights=True,
        models="underpaint_timm.models:names",
        examples=_EXAMPLES,
        summary="Every vision transformer of timm; '@tag' takes timm's weights, '@random' none, '@file:PATH' yours.",
        licence="as timm states for each tag",
        source="timm",
    )
    for alias, name in _ALIASES.items():
        register.alias(alias, name)

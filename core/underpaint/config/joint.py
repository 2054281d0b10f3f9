"""What a stage that trains a denoiser with its tokenizer must fulfil."""

from __future__ import annotations

from underpaint.config.engine import EngineConfig
from underpaint.config.stages import StageConfig
from underpaint.errors import ConfigError

__all__ = ["check_joint"]


def check_joint(stage: StageConfig, path: str, engine: EngineConfig) -> None:
    """Refuse a stage whose denoiser could not train with the tokenizer.

    Args:
        stage: A stage with a denoiser.
        path: Where it stands in the recipe.
        engine: Settings of the run.

    Raises:
        ConfigError: The alignment would reach nothing that learns, the latents change their size, or the weights of
            the backbone are spread over the ranks.
    """
    if not any(part.partition(".")[0] in ("encoder", "adapter") for part in stage.trains):
        raise ConfigError(
            f"{path} has a denoiser, whose alignment trains encoder and adapter, and trains only "
            f"{', '.join(stage.trains)}; add one of the two to trains, or remove the denoiser."
        )
    if stage.equivariance is not None and stage.equivariance.input > 0.0:
        raise ConfigError(
            f"{path} has a denoiser, which is made for latents of one size, and equivariance.input is "
            f"{stage.equivariance.input}, which shrinks images; set equivariance.input to 0."
        )
    if engine.zero == 3:
        raise ConfigError(
            f"{path} has a denoiser, and engine.zero is 3, which leaves no rank with the whole backbone that the "
            "latent's gradient is taken through; set engine.zero to 2 or less."
        )

"""The adapter that adds nothing: a frozen encoder's features are the latent (RAE)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from underpaint import Adapter, ConfigError, Features, Posterior
from underpaint_rae.config import IdentityConfig

__all__ = ["Identity"]


class Identity(Adapter):
    """The last map as it is; in training mode with Gaussian noise, so that the decoder learns to bear it.

    The noise of a sample has the standard deviation σ = τ·U, U uniform in (0, 1] and drawn for each sample
    (rae.md §2.2). It is expressed as the variance of the posterior, so ``sample`` adds it and ``mode`` does not. Its
    ``kl`` is of no use: the posterior's width was chosen, not learned. In evaluation mode, or with τ = 0, the
    posterior is a point.

    There are no parameters, but there is a mode: a stage must count the adapter to the parts that train, or there is
    no noise.

    Raises:
        ConfigError: The latent is to have other channels than the last map.
    """

    stride = 1

    def __init__(self, config: IdentityConfig, *, in_channels: Sequence[int], latent_channels: int) -> None:
        super().__init__()
        if in_channels[-1] != latent_channels:
            raise ConfigError(
                f"The adapter 'rae/identity' passes the encoder's {in_channels[-1]} channels on as they are, and "
                f"{latent_channels} are asked for; set tokenizer.latent_channels to {in_channels[-1]}."
            )
        self.latent_channels = latent_channels
        self.tau = config.tau

    def forward(self, features: Features) -> Posterior:
        """Return the last map, B×d×h×w, with the noise's variance in training mode."""
        latents = features.maps[-1]
        if not self.training or self.tau == 0.0:
            return Posterior(latents)
        return Posterior(latents, self._logvar(latents).expand_as(latents))

    def _logvar(self, latents: Tensor) -> Tensor:
        # 1 − U is never 0, so the logarithm is finite; float32, because bfloat16 knows few numbers in [0, 1).
        share = 1.0 - torch.rand((latents.shape[0], 1, 1, 1), device=latents.device, dtype=torch.float32)
        return (2.0 * (self.tau * share).log()).to(latents.dtype)

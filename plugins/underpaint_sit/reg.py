"""SiT with a noisy vector of the image beside the noisy latent."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from underpaint import Condition, DataError, Prediction
from underpaint_sit.config import REGConfig
from underpaint_sit.model import SiT

__all__ = ["REG"]


class REG(SiT):
    """A SiT that denoises the latent and one vector of the image together (Wu et al. 2025, REG).

    The vector is the pooled output (class token) of a frozen encoder. It is noised like the latent, at the same t and
    with noise of its own: c_t = (1 − t)·c0 + t·ε. Projected to the width and normalised, it is the first token of
    every block, at no position; a head of its own predicts its velocity. The other tokens attend to it, so that each
    denoising step knows what the picture shows. REG trains with the sum of the latent's velocity error, 0.03 times
    the vector's, and 0.5 times the loss ``repa`` on all tokens. It takes the vector as the encoder gives it, not
    standardised.

    Hidden states are B×(1 + N)×width, the vector's token first, or B×N×width where no vector is given. Without one
    the network is a SiT; REG never trains it so.
    """

    def __init__(
        self, config: REGConfig, *, latent_channels: int, grid: tuple[int, int], pooled_dim: int, token_dim: int
    ) -> None:
        super().__init__(
            config.sit(), latent_channels=latent_channels, grid=grid, pooled_dim=pooled_dim, token_dim=token_dim
        )
        self.companion = config.companion
        self.companion_embed = nn.Linear(config.companion, config.width)
        self.companion_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.companion_head = nn.Linear(config.width, config.companion)
        nn.init.xavier_uniform_(self.companion_embed.weight)
        nn.init.zeros_(self.companion_embed.bias)
        # As the latent's head: the first prediction is zero.
        nn.init.zeros_(self.companion_head.weight)
        nn.init.zeros_(self.companion_head.bias)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        layers: Collection[int] = (),
        companion: Tensor | None = None,
    ) -> Prediction:
        """Predict both velocities.

        Args:
            x_t: B×d×h×w noisy latents.
            t: B noise fractions.
            condition: Condition of each sample.
            layers: Blocks whose hidden states are wanted, counted from 0.
            companion: B×C noisy vectors at the same t; None leaves the token out.

        Raises:
            DataError: An input does not fit the network.
        """
        self._check(x_t, condition, layers)
        vector = self._vector(t, condition)
        x = self._tokens(x_t)
        if companion is None:
            x, hidden = self._run(x, vector, layers)
            return Prediction(self._read(self._final(x, vector), x_t), hidden)
        if companion.shape != (len(x_t), self.companion):
            raise DataError(
                f"The backbone was given companion vectors of shape {list(companion.shape)}; "
                f"{len(x_t)} latents go with {[len(x_t), self.companion]}."
            )
        token = self.companion_norm(self.companion_embed(companion.to(x.dtype)))
        x, hidden = self._run(torch.cat((token[:, None], x), dim=1), vector, layers)
        x = self._final(x, vector)
        velocity = self.companion_head(x[:, 0]).to(companion.dtype)
        return Prediction(self._read(x[:, 1:], x_t), hidden, velocity)

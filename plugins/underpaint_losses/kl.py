"""The prior of a variational latent."""

from __future__ import annotations

from torch import Tensor

from underpaint import ConfigError, Loss, StepTensors

__all__ = ["Kl"]


class Kl(Loss):
    """KL(posterior ‖ N(0, I)) in nats: summed over a sample's latent, averaged over the batch."""

    needs = frozenset({"posterior"})

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``kl``.

        Raises:
            ConfigError: The adapter gives latents without a variance.
        """
        assert step.posterior is not None
        if step.posterior.logvar is None:
            raise ConfigError(
                "The loss 'kl' needs a latent with a variance, and the adapter's is a point; "
                "remove the loss 'kl', or choose an adapter that gives a variance."
            )
        return {"kl": step.posterior.kl().mean()}

"""One stage of tokenizer training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from underpaint.config.schema import StageConfig
from underpaint.data.transforms import to_tensor
from underpaint.errors import DataError
from underpaint.interfaces.adapter import Posterior
from underpaint.interfaces.decoder import Reconstruction
from underpaint.interfaces.encoder import Features
from underpaint.interfaces.loss import StepTensors
from underpaint.models.tokenizer import Tokenizer
from underpaint.training.terms import WeightedLosses

__all__ = ["TokenizerModule", "check_teacher", "tokenizer_losses"]

_PARTS = ("encoder", "adapter", "decoder")


def tokenizer_losses(stage: StageConfig, index: int, device: torch.device) -> WeightedLosses:
    """Make the losses of a tokenizer stage.

    Raises:
        ConfigError: One of them needs what the stage does not have, such as a teacher.
    """
    available = {"step", "images", "features", "posterior", "reconstruction"}
    if stage.teacher is not None:
        available |= {"reference_features", "reference_posterior"}
    return WeightedLosses(stage.losses, available=frozenset(available), device=device, path=f"stages[{index}].losses")


def check_teacher(teacher: Tokenizer, student: Tokenizer, stage: StageConfig) -> None:
    """Refuse a teacher whose latents cannot be compared with the student's.

    Raises:
        DataError: Channels or strides differ.
    """
    mine = (student.latent_channels, student.stride)
    other = (teacher.latent_channels, teacher.stride)
    if mine != other:
        raise DataError(
            f"The teacher '{stage.teacher}' of stage '{stage.name}' gives {other[0]} channels at stride {other[1]}, "
            f"and the stage trains {mine[0]} channels at stride {mine[1]}."
        )


class TokenizerModule(nn.Module):
    """What the engine trains: encoder, adapter and decoder, with the loss computed inside ``forward``.

    Parts that the stage does not train are frozen, in evaluation mode, and run without gradients when nothing
    before them learns. The teacher and the losses are not submodules: they are neither trained nor saved.

    Args:
        tokenizer: The model to train, modified in place.
        trains: Parts that learn.
        losses: Weighted losses.
        teacher: Frozen tokenizer whose latents are the reference, or None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        trains: Sequence[str],
        losses: WeightedLosses,
        teacher: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        self.encoder = tokenizer.encoder
        self.adapter = tokenizer.adapter
        self.decoder = tokenizer.decoder
        self._trains = frozenset(trains)
        self._outside: tuple[Any, ...] = (losses, None if teacher is None else teacher.eval().requires_grad_(False))
        for name in _PARTS:
            getattr(self, name).requires_grad_(name in self._trains)
        self.train()

    def train(self, mode: bool = True) -> TokenizerModule:
        """Set training mode for the parts that learn; the others stay in evaluation mode."""
        self.training = mode
        for name in _PARTS:
            getattr(self, name).train(mode and name in self._trains)
        return self

    def forward(self, pixels: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss and its terms for B×H×W×3 uint8 images.

        Losses are computed in float32 whatever the precision of the parts.
        """
        losses, teacher = self._outside
        images = to_tensor(pixels)
        given = images.to(next(self.adapter.parameters()).dtype)
        with torch.set_grad_enabled("encoder" in self._trains and torch.is_grad_enabled()):
            features = self.encoder(given)
        with torch.set_grad_enabled(bool({"encoder", "adapter"} & self._trains) and torch.is_grad_enabled()):
            posterior = self.adapter(features)
            latents = posterior.sample() if self.training else posterior.mode()
        reconstruction = self.decoder(latents)
        tensors = StepTensors(
            step=step,
            images=images,
            features=_float_features(features),
            posterior=_float_posterior(posterior),
            reconstruction=Reconstruction(
                reconstruction.image.float(), tuple(image.float() for image in reconstruction.pyramid)
            ),
        )
        if teacher is not None:
            with torch.no_grad():
                reference = teacher.encoder(given.to(next(teacher.parameters()).dtype))
                tensors.reference_features = _float_features(reference)
                tensors.reference_posterior = _float_posterior(teacher.adapter(reference))
        total, terms = losses(tensors)
        return total, terms


def _float_features(features: Features) -> Features:
    pooled = None if features.pooled is None else features.pooled.float()
    return Features(tuple(m.float() for m in features.maps), pooled)


def _float_posterior(posterior: Posterior) -> Posterior:
    return Posterior(posterior.mean.float(), None if posterior.logvar is None else posterior.logvar.float())

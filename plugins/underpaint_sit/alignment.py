"""Alignment of a backbone's hidden states with the features of an encoder."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import underpaint
from underpaint import ConfigError, DataError, Encoder, Features, Loss, Prediction, StepSizes, StepTensors
from underpaint_sit.config import RepaConfig

__all__ = ["Repa"]


class Repa(Loss):
    """Representation alignment (Yu et al. 2024, REPA): minus the mean cosine of projected tokens and targets.

    The tokens are the hidden states after one block, through a learned projector of three layers with SiLU between
    them. The targets are the last map of a frozen encoder on the step's images, cell by cell. Where the encoder's grid
    is finer or coarser than the backbone's, its map is resized bilinearly.

    Where the backbone diffuses a companion vector, its token is the first one and its target the encoder's pooled
    output, as REG does (257 tokens on a 16×16 grid).

    Two options make it iREPA (Singh et al. 2025, arXiv 2512.10794), which hands on more of where things are and less of
    what the picture shows: a convolution of 3×3 cells, padded with zeros, in place of the three layers; and targets of
    each channel less γ times their mean over the image's cells, divided by their deviation over the cells plus 1e-6:
    the formula of the authors' code, whose description gives γ no number. The cells are those of the encoder, before
    they are resized. Of a companion iREPA says nothing: here its token is a map of one cell, and its target is left as
    it is.

    The encoder is neither trained nor saved with the projector, and it computes in float32.

    Raises:
        ConfigError: (by `prepare`) There is no backbone whose hidden states could be aligned, or the targets are to be
            normalised over a single cell.
        DataError: (by `prepare`) The images do not divide into the encoder's cells.
    """

    needs = frozenset({"inputs", "prediction"})
    trains = True
    held: tuple[Encoder]

    def __init__(self, config: RepaConfig) -> None:
        super().__init__()
        self.layers = (config.layer,)
        self._config = config
        encoder = underpaint.create("encoder", config.encoder, **config.options)
        # Outside of the modules, so that no checkpoint holds it and no engine casts it.
        self.held = (encoder.eval().requires_grad_(False),)
        self.projector: nn.Module | None = None

    def prepare(self, sizes: StepSizes) -> None:
        """Build the projector from the backbone's width to the encoder's channels."""
        if not sizes.hidden_width:
            raise ConfigError(
                "The loss 'repa' aligns hidden states of a backbone, and this stage trains none; "
                "move it to the losses of 'diffusion'."
            )
        if math.prod(self.held[0].grid(*sizes.image)) == 1 and self._config.spatial is not None:
            raise ConfigError(
                f"The loss 'repa' normalises its targets over the cells of an image, and the encoder "
                f"'{self._config.encoder}' gives one cell; remove its option 'spatial', or use larger images."
            )
        hidden, channels = self._config.projector, self.held[0].info.channels[-1]
        if self._config.projection == "conv":
            # Its initialisation is torch's: the paper states none.
            self.projector = nn.Conv2d(sizes.hidden_width, channels, 3, padding=1)
            return
        self.projector = nn.Sequential(
            nn.Linear(sizes.hidden_width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, channels),
        )
        for module in self.projector:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``repa``, in [-1, 1].

        Raises:
            DataError: The images do not divide into the encoder's cells, their shape is not that of the latents, or
                the encoder has no pooled output for a companion vector.
        """
        assert step.inputs is not None
        assert step.prediction is not None
        assert self.projector is not None, "prepare was not called"
        hidden = step.prediction.hidden[self.layers[0]]
        targets = self._targets(step.inputs, step.prediction, hidden.shape[1])
        projected = self._projected(hidden.to(next(self.projector.parameters()).dtype), step.prediction)
        return {"repa": -F.cosine_similarity(projected.float(), targets, dim=2).mean()}

    def _projected(self, tokens: Tensor, prediction: Prediction) -> Tensor:
        assert self.projector is not None
        if self._config.projection == "mlp":
            return torch.as_tensor(self.projector(tokens))
        count = tokens.shape[1] - (prediction.companion is not None)
        rows, columns = _grid(prediction.velocity, count)
        maps = [tokens[:, -count:].transpose(1, 2).reshape(len(tokens), -1, rows, columns)]
        if prediction.companion is not None:
            maps.insert(0, tokens[:, :1].transpose(1, 2).unsqueeze(3))
        return torch.cat([self.projector(cells).flatten(2).transpose(1, 2) for cells in maps], dim=1)

    @torch.no_grad()
    def _targets(self, images: Tensor, prediction: Prediction, count: int) -> Tensor:
        encoder = self.held[0].to(images.device)
        encoder.grid(images.shape[2], images.shape[3])
        features = encoder(images.float())
        companion = prediction.companion is not None
        cells = self._normalised(features.maps[-1].float())
        cells = _resized(cells, _grid(prediction.velocity, count - companion))
        tokens = cells.flatten(2).transpose(1, 2)
        return torch.cat((self._pooled(features), tokens), dim=1) if companion else tokens

    def _normalised(self, cells: Tensor) -> Tensor:
        if self._config.spatial is None:
            return cells
        deviation, mean = torch.std_mean(cells, dim=(2, 3), keepdim=True)
        return (cells - self._config.spatial * mean) / (deviation + 1e-6)

    def _pooled(self, features: Features) -> Tensor:
        width = features.maps[-1].shape[1]
        if features.pooled is None or features.pooled.shape[1] != width:
            found = "none" if features.pooled is None else f"one of {features.pooled.shape[1]} channels"
            raise DataError(
                f"The loss 'repa' aligns a companion vector with a pooled output as wide as the maps, {width}, and the "
                f"encoder '{self._config.encoder}' has {found}; choose an encoder with a class token, such as DINOv2."
            )
        return features.pooled.float()[:, None]


def _grid(velocity: Tensor, count: int) -> tuple[int, int]:
    """Return rows and columns of `count` tokens of square patches of a latent."""
    height, width = velocity.shape[2:]
    patch = math.isqrt(height * width // count)
    assert (height // patch) * (width // patch) == count, (height, width, count)
    return height // patch, width // patch


def _resized(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    rows, columns = cells.shape[2:]
    if (rows, columns) == grid:
        return cells
    if rows * grid[1] != columns * grid[0]:
        raise DataError(
            f"The encoder of the loss 'repa' gives {rows}×{columns} cells and the backbone has {grid[0]}×{grid[1]} "
            "tokens, which is another shape of image; give both the same images."
        )
    resized: Any = F.interpolate(cells, size=grid, mode="bilinear", align_corners=False, antialias=True)
    return torch.as_tensor(resized)

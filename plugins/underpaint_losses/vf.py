"""Alignment of latents with the features of a vision foundation model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import underpaint
from underpaint import Encoder, Features, Loss, StepSizes, StepTensors
from underpaint_losses.config import VfConfig

__all__ = ["VisionAlignment"]


class VisionAlignment(Loss):
    """The VF loss of VA-VAE (Yao et al. 2025, eq. 5 to 8), as VFM-VAE uses it too.

    A trainable bias-free 1×1 convolution projects latents to the channels of frozen features. Two terms compare them,
    f being features and p projected latents of a cell:

    * ``vf_distance``: mean over samples and pairs of cells of relu(|cos(pᵢ, pⱼ) − cos(fᵢ, fⱼ)| − `distance_margin`),
      times `distance_weight`;
    * ``vf_cosine``: mean over samples and cells of relu(1 − `cosine_margin` − cos(f, p)), times `cosine_weight`.

    Features come from the tokenizer's own encoder, its deepest map (VFM-VAE), or from another encoder that the option
    names (VA-VAE). Either way no gradient flows into them. Finer features are averaged over the cells of the latent
    grid where these divide them evenly, else resized bilinearly with antialiasing; coarser ones are resized.

    An encoder of its own is neither trained nor saved. It stands outside of the modules of the loss, and only moves
    with it.

    Args:
        config: Options.

    Raises:
        NotFoundError: There is no such encoder.
        ConfigError: The options do not fit it.
    """

    needs = frozenset({"inputs", "features", "latents"})
    trains = True
    held: tuple[Encoder, ...] = ()

    def __init__(self, config: VfConfig) -> None:
        super().__init__()
        self._config = config
        if config.encoder is not None:
            encoder: Encoder = underpaint.create("encoder", config.encoder, **dict(config.options))
            self.held = (encoder.eval().requires_grad_(False),)
        self.project: nn.Conv2d

    def prepare(self, sizes: StepSizes) -> None:
        """Build the projection.

        Raises:
            DataError: The images do not divide into the cells of the encoder.
        """
        for encoder in self.held:
            encoder.grid(*sizes.image)
        channels = self.held[0].info.channels if self.held else sizes.feature_channels
        self.project = nn.Conv2d(sizes.latent_channels, channels[-1], 1, bias=False)

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``vf_distance`` and ``vf_cosine``, without one whose factor is 0.

        Raises:
            DataError: The images do not divide into the cells of the encoder.
        """
        assert step.latents is not None
        projected = self.project(step.latents.to(self.project.weight.dtype))
        with torch.no_grad():
            features = _on_grid(self._features(step), projected.shape[-2:])
        # Similarities lie close together; bfloat16 has steps of half a percent there.
        with torch.autocast(projected.device.type, enabled=False):
            dtype = torch.promote_types(projected.dtype, torch.float32)
            p, f = (F.normalize(x.to(dtype).flatten(2), dim=1) for x in (projected, features))
            return self._terms(p, f)

    def _terms(self, p: Tensor, f: Tensor) -> dict[str, Tensor]:
        """Compare unit vectors, B×C×N."""
        config, terms = self._config, {}
        if config.distance_weight:
            gap = (p.transpose(1, 2) @ p - f.transpose(1, 2) @ f).abs()
            terms["vf_distance"] = config.distance_weight * F.relu(gap - config.distance_margin).mean()
        if config.cosine_weight:
            gap = 1.0 - config.cosine_margin - (p * f).sum(1)
            terms["vf_cosine"] = config.cosine_weight * F.relu(gap).mean()
        return terms

    def _features(self, step: StepTensors) -> Tensor:
        if not self.held:
            assert step.features is not None
            return step.features.maps[-1].detach()
        assert step.inputs is not None
        encoder = self.held[0]
        encoder.grid(step.inputs.shape[2], step.inputs.shape[3])
        features: Features = encoder(step.inputs)
        return features.maps[-1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for encoder in self.held:
            encoder._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _on_grid(features: Tensor, grid: Any) -> Tensor:
    """Bring B×C×h×w features to the grid of the latents."""
    height, width = features.shape[-2:]
    if (height, width) == tuple(grid):
        return features
    if height % grid[0] == 0 and width % grid[1] == 0:
        return F.avg_pool2d(features, (height // grid[0], width // grid[1]))
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.interpolate(x, size=tuple(grid), mode="bilinear", align_corners=False, antialias=True)

"""Equivariance regularisation: the latent is transformed, and the image it should decode to with it (EQ-VAE)."""

from __future__ import annotations

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from underpaint.config.stages import EquivarianceConfig

__all__ = ["View", "draw_view", "resized", "turned_latents"]


@attrs.frozen
class View:
    """One draw of the regularisation.

    Attributes:
        input_scale: Size of the image that the encoder sees, relative to the full one.
        latent_scale: Size of the latent that the decoder sees, relative to what the encoder gave.
        turns: Quarter turns of the latent, counter-clockwise.
    """

    input_scale: float = 1.0
    latent_scale: float = 1.0
    turns: int = 0


def draw_view(config: EquivarianceConfig, *, square: bool) -> View:
    """Draw a view from torch's CPU generator, which the step seeded; the device is not waited for.

    Args:
        config: Probabilities and scales.
        square: Whether height equals width; an oblong latent is turned by 0° or 180° only.
    """
    first, second, which, turn = torch.rand(4, device="cpu").tolist()
    if first < config.latent:
        turns = int(turn * 4) if square else 2 * int(turn * 2)
        return View(latent_scale=config.scales[int(which * len(config.scales))], turns=turns)
    smaller = [scale for scale in config.scales if scale < 1.0]
    if second < config.input:
        return View(input_scale=smaller[int(which * len(smaller))])
    return View()


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Resize B×3×H×W images bilinearly, with antialiasing."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


def turned_latents(latents: Tensor, view: View) -> Tensor:
    """Resize B×d×h×w latents bilinearly, without antialiasing, and turn them; at least one cell is left."""
    height, width = (max(1, round(side * view.latent_scale)) for side in latents.shape[-2:])
    if (height, width) != tuple(latents.shape[-2:]):
        latents = F.interpolate(latents, (height, width), mode="bilinear")
    return torch.rot90(latents, view.turns, (-2, -1)) if view.turns else latents

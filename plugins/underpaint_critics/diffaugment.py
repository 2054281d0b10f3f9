"""DiffAugment: differentiable augmentation of what a critic sees (Zhao et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["DiffAugment", "brightness", "contrast", "cutout", "saturation", "translate"]


class DiffAugment(nn.Module):
    """Draws colour, shift and cut-out anew for every image of a batch, in this order.

    It acts in training and in evaluation mode. Numbers are drawn on the images' device from its default generator.

    Args:
        color: Whether brightness, saturation and contrast are drawn.
        translation: Largest shift as a share of the side; 0 for none.
        cutout: Side of the blanked rectangle as a share of the image's; 0 for none.
    """

    def __init__(self, *, color: bool = True, translation: float = 0.125, cutout: float = 0.2) -> None:
        super().__init__()
        self.color = color
        self.translation = translation
        self.cutout = cutout

    def forward(self, images: Tensor) -> Tensor:
        """Augment B×C×H×W images in [-1, 1]; values may leave that range."""
        if not (self.color or self.translation or self.cutout):
            return images
        draws = torch.rand(7, len(images), device=images.device)
        x = images
        if self.color:
            x = contrast(saturation(brightness(x, draws[0]), draws[1]), draws[2])
        if self.translation:
            x = translate(x, draws[3], draws[4], self.translation)
        if self.cutout:
            x = cutout(x, draws[5], draws[6], self.cutout)
        return x


def brightness(x: Tensor, draw: Tensor) -> Tensor:
    """Add draw − ½ to each image; `draw` holds B numbers in [0, 1)."""
    return x + _each(draw - 0.5, x)


def saturation(x: Tensor, draw: Tensor) -> Tensor:
    """Scale each pixel's distance from its mean over channels by 2·draw."""
    grey = x.mean(1, keepdim=True)
    return (x - grey) * _each(2.0 * draw, x) + grey


def contrast(x: Tensor, draw: Tensor) -> Tensor:
    """Scale the distance of an image's values from their mean by draw + ½."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * _each(draw + 0.5, x) + mean


def translate(x: Tensor, down: Tensor, right: Tensor, ratio: float) -> Tensor:
    """Shift each image by whole pixels, evenly from −⌊ratio·side⌉ to +⌊ratio·side⌉; zeros move in.

    Args:
        x: B×C×H×W images.
        down: B numbers in [0, 1) that choose the vertical shift: row i shows what row i + shift showed.
        right: The same for columns.
        ratio: Largest shift as a share of the side.
    """
    for dim, draw in ((2, down), (3, right)):
        side = x.shape[dim]
        reach = round(side * ratio)
        shift = (draw * (2 * reach + 1)).floor().long() - reach
        source = torch.arange(side, device=x.device) + shift[:, None]
        inside = (source >= 0) & (source < side)
        shape = (len(x), 1, side, 1) if dim == 2 else (len(x), 1, 1, side)
        x = x.gather(dim, source.clamp(0, side - 1).view(shape).expand_as(x)) * inside.view(shape).to(x.dtype)
    return x


def cutout(x: Tensor, down: Tensor, right: Tensor, ratio: float) -> Tensor:
    """Blank a rectangle of ⌊ratio·side⌉ pixels in each image, centred anywhere in it and cut off at its edge.

    Args:
        x: B×C×H×W images.
        down: B numbers in [0, 1) that choose the row of the centre.
        right: The same for the column.
        ratio: Side of the rectangle as a share of the image's.
    """
    hit = torch.ones((), dtype=torch.bool, device=x.device)
    for dim, draw in ((2, down), (3, right)):
        side = x.shape[dim]
        length = round(side * ratio)
        # The centre of an even length lies between two pixels, so one more place is possible.
        first = (draw * (side + 1 - length % 2)).floor().long() - length // 2
        place = torch.arange(side, device=x.device)
        within = (place >= first[:, None]) & (place < first[:, None] + length)
        hit = hit & within.view((len(x), 1, side, 1) if dim == 2 else (len(x), 1, 1, side))
    return x * (~hit).to(x.dtype)


def _each(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(-1, 1, 1, 1)

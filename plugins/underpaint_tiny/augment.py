"""Random views of a batch of images, each image with its own draw, on the device of the images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["colours", "crops", "views"]

_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], device="cpu")
_FROM_YIQ = torch.linalg.inv(_TO_YIQ.double()).float()
_LUMA = _TO_YIQ[:1].expand(3, 3)


@torch.no_grad()
def views(images: Tensor, size: tuple[int, int], area: tuple[float, float]) -> Tensor:
    """Return one random view of each image: crop, flip, colours.

    Args:
        images: B×3×H×W in [-1, 1].
        size: Height and width of the views.
        area: Share of the image that a view shows, drawn evenly.
    """
    with torch.autocast(images.device.type, enabled=False):
        return colours(crops(images.float(), size, area))


def crops(images: Tensor, size: tuple[int, int], area: tuple[float, float]) -> Tensor:
    """Cut a random box of aspect ratio 3:4 to 4:3 out of each image, resize it bilinearly, and flip half of them."""
    count, device = len(images), images.device
    shares = torch.empty(count, device=device).uniform_(*area)
    ratio = torch.empty(count, device=device).uniform_(-math.log(4 / 3), math.log(4 / 3)).exp()
    width, height = (shares * ratio).sqrt().clamp(max=1.0), (shares / ratio).sqrt().clamp(max=1.0)
    x = torch.empty(count, device=device).uniform_(-1.0, 1.0) * (1.0 - width)
    y = torch.empty(count, device=device).uniform_(-1.0, 1.0) * (1.0 - height)
    sign = torch.randint(0, 2, (count,), device=device) * 2.0 - 1.0
    zero = torch.zeros_like(x)
    theta = torch.stack([torch.stack([width * sign, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(theta.to(images.dtype), [count, 3, *size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def colours(images: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of most images; make some grey, blurred or solarised.

    Brightness and contrast change by up to 40 %, saturation by up to 20 %, hue by up to a tenth of the circle, in 8 of
    10 images; 2 of 10 become grey, 3 of 10 blurred, 1 of 10 solarised.

    Args:
        images: B×3×H×W in [-1, 1].
    """
    count, device = len(images), images.device
    pixels = (images.float() + 1.0) / 2.0

    def draw(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1, device=device).uniform_(low, high)

    # All of these are affine in the colour, so they are one matrix and one offset for each image.
    bright, contrast = draw(0.6, 1.4), draw(0.6, 1.4)
    chroma = _chroma(draw(0.8, 1.2), draw(-0.2 * math.pi, 0.2 * math.pi))
    mean = (bright * pixels.mean((1, 2, 3)).view(-1, 1, 1)).expand(-1, 3, 1)
    identity = torch.eye(3, device=device).expand(count, 3, 3)
    jittered = draw(0.0, 1.0) < 0.8
    matrix = torch.where(jittered, chroma * bright * contrast, identity)
    offset = torch.where(jittered, chroma @ ((1.0 - contrast) * mean), torch.zeros_like(mean))
    luma = _LUMA.to(device, non_blocking=True).expand(count, 3, 3)
    grey = torch.where(draw(0.0, 1.0) < 0.2, luma, identity)
    flat = torch.baddbmm(grey @ offset, grey @ matrix, pixels.flatten(2)).clamp(0.0, 1.0)
    pixels = flat.view_as(pixels)
    chosen = torch.randperm(count, device=device)[: round(0.3 * count)]
    pixels[chosen] = _blurred(pixels[chosen], torch.empty(len(chosen), device=device).uniform_(0.1, 1.5))
    chosen = torch.randperm(count, device=device)[: round(0.1 * count)]
    pixels[chosen] = torch.where(pixels[chosen] > 0.5, 1.0 - pixels[chosen], pixels[chosen])
    return pixels * 2.0 - 1.0


def _chroma(saturation: Tensor, angle: Tensor) -> Tensor:
    """Return the B×3×3 colour matrices that scale and turn the chroma plane of YIQ."""
    # Not blocking: a wait for the device would cost every step more than the colours do.
    to, back = (rows.to(saturation.device, non_blocking=True) for rows in (_TO_YIQ, _FROM_YIQ))
    cosine, sine = saturation * angle.cos(), saturation * angle.sin()
    zero, one = torch.zeros_like(cosine), torch.ones_like(cosine)
    rows = [
        torch.cat([one, zero, zero], 2),
        torch.cat([zero, cosine, -sine], 2),
        torch.cat([zero, sine, cosine], 2),
    ]
    return back @ torch.cat(rows, 1) @ to


def _blurred(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Convolve each image with its own Gaussian of 5×5 taps."""
    height, width = pixels.shape[-2:]
    taps = torch.arange(-2.0, 3.0, device=pixels.device)
    kernel = torch.exp(-0.5 * (taps / sigma.view(-1, 1)).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).view(-1, 5, 1, 1, 1)
    padded = F.pad(pixels, (2, 2, 2, 2), mode="reflect")
    # A grouped convolution of one group an image takes many times as long.
    rows = torch.stack([kernel[:, k] * padded[:, :, k : k + height] for k in range(5)]).sum(0)
    return torch.stack([kernel[:, k] * rows[..., k : k + width] for k in range(5)]).sum(0)

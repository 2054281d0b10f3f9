"""Structural similarity as a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import DataError, Loss, StepTensors

__all__ = ["Ssim"]

_TAPS = 11
_SIGMA = 1.5
# (0.01·range)² and (0.03·range)² for images in [-1, 1].
_C1 = (0.01 * 2.0) ** 2
_C2 = (0.03 * 2.0) ** 2


class Ssim(Loss):
    """1 − SSIM (Wang et al. 2004, eq. 13), with the window of torchmetrics: 11×11, Gaussian, σ = 1.5.

    Both images are clamped to [-1, 1] and reflected at their edges; the range is 2. The mean is over pixels, channels
    and samples. It lies in [0, 2]. The same pair in [0, 1] with range 1 has another value, because the constants and
    the means are not shifted alike.
    """

    needs = frozenset({"images", "reconstruction"})

    def units(self) -> Sequence[nn.Module]:
        """Return the loss."""
        return (self,)

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``ssim``, which is 1 − SSIM.

        Raises:
            DataError: The images are smaller than the window's reach.
        """
        assert step.images is not None
        assert step.reconstruction is not None
        if min(step.images.shape[-2:]) <= _TAPS // 2:
            raise DataError(
                f"The loss 'ssim' needs images of {_TAPS // 2 + 1} px or more, and they have "
                f"{step.images.shape[-2]}×{step.images.shape[-1]} px; leave it out, or take larger images."
            )
        # Variances are differences of nearly equal numbers, which bfloat16 cannot hold.
        with torch.autocast(step.images.device.type, enabled=False):
            dtype = torch.promote_types(step.images.dtype, torch.float32)
            x, y = (image.to(dtype).clamp(-1.0, 1.0) for image in (step.reconstruction.image, step.images))
            return {"ssim": 1.0 - self._similarity(x, y).mean()}

    def _similarity(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the similarity at each pixel, B×C×H×W."""
        mean_x, mean_y, square_x, square_y, product = self._blur(torch.cat((x, y, x * x, y * y, x * y), 1)).chunk(5, 1)
        variances = (square_x - mean_x.square()).clamp(min=0.0) + (square_y - mean_y.square()).clamp(min=0.0)
        covariance = product - mean_x * mean_y
        luminance = (2.0 * mean_x * mean_y + _C1) / (mean_x.square() + mean_y.square() + _C1)
        return luminance * (2.0 * covariance + _C2) / (variances + _C2)

    def _blur(self, x: Tensor) -> Tensor:
        """Average B×C×H×W with the window, one direction after the other."""
        channels = x.shape[1]
        reach = _TAPS // 2
        # Made on the device each time: a copy from the host would wait for it, and a buffer follows the wrong dtype.
        place = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
        window = (-0.5 * (place / _SIGMA).square()).exp()
        window = (window / window.sum()).expand(channels, 1, _TAPS)
        x = F.pad(x, (reach, reach, reach, reach), mode="reflect")
        x = F.conv2d(x, window[..., None], groups=channels)
        return F.conv2d(x, window[:, :, None], groups=channels)

"""Layers of critics: normalisation over small groups of samples, and convolutions of bounded gain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LocalBatchNorm", "SpectralConv1d"]

_FIRST_ITERATIONS = 15


class LocalBatchNorm(nn.Module):
    """Batch normalisation over groups of consecutive samples, by their own statistics always (StyleGAN-T).

    A batch of B is split into ⌈B / virtual_batch⌉ equal groups; where that does not divide B, into the next number
    that does. So the critic's gradient does not depend on the batch of a rank, and nothing is kept between steps.

    Args:
        channels: Channels of the input.
        virtual_batch: Samples of a group, at most.
        eps: Added to the variance.
    """

    def __init__(self, channels: int, virtual_batch: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.virtual_batch = virtual_batch
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise B×C×… over the samples of a group and all that follows the channels; at least in float32."""
        groups = self.groups(len(x))
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).view(groups, len(x) // groups, *x.shape[1:])
        variance, mean = torch.var_mean(wide, dim=(1, *range(3, wide.ndim)), correction=0, keepdim=True)
        normal = ((wide - mean) * torch.rsqrt(variance + self.eps)).flatten(0, 1)
        shape = (1, -1, *(1 for _ in range(x.ndim - 2)))
        return (normal * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)

    def groups(self, batch: int) -> int:
        """Return into how many groups a batch is split."""
        least = -(-batch // self.virtual_batch)
        return next(count for count in range(least, batch + 1) if batch % count == 0)


class SpectralConv1d(nn.Module):
    """A circular convolution over positions whose weight is divided by its largest singular value.

    The value is found by one power iteration per training pass (Miyato et al. 2018, algorithm 1), always in at least
    float32. The first vectors come from 15 iterations, so that the gain is bounded from the first step.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        kernel: Positions that an output sees, odd.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        assert kernel % 2 == 1
        plain = nn.Conv1d(inputs, outputs, kernel)
        assert plain.bias is not None
        self.weight = nn.Parameter(plain.weight.detach())
        self.bias = nn.Parameter(plain.bias.detach())
        self.left: Tensor
        self.right: Tensor
        self.register_buffer("left", F.normalize(torch.randn(outputs), dim=0))
        self.register_buffer("right", F.normalize(torch.randn(inputs * kernel), dim=0))
        self._iterate(self._matrix(), _FIRST_ITERATIONS)

    def forward(self, x: Tensor) -> Tensor:
        """Map B×C×N to B×outputs×N."""
        # Autocast would multiply the vectors in bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            matrix = self._matrix()
            if self.training:
                self._iterate(matrix, 1)
            # Copies, because the next pass changes the vectors before this one's gradient is taken.
            left, right = (vector.to(matrix.dtype, copy=True) for vector in (self.left, self.right))
            weight = (self.weight / (left @ (matrix @ right))).to(self.weight.dtype)
        reach = self.weight.shape[2] // 2
        padded = F.pad(x, (reach, reach), mode="circular") if reach else x
        result: Tensor = F.conv1d(padded, weight, self.bias)
        return result

    def _matrix(self) -> Tensor:
        return self.weight.flatten(1).to(torch.promote_types(self.weight.dtype, torch.float32))

    @torch.no_grad()
    def _iterate(self, matrix: Tensor, count: int) -> None:
        left = self.left.to(matrix.dtype)
        for _ in range(count):
            right = F.normalize(matrix.T @ left, dim=0, eps=1e-12)
            left = F.normalize(matrix @ right, dim=0, eps=1e-12)
        self.left.copy_(left)
        self.right.copy_(right)

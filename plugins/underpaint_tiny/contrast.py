"""Contrastive self-supervision of ``tiny/vit``: a view finds its image among the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import Loss, StepSizes, StepTensors
from underpaint_tiny.augment import views
from underpaint_tiny.config import ContrastConfig

__all__ = ["Contrast"]


class Contrast(Loss):
    """Learns an encoder without labels by telling images apart (InfoNCE; van den Oord et al. 2018, eq. 4).

    Several views of each image are encoded, pooled and projected to unit length. Every view is compared with each wide
    view of all images of the batch; the cross-entropy of finding its own image, at a temperature, is averaged.

    That alone does not need all that a patch shows: colours are left out, which a tokenizer cannot do without. So
    ``pixels`` is added, the mean squared error of a linear readout of each patch of the wide views, as they were shown
    (ours).
    """

    needs = frozenset({"inputs", "encoder"})
    trains = True

    def __init__(self, config: ContrastConfig) -> None:
        super().__init__()
        self._config = config
        self.projector = nn.Sequential()
        self.reader = nn.Linear(1, 1)
        self._grid = (1, 1)

    def prepare(self, sizes: StepSizes) -> None:
        """Build the layers for the encoder's last map."""
        config, width = self._config, sizes.feature_channels[-1]
        self._grid = sizes.grid
        self.projector = _projector(width, config.hidden, config.channels)
        if config.pixels:
            self.reader = nn.Linear(width, 3 * (sizes.image[0] // sizes.grid[0]) ** 2)

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``contrast``, and ``pixels`` where that has a factor."""
        assert step.inputs is not None
        assert step.encoder is not None
        config, images = self._config, step.inputs
        height, width = images.shape[-2:]
        stride = step.encoder.info.stride
        # Cells of the smaller views are whole ones.
        half = tuple(max(1, side // (2 * stride)) * stride for side in (height, width))
        seen = views(images.repeat(config.wide, 1, 1, 1), (height, width), config.wide_area)
        found = step.encoder(seen)
        pooled = [found.pooled]
        if config.narrow:
            small = views(images.repeat(config.narrow, 1, 1, 1), (half[0], half[1]), config.narrow_area)
            pooled.append(step.encoder(small).pooled)
        projected = F.normalize(self.projector(torch.cat([part for part in pooled if part is not None])).float(), dim=1)
        each = projected.view(config.wide + config.narrow, len(images), -1)
        own = torch.arange(len(images), device=images.device)
        with torch.autocast(images.device.type, enabled=False):
            pairs = [
                F.cross_entropy(view @ each[target].T / config.temperature, own)
                for index, view in enumerate(each)
                for target in range(config.wide)
                if index != target
            ]
        terms = {"contrast": torch.stack(pairs).mean()}
        if config.pixels:
            terms["pixels"] = config.pixels * self._pixels(found.maps[-1], seen)
        return terms

    def _pixels(self, maps: Tensor, seen: Tensor) -> Tensor:
        # An adapter may join cells; the reader was built for its patches.
        cells = F.adaptive_avg_pool2d(maps, self._grid).permute(0, 2, 3, 1)
        read = self.reader(cells).permute(0, 3, 1, 2)
        return F.mse_loss(read.float(), F.pixel_unshuffle(seen, seen.shape[-1] // self._grid[1]))


def _projector(width: int, hidden: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.BatchNorm1d(hidden),
        nn.GELU(),
        nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden),
        nn.GELU(),
        nn.Linear(hidden, channels),
    )

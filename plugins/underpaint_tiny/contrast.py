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
    """

    needs = frozenset({"inputs", "encoder"})
    trains = True

    def __init__(self, config: ContrastConfig) -> None:
        super().__init__()
        self._config = config
        self.projector = nn.Sequential()

    def prepare(self, sizes: StepSizes) -> None:
        """Build the projector for the encoder's last map."""
        hidden = self._config.hidden
        self.projector = nn.Sequential(
            nn.Linear(sizes.feature_channels[-1], hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, self._config.channels),
        )

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``contrast``."""
        assert step.inputs is not None
        assert step.encoder is not None
        config, images = self._config, step.inputs
        height, width = images.shape[-2:]
        stride = step.encoder.info.stride
        # Cells of the smaller views are whole ones.
        half = tuple(max(1, side // (2 * stride)) * stride for side in (height, width))
        pooled = []
        for count, size, area in (
            (config.wide, (height, width), config.wide_area),
            (config.narrow, half, config.narrow_area),
        ):
            if count:
                seen = views(images.repeat(count, 1, 1, 1), (size[0], size[1]), area)
                summary = step.encoder(seen).pooled
                assert summary is not None
                pooled.append(summary)
        projected = F.normalize(self.projector(torch.cat(pooled)).float(), dim=1)
        each = projected.view(config.wide + config.narrow, len(images), -1)
        own = torch.arange(len(images), device=images.device)
        with torch.autocast(images.device.type, enabled=False):
            terms = [
                F.cross_entropy(view @ each[target].T / config.temperature, own)
                for index, view in enumerate(each)
                for target in range(config.wide)
                if index != target
            ]
        return {"contrast": torch.stack(terms).mean()}

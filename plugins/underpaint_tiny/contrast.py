"""Contrastive self-supervision of ``tiny/vit``: a view finds its image among the batch, a patch its place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import Loss, StepSizes, StepTensors
from underpaint_tiny.augment import views
from underpaint_tiny.config import ContrastConfig

__all__ = ["Contrast", "same_places"]


class Contrast(Loss):
    """Learns an encoder without labels by telling images apart (InfoNCE; van den Oord et al. 2018, eq. 4).

    Several views of each image are encoded, pooled and projected to unit length. Every view is compared with each wide
    view of all images of the batch; the cross-entropy of finding its own image, at a temperature, is averaged.

    That alone needs neither every patch nor all that a patch shows: the features of the border become alike, and
    colours are left out, which a tokenizer cannot do without. Two more terms ask for them. ``dense`` does with patches
    what the first does with images (Wang et al. 2021, DenseCL, with the places known from the crops): a patch of the
    first wide view finds what the second shows of the same place, among such places of all images. ``pixels`` is the
    mean squared error of a linear readout of each patch of the wide views, as they were shown (ours).
    """

    needs = frozenset({"inputs", "encoder"})
    trains = True

    def __init__(self, config: ContrastConfig) -> None:
        super().__init__()
        self._config = config
        self.projector = nn.Sequential()
        self.dense = nn.Sequential()
        self.reader = nn.Linear(1, 1)
        self._grid = (1, 1)

    def prepare(self, sizes: StepSizes) -> None:
        """Build the layers for the encoder's last map."""
        config, width = self._config, sizes.feature_channels[-1]
        self._grid = sizes.grid
        self.projector = _projector(width, config.hidden, config.channels)
        if config.dense:
            self.dense = _projector(width, config.hidden, config.channels)
        if config.pixels:
            self.reader = nn.Linear(width, 3 * (sizes.image[0] // sizes.grid[0]) ** 2)

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``contrast``, and those of ``dense`` and ``pixels`` that have a factor."""
        assert step.inputs is not None
        assert step.encoder is not None
        config, images = self._config, step.inputs
        height, width = images.shape[-2:]
        stride = step.encoder.info.stride
        # Cells of the smaller views are whole ones.
        half = tuple(max(1, side // (2 * stride)) * stride for side in (height, width))
        seen, boxes = views(images.repeat(config.wide, 1, 1, 1), (height, width), config.wide_area)
        found = step.encoder(seen)
        pooled = [found.pooled]
        if config.narrow:
            small, _ = views(images.repeat(config.narrow, 1, 1, 1), (half[0], half[1]), config.narrow_area)
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
        if config.dense:
            terms["dense"] = config.dense * self._dense(found.maps[-1], boxes, len(images))
        if config.pixels:
            terms["pixels"] = config.pixels * self._pixels(found.maps[-1], seen)
        return terms

    def _dense(self, maps: Tensor, boxes: Tensor, count: int) -> Tensor:
        """Return the mean cross-entropy of the drawn patches of the first view that the second view shows too."""
        first, second = maps[:count], maps[count : 2 * count]
        places, inside = same_places(boxes[:count], boxes[count : 2 * count], (maps.shape[2], maps.shape[3]))
        points = min(self._config.points, inside.shape[1])
        score = torch.rand(inside.shape, device=maps.device) + inside
        chosen = score.topk(points, dim=1).indices
        counts = inside.gather(1, chosen).flatten()
        queries = first.flatten(2).transpose(1, 2).gather(1, chosen[..., None].expand(-1, -1, maps.shape[1]))
        where = places.gather(1, chosen[..., None].expand(-1, -1, 2))[:, None]
        keys = F.grid_sample(second.float(), where, mode="bilinear", padding_mode="border", align_corners=False)
        both = torch.cat([queries.flatten(0, 1), keys[:, :, 0].transpose(1, 2).flatten(0, 1).to(queries.dtype)])
        query, key = F.normalize(self.dense(both).float(), dim=1).chunk(2)
        with torch.autocast(maps.device.type, enabled=False):
            own = torch.arange(len(query), device=maps.device)
            errors = F.cross_entropy(query @ key.T / self._config.temperature, own, reduction="none")
        return (errors * counts).sum() / counts.sum().clamp(min=1)

    def _pixels(self, maps: Tensor, seen: Tensor) -> Tensor:
        # An adapter may join cells; the reader was built for its patches.
        cells = F.adaptive_avg_pool2d(maps, self._grid).permute(0, 2, 3, 1)
        read = self.reader(cells).permute(0, 3, 1, 2)
        return F.mse_loss(read.float(), F.pixel_unshuffle(seen, seen.shape[-1] // self._grid[1]))


def same_places(first: Tensor, second: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Find what the cells of one view are in another view of the same image.

    Args:
        first: B×2×2 boxes of the views whose cells are looked for, as `crops` returns them.
        second: B×2×2 boxes of the other views.
        grid: Rows and columns of cells.

    Returns:
        B×N×2 places x, y in the other view, which spans [-1, 1], of the cells' centres in raster order; and B×N
        booleans, whether they lie in it.
    """
    rows, columns = ((torch.arange(n, device=first.device) * 2 + 1) / n - 1 for n in grid)
    cells = torch.stack([columns.expand(len(rows), -1), rows[:, None].expand(-1, len(columns))], -1).flatten(0, 1)
    image = first[:, :1] * cells + first[:, 1:]
    places = (image - second[:, 1:]) / second[:, :1]
    return places, (places.abs() <= 1).all(-1)


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

"""The projected critic: heads on the features of a frozen encoder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Self

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import underpaint
from underpaint import ConfigError, Encoder, Features, UnreachableError
from underpaint_critics.adversary import Adversary, Judgement
from underpaint_critics.config import DINO, ProjectedConfig
from underpaint_critics.diffaugment import DiffAugment
from underpaint_critics.layers import LocalBatchNorm, SpectralConv1d

__all__ = ["Projected"]

logger = logging.getLogger("underpaint")

_KERNEL = 9
_TINY: Mapping[str, Any] = {"encoder": "tiny/vit", "layers": (1, 3, 5), "summary": "pooled"}


class _Head(nn.Module):
    """StyleGAN-T's head: a pointwise layer, a residual one over nine positions, and a logit per position."""

    def __init__(self, channels: int, virtual_batch: int) -> None:
        super().__init__()

        def layer(kernel: int) -> nn.Sequential:
            return nn.Sequential(
                SpectralConv1d(channels, channels, kernel), LocalBatchNorm(channels, virtual_batch), nn.LeakyReLU(0.2)
            )

        self.first = layer(1)
        self.second = layer(_KERNEL)
        self.logit = SpectralConv1d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = (self.second(x) + x) * 0.5**0.5
        result: Tensor = self.logit(x)
        return result


def _chosen(config: ProjectedConfig) -> tuple[ProjectedConfig, Encoder]:
    """Return the options with an encoder, its layers and its summary filled in, and that encoder."""
    if config.encoder is not None:
        named = attrs.evolve(config, summary=config.summary or "none")
        return named, _create(config.encoder, named)
    if config.layers is not None or config.options or config.summary is not None:
        raise ConfigError(
            "A projected critic has 'layers', 'options' or 'summary' and no 'encoder' to which they belong; name it, "
            "such as encoder: tiny/vit."
        )
    dino = attrs.evolve(config, **DINO)
    try:
        return dino, _create(DINO["encoder"], dino)
    except UnreachableError as error:
        logger.warning(
            "A projected critic looks through %s in place of its default, %s: %s To have no other encoder, write "
            "'critics/vfm-vae' or name one.",
            _TINY["encoder"],
            DINO["encoder"],
            error,
        )
        tiny = attrs.evolve(config, **_TINY)
        return tiny, _create(_TINY["encoder"], tiny)


def _create(name: str, config: ProjectedConfig) -> Encoder:
    options = dict(config.options) | ({} if config.layers is None else {"layers": config.layers})
    encoder: Encoder = underpaint.create("encoder", name, **options)
    return encoder.eval().requires_grad_(False)


class _Heads(nn.Module):
    """One head for each map; all logits are of one scale."""

    def __init__(self, channels: tuple[int, ...], virtual_batch: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_Head(count, virtual_batch) for count in channels)

    def forward(self, maps: tuple[Tensor, ...]) -> Judgement:
        dtype = next(self.parameters()).dtype
        logits = [head(seen.flatten(2).to(dtype)) for head, seen in zip(self.heads, maps, strict=True)]
        return [[torch.cat(logits, dim=2)]]


class Projected(Adversary):
    """An adversarial loss with critic heads on a frozen encoder (Sauer et al. 2021; heads of StyleGAN-T, 2023).

    Images are augmented (`DiffAugment`), brought to the encoder's size and encoded. Each map, its cells in raster
    order, is judged by a head of its own: spectrally normed convolutions and `LocalBatchNorm`; 1,477,249 parameters at
    384 channels. All logits of all heads count the same.

    ``critics/vfm-vae`` is StyleGAN-T's and VFM-VAE's: the maps are the patch tokens of DINO's ViT-S/16 before
    the first block and after the third, sixth, ninth and last, unnormed, and to each cell the class token of its own
    layer is added; the heads have 7,386,245 parameters. From RAE's, ``critics/rae`` differs in that images are resized
    with antialiasing and shifted after their colours are drawn.

    The encoder is neither trained nor saved. It stands outside of the modules of the loss, and only moves with it.

    Args:
        config: Options.

    Raises:
        NotFoundError: There is no such encoder.
        ConfigError: The options do not fit it, or belong to none.
        DataError: Its weights are missing or damaged.
    """

    share = 1.0
    held: tuple[Encoder]

    def __init__(self, config: ProjectedConfig) -> None:
        config, encoder = _chosen(config)
        info = encoder.info
        channels = info.channels + (info.channels[-1:] if config.second_last_head else ())
        super().__init__(config, _Heads(channels, config.virtual_batch))
        self.held = (encoder,)
        self._name = config.encoder
        self._again = config.second_last_head
        self._summary = config.summary
        self._crop = config.crop
        self._quantise = config.quantise
        self._augment = DiffAugment(color=config.color, translation=config.translation, cutout=config.cutout)
        # An encoder may take images of another size than its own input, so that one patch covers a cell.
        native = (info.native_size[0] // info.patch * info.stride, info.native_size[1] // info.patch * info.stride)
        self._size = native if config.size is None else (config.size, config.size)
        encoder.grid(*self._size)

    def look(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of the augmented images."""
        features = self.held[0](self._fit(self._augment(images)))
        maps: tuple[Tensor, ...] = features.maps
        if self._summary != "none":
            summaries = self._summaries(features)
            maps = tuple(seen + added[:, :, None, None] for seen, added in zip(maps, summaries, strict=True))
        return maps + (maps[-1:] if self._again else ())

    def _summaries(self, features: Features) -> tuple[Tensor, ...]:
        """Return the vector that is added to each map."""
        if self._summary == "layer":
            if features.class_tokens is None:
                raise ConfigError(
                    f"The encoder '{self._name}' gives no class tokens; set the option 'summary' of the critic to "
                    "'pooled' or 'none'."
                )
            return features.class_tokens
        pooled = features.pooled
        if pooled is None or any(seen.shape[1] != pooled.shape[1] for seen in features.maps):
            raise ConfigError(
                f"The encoder '{self._name}' gives no summary of the image that fits its maps; set the option "
                "'summary' of the critic to 'none'."
            )
        return (pooled,) * len(features.maps)

    def as_shown(self, reconstruction: Tensor) -> Tensor:
        """Round to 8 bit where that is asked for: 2·k/255 − 1 with k from 0 to 255."""
        if not self._quantise:
            return reconstruction
        return ((reconstruction.clamp(-1.0, 1.0) + 1.0) * 127.5).round() / 127.5 - 1.0

    def _fit(self, x: Tensor) -> Tensor:
        """Bring images to the encoder's size: resized, or for a share of the batches cropped where that can be."""
        (height, width), (h, w) = x.shape[-2:], self._size
        if (height, width) == (h, w):
            return x
        if self._crop and height >= h and width >= w:
            # Drawn on the CPU: the choice is Python's, and must not wait for the device.
            coin, down, right = torch.rand(3, device="cpu").tolist()
            if coin < self._crop:
                top, left = int(down * (height - h + 1)), int(right * (width - w + 1))
                return x[..., top : top + h, left : left + w]
        return F.interpolate(x, size=(h, w), mode="bilinear", align_corners=False, antialias=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.held[0]._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

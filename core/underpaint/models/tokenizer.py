"""The tokenizer: encoder, adapter, decoder and the statistics of its latents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from underpaint.errors import DataError
from underpaint.interfaces.adapter import Adapter, Posterior
from underpaint.interfaces.decoder import Decoder
from underpaint.interfaces.encoder import Encoder
from underpaint.weights import tensor_hash

__all__ = ["LatentStatistics", "Tokenizer"]


@attrs.frozen
class LatentStatistics:
    """Statistics of a tokenizer's latents over a data set, of each channel or of each value (rae.md §2.2).

    Attributes:
        mean: d values, or d·h·w with a grid: channel by channel, row by row.
        std: As many values, all positive.
        count: Images they were computed on; 0 where that is not known.
        data: Fingerprint of those images; empty where that is not known.
        grid: h and w of the latents whose every value has its own; None where those of a channel hold everywhere.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int
    data: str
    grid: tuple[int, int] | None = None

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation as 1×d×1×1 or 1×d×h×w tensors of the type and device of some latents.

        Raises:
            DataError: The statistics are those of another grid.
        """
        if self.grid is not None and tuple(like.shape[-2:]) != self.grid:
            raise DataError(
                f"The tokenizer has latent statistics of each position of a {self.grid[0]}×{self.grid[1]} grid, and "
                f"the latents are {like.shape[-2]}×{like.shape[-1]}; use images of the size that these were made from, "
                "or let 'underpaint encode' compute statistics of each channel."
            )
        shape = (1, -1, *(self.grid or (1, 1)))
        mean = torch.tensor(self.mean, dtype=like.dtype, device=like.device).view(shape)
        return mean, torch.tensor(self.std, dtype=like.dtype, device=like.device).view(shape)


class Tokenizer(nn.Module):
    """Images to latents and back.

    Attributes:
        encoder: Images to features.
        adapter: Features to the latent posterior.
        decoder: Latents to images.
        statistics: Mean and standard deviation of the latents, or None before they are known.
        about: Plain facts about how it was made, kept in the exported folder.
    """

    def __init__(
        self,
        encoder: Encoder,
        adapter: Adapter,
        decoder: Decoder,
        statistics: LatentStatistics | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.adapter = adapter
        self.decoder = decoder
        self.statistics = statistics
        self.about: dict[str, Any] = dict(about or {})

    @property
    def latent_channels(self) -> int:
        """Channels d of the latents."""
        return self.adapter.latent_channels

    @property
    def stride(self) -> int:
        """Image pixels per latent cell, per side."""
        return self.encoder.info.stride * self.adapter.stride

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the latents of an image size in pixels.

        Raises:
            DataError: The size does not divide into latent cells.
        """
        rows, columns = self.encoder.grid(height, width)
        step = self.adapter.stride
        if rows % step or columns % step:
            raise DataError(
                f"Images of {height}×{width} px give a {rows}×{columns} grid, which the adapter cannot merge "
                f"{step}×{step}; sides must be multiples of {self.stride} px."
            )
        return rows // step, columns // step

    def posterior(self, images: Tensor) -> Posterior:
        """Return the latent posterior of B×3×H×W images: floats in [-1, 1].

        Raises:
            DataError: The images are something else, bytes for instance, or their size does not divide into cells.
        """
        _check(images, 3, "images", "B×3×H×W floats in [-1, 1]; of bytes, images / 127.5 - 1 makes these")
        self.grid(images.shape[-2], images.shape[-1])
        posterior = self.adapter(self.encoder(images))
        assert isinstance(posterior, Posterior)
        return posterior

    def encode(self, images: Tensor) -> Tensor:
        """Return the latents of images: the mode of their posterior, B×d×h×w, not standardised; see `posterior`."""
        return self.posterior(images).mode()

    def decode(self, latents: Tensor) -> Tensor:
        """Return the B×3×H×W images of B×d×h×w latents that are not standardised, clamped to [-1, 1].

        Raises:
            DataError: The latents are something else.
        """
        channels = self.latent_channels
        _check(latents, channels, "latents", f"B×{channels}×h×w floats, as its encode returns them")
        image: Tensor = self.decoder(latents).image
        return image.clamp(-1.0, 1.0)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode and decode images."""
        return self.decode(self.encode(images))

    def standardise(self, latents: Tensor) -> Tensor:
        """Return (z − mean) / std, what diffusion models are trained on.

        Raises:
            DataError: The statistics are not known yet, or those of another grid.
        """
        mean, std = self._moments(latents)
        return (latents - mean) / std

    def restore(self, latents: Tensor) -> Tensor:
        """Undo `standardise`."""
        mean, std = self._moments(latents)
        return latents * std + mean

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.statistics is None:
            raise DataError(
                "This tokenizer has no latent statistics yet; 'underpaint encode' computes them over a data set."
            )
        return self.statistics.tensors(like)

    def fingerprint(self) -> str:
        """Return a hash of what decides the latents: encoder and adapter, names, options and weights.

        The decoder is not part of it: decoder refinement leaves caches and diffusion models valid.
        """
        digest = hashlib.sha256()
        for part in (self.encoder, self.adapter):
            spec = part.spec
            # The weights tag only says how the parameters began; their values are hashed themselves.
            name = spec.name.partition("@")[0]
            digest.update(json.dumps([name, dict(spec.options)], sort_keys=True).encode())
            digest.update(tensor_hash(part.state_dict()).encode())
        return digest.hexdigest()[:32]


def _check(given: object, channels: int, what: str, wanted: str) -> None:
    """Raise a `DataError` unless it is a batch of floating-point maps of so many channels."""
    found = type(given).__name__
    if isinstance(given, Tensor):
        if given.ndim == 4 and given.shape[1] == channels and given.numel() and given.is_floating_point():
            return
        found = f"{'×'.join(map(str, given.shape))} {str(given.dtype).removeprefix('torch.')}"
    raise DataError(f"The tokenizer was given {what} as {found}, and takes a tensor of {wanted}.")

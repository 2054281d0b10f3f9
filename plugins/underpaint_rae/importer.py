"""Published decoders of RAE to tokenizers."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import torch

import underpaint
from underpaint import ConfigError, DataError, Encoder, Importer, LatentStatistics, Tokenizer, load_weights
from underpaint_rae.config import ImportConfig
from underpaint_rae.layout import Sizes, check_positions, convert, decoder_tensors, measure

__all__ = ["RaeImporter"]

_SIZES = {
    (768, 12, 3072): ("rae/vit-b", 12),
    (1024, 24, 4096): ("rae/vit-l", 16),
    (1152, 28, 4096): ("rae/vit-xl", 16),
}
"""Name and heads of the published decoders, by width, depth and MLP width."""

_EPS = 1e-5
"""What RAE adds to the variances."""


class RaeImporter(Importer):
    """RAE's decoder file to a tokenizer with the frozen encoder it belongs to (rae.md §2).

    The file may be a published one (``model.pt``), or a training file, of which the moving average is taken. Sizes come
    from the shapes. All tensors are mapped but two groups: ``decoder_pos_embed``, fixed positions that our decoder
    computes and that are compared with the file's; and in training files ``encoder.*``, which was frozen and comes from
    the encoder's own weights.

    RAE works on images in [0, 1] and lets the decoder speak the encoder's normalised colours; the decoder here has that
    in its options ``mean`` and ``std``. The adapter adds noise only when it is trained on.
    """

    def __init__(self, config: ImportConfig) -> None:
        self.config = config

    def read(self, source: str) -> Tokenizer:
        """Return the tokenizer, in evaluation mode on the CPU.

        Args:
            source: RAE's decoder or training file: a path or an fsspec URL.

        Raises:
            DataError: The file is not of RAE's layout, or does not fit the encoder.
            ConfigError: The file does not tell the number of heads, and the option `heads` does not either.
        """
        tensors = decoder_tensors(load_weights(source, nested=("ema", "model", "state_dict")))
        sizes = measure(tensors, source)
        check_positions(tensors, sizes, source)
        name, heads = self._named(sizes)
        statistics = self.config.statistics and _read_statistics(self.config.statistics, sizes)
        encoder = underpaint.create("encoder", self.config.encoder, **self.config.encoder_options)
        assert isinstance(encoder, Encoder)
        self._check_encoder(encoder, sizes)
        context: dict[str, Any] = {"latent_channels": sizes.latent_channels}
        adapter = underpaint.create("adapter", "rae/identity", in_channels=encoder.info.channels, **context)
        decoder = underpaint.create(
            "decoder",
            name,
            **context,
            stride=sizes.patch,
            width=sizes.width,
            depth=sizes.depth,
            heads=heads,
            hidden=sizes.hidden,
            mean=encoder.info.mean,
            std=encoder.info.std,
        )
        decoder.load_state_dict(convert(tensors, decoder.state_dict(), sizes, source))
        grid = "×".join(map(str, sizes.grid))
        fact = f"Decoder from '{PurePosixPath(source).name}' of RAE (arXiv 2510.11690), trained on a {grid} grid."
        about = {"title": "A tokenizer of RAE", "facts": [fact]}
        return Tokenizer(encoder, adapter, decoder, statistics or None, about).eval()

    def _named(self, sizes: Sizes) -> tuple[str, int]:
        name, heads = _SIZES.get((sizes.width, sizes.depth, sizes.hidden), ("rae/vit-xl", None))
        chosen = self.config.heads or heads
        if chosen is None:
            raise ConfigError(
                f"The file holds a decoder of width {sizes.width}, depth {sizes.depth} and MLP width {sizes.hidden}, "
                "which is none that RAE published, and does not tell its attention heads; set the option 'heads'."
            )
        return name, chosen

    def _check_encoder(self, encoder: Encoder, sizes: Sizes) -> None:
        info = encoder.info
        if (info.channels[-1], info.stride) != (sizes.latent_channels, sizes.patch):
            raise DataError(
                f"The decoder is for {sizes.latent_channels} channels at stride {sizes.patch}, and the encoder "
                f"'{self.config.encoder}' gives {info.channels[-1]} at stride {info.stride}; set the option 'encoder' "
                "to the one that it was trained for."
            )


def _read_statistics(location: str, sizes: Sizes) -> LatentStatistics:
    """Read RAE's file of a mean and a variance, each d×h×w; the released ones lack the mean, which is then 0."""
    tensors = load_weights(location)
    if not tensors or not set(tensors) <= {"mean", "var"}:
        raise DataError(
            f"The statistics '{location}' hold {', '.join(sorted(tensors)[:3]) or 'nothing'} where 'var', and perhaps "
            "'mean', are expected; give RAE's 'stat.pt'."
        )
    d, (h, w) = sizes.latent_channels, sizes.grid
    fitting = ((d, 1, 1), (d, h, w))
    wrong = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if tensor.shape not in fitting]
    if wrong:
        raise DataError(
            f"The statistics '{location}' hold {' and '.join(wrong)}, and the decoder is for {d}×{h}×{w} latents; "
            "check that the two files belong together."
        )
    mean = tensors.get("mean", torch.zeros(d, 1, 1)).double()
    std = (tensors.get("var", torch.ones(d, 1, 1)).double() + _EPS).sqrt()
    if not bool(torch.isfinite(mean).all() and (std > 0.0).all() and torch.isfinite(std).all()):
        raise DataError(f"The statistics '{location}' hold values that are no means and variances; check the file.")
    grid = None if max(mean[0].numel(), std[0].numel()) == 1 else sizes.grid
    shape = (d, *(grid or (1, 1)))
    return LatentStatistics(
        mean=tuple(mean.expand(shape).flatten().tolist()),
        std=tuple(std.expand(shape).flatten().tolist()),
        count=0,
        data="",
        grid=grid,
    )

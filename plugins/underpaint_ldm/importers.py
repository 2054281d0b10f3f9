"""Weights files in the layout of the latent diffusion models: their own and Stable Diffusion's, FLUX's, VA-VAE's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from underpaint import DataError, Importer, LatentStatistics, Tokenizer, load_weights
from underpaint_ldm.config import FluxVaeConfig, LdmConfig, VaVaeConfig
from underpaint_ldm.layout import LDM, Shape, factors, looks_like, read

__all__ = ["FluxVae", "Ldm", "VaVae"]

_PREFIX = "first_stage_model."
_TRAINING = {"loss.": "critic, perceptual network and other parts of the training loss"}
_ALIGNMENT = {
    "linear_proj.": "projection of the alignment loss",
    "foundation_model.": "frozen encoder of the alignment loss",
}
_STABLE_DIFFUSION = 0.18215


class Ldm(Importer):
    """A KL autoencoder of the latent diffusion models: alone, or the first stage within a whole diffusion model."""

    def __init__(self, config: LdmConfig) -> None:
        self.config = config

    def read(self, source: str) -> Tokenizer:
        """Return the tokenizer of a weights file.

        Raises:
            DataError: It is not of that layout.
        """
        state = load_weights(source)
        weights = {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
        around = {key: value for key, value in state.items() if not key.startswith(_PREFIX)} if weights else {}
        shape = _shape("ldm", weights or state, source)
        tokenizer = read("ldm", shape, weights or state, LDM, _TRAINING, source)
        if around:
            fact = f"{len(around)} tensor(s) left out: the diffusion model around the autoencoder."
            tokenizer.about["facts"].append(fact)
        tokenizer.statistics = self._statistics(shape, around.get("scale_factor"), source)
        return tokenizer

    def _statistics(self, shape: Shape, scale: Tensor | None, source: str) -> LatentStatistics | None:
        d = shape.latent_channels
        if self.config.scale is not None:
            return factors(d, self.config.scale, self.config.shift or 0.0, "options of the import")
        if scale is not None:
            if scale.numel() != 1 or not 0.0 < float(scale) < float("inf"):
                raise DataError(f"The 'scale_factor' in '{source}' is no positive number; set the option 'scale'.")
            return factors(d, float(scale), 0.0, "scale_factor of the file")
        if (d, shape.stride, shape.quant_conv) == (4, 8, True):
            return factors(d, _STABLE_DIFFUSION, 0.0, "Stable Diffusion's, as the file has none")
        return None


class FluxVae(Importer):
    """The autoencoder of FLUX.1: LDM's without the 1×1 convolutions at the latent."""

    def __init__(self, config: FluxVaeConfig) -> None:
        self.config = config

    def read(self, source: str) -> Tokenizer:
        """Return the tokenizer of a weights file, such as ``ae.safetensors``.

        Raises:
            DataError: It is not of that layout.
        """
        weights = load_weights(source)
        shape = _shape("flux-vae", weights, source)
        if shape.quant_conv or shape.post_quant_conv:
            raise DataError(
                f"The weights '{source}' have a 1×1 convolution at the latent, and FLUX's have none. "
                f"{looks_like(weights, 'flux-vae')}"
            )
        tokenizer = read("flux-vae", shape, weights, LDM, {}, source)
        tokenizer.statistics = factors(
            shape.latent_channels, self.config.scale, self.config.shift, "FLUX.1's, or options of the import"
        )
        return tokenizer


class VaVae(Importer):
    """VA-VAE (Yao et al. 2025): LDM's of stride 16; what aligned its latents in training is left out."""

    def __init__(self, config: VaVaeConfig) -> None:
        self.config = config

    def read(self, source: str) -> Tokenizer:
        """Return the tokenizer of a weights file.

        Raises:
            DataError: It is not of that layout, or the statistics do not fit it.
        """
        weights = load_weights(source)
        shape = _shape("va-vae", weights, source)
        if shape.stride != 16:
            raise DataError(
                f"The weights '{source}' are of stride {shape.stride}, and VA-VAE's are of stride 16; "
                "import them as 'ldm' or 'flux-vae'."
            )
        tokenizer = read("va-vae", shape, weights, LDM, {**_TRAINING, **_ALIGNMENT}, source)
        if self.config.statistics is not None:
            tokenizer.statistics = _measured(self.config.statistics, shape.latent_channels)
        return tokenizer


def _shape(form: str, weights: Mapping[str, Tensor], source: str) -> Shape:
    """Read the shape off the names and sizes of tensors.

    Raises:
        DataError: The convolutions that tell it are not there, or attention is where we have none.
    """

    def side(key: str, dimension: int) -> int:
        if key not in weights or weights[key].ndim != 4:
            raise DataError(f"The weights '{source}' have no convolution '{key}'. {looks_like(weights, form)}")
        return int(weights[key].shape[dimension])

    def largest(pattern: str) -> int:
        return max((int(found[1]) for key in weights if (found := re.match(pattern, key))), default=0)

    deepest = largest(r"encoder\.down\.(\d+)\.")
    attention = {
        (m[1], int(m[2])) for key in weights if (m := re.match(r"(encoder\.down|decoder\.up)\.(\d+)\.attn\.", key))
    }
    if any(level != deepest for _, level in attention):
        raise DataError(
            f"The autoencoder '{source}' has attention above its deepest level, which 'ldm/encoder' and "
            "'ldm/decoder' do not have; it cannot be imported."
        )
    return Shape(
        base=side("encoder.conv_in.weight", 0),
        widths=tuple(side(f"encoder.down.{level}.block.0.conv2.weight", 0) for level in range(deepest + 1)),
        blocks=1 + largest(r"encoder\.down\.0\.block\.(\d+)\."),
        attention=(("encoder.down", deepest) in attention, ("decoder.up", deepest) in attention),
        latent_channels=side("decoder.conv_in.weight", 1),
        quant_conv=any(key.startswith("quant_conv.") for key in weights),
        post_quant_conv=any(key.startswith("post_quant_conv.") for key in weights),
    )


def _measured(location: str, channels: int) -> LatentStatistics:
    state = load_weights(location)
    mean, std = state.get("mean"), state.get("std")
    if mean is None or std is None or mean.numel() != channels or std.numel() != channels:
        found = ", ".join(f"{name} of {value.numel()} values" for name, value in sorted(state.items())[:3])
        raise DataError(
            f"The statistics '{location}' hold {found or 'nothing'}; mean and std of {channels} values are needed."
        )
    means, stds = mean.flatten().tolist(), std.flatten().tolist()
    if not all(0.0 < value < float("inf") for value in stds):
        raise DataError(
            f"The statistics '{location}' have a standard deviation that is not positive; take another file."
        )
    return LatentStatistics(mean=tuple(means), std=tuple(stds), count=0, data=f"published statistics: {location}")

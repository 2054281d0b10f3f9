"""Makes the models that a recipe describes."""

from __future__ import annotations

import attrs
import torch

from underpaint.config.component import ComponentConfig
from underpaint.config.diffusion import DiffusionConfig
from underpaint.config.tokenizer import TokenizerConfig
from underpaint.errors import ConfigError, DataError
from underpaint.interfaces.adapter import Adapter
from underpaint.interfaces.backbone import Backbone
from underpaint.interfaces.conditioner import Conditioner
from underpaint.interfaces.decoder import Decoder
from underpaint.interfaces.encoder import Encoder
from underpaint.models.denoiser import Denoiser
from underpaint.models.folders import load_folder
from underpaint.models.tokenizer import Tokenizer
from underpaint.registration.manager import manager

__all__ = ["build_generator_parts", "build_tokenizer", "load_tokenizer"]


_LATENT_CHANNELS = 32


def build_tokenizer(config: TokenizerConfig, seed: int) -> Tokenizer:
    """Make a tokenizer from its parts, or load the finished one that the config names.

    Channel counts and the decoder's scale are worked out from the encoder and adapter.

    Args:
        config: The recipe's tokenizer.
        seed: Seed of the random initialisation.
    """
    if config.load is not None:
        loaded = load_tokenizer(config.load)
        if config.latent_channels not in (None, loaded.latent_channels):
            raise ConfigError(
                f"tokenizer.latent_channels is {config.latent_channels}, and the latents of the tokenizer "
                f"'{config.load}' have {loaded.latent_channels} channels; leave it out, or load another tokenizer."
            )
        _check_stride(config, loaded)
        return loaded
    assert config.encoder is not None
    assert config.adapter is not None
    assert config.decoder is not None
    channels = config.latent_channels or _LATENT_CHANNELS
    torch.manual_seed(seed)
    encoder = _create("encoder", _fitted(config.encoder, config.adapter, config.stride))
    assert isinstance(encoder, Encoder)
    adapter = _create("adapter", config.adapter, in_channels=encoder.info.channels, latent_channels=channels)
    assert isinstance(adapter, Adapter)
    decoder = _create(
        "decoder",
        config.decoder,
        latent_channels=channels,
        stride=encoder.info.stride * adapter.stride,
    )
    assert isinstance(decoder, Decoder)
    tokenizer = Tokenizer(encoder, adapter, decoder)
    _check_stride(config, tokenizer)
    return tokenizer


def _fitted(encoder: ComponentConfig, adapter: ComponentConfig, stride: int | None) -> ComponentConfig:
    """Give an encoder the stride that makes the tokenizer's, unless it has one or none can be given."""
    catalogue = manager().catalogue
    options = catalogue.config("encoder", encoder.name, encoder.options, "tokenizer.encoder")
    if stride is None or "stride" in encoder.options or not hasattr(options, "stride"):
        return encoder
    merged = getattr(catalogue.config("adapter", adapter.name, adapter.options, "tokenizer.adapter"), "stride", 1)
    if stride % merged:
        raise ConfigError(
            f"tokenizer.stride is {stride}, and the adapter merges {merged}×{merged} cells of the encoder into one; "
            f"use a multiple of {merged}."
        )
    return attrs.evolve(encoder, options={**encoder.options, "stride": stride // merged})


def _check_stride(config: TokenizerConfig, tokenizer: Tokenizer) -> None:
    if config.stride in (None, tokenizer.stride):
        return
    encoder, adapter = tokenizer.encoder, tokenizer.adapter
    raise ConfigError(
        f"tokenizer.stride is {config.stride}, and a latent cell covers {tokenizer.stride} px: {encoder.info.stride} "
        f"of the encoder '{encoder.spec.name}', times {adapter.stride} of the adapter '{adapter.spec.name}'; change "
        "one of them, or leave tokenizer.stride out."
    )


def load_tokenizer(location: str) -> Tokenizer:
    """Load an exported tokenizer folder.

    Raises:
        DataError: The folder holds something else.
    """
    model = load_folder(location)
    if isinstance(model, Tokenizer):
        return model
    if isinstance(model, Denoiser):
        raise DataError(f"'{location}' holds a diffusion model without a tokenizer; name a tokenizer's folder.")
    return model.tokenizer


def build_generator_parts(
    config: DiffusionConfig,
    tokenizer: Tokenizer,
    *,
    grid: tuple[int, int],
    classes: int,
    has_text: bool,
    seed: int,
    path: str = "diffusion",
) -> tuple[Backbone, Conditioner]:
    """Make backbone and conditioner for a tokenizer's latents.

    Args:
        config: The recipe's diffusion section, or that of a stage's denoiser.
        tokenizer: Whose latents are generated.
        grid: Height and width of the latents.
        classes: Classes of the data set, 0 when it has none.
        has_text: Whether its samples carry captions.
        seed: Seed of the random initialisation.
        path: Where the settings stand in the recipe, for messages.

    Raises:
        ConfigError: The backbone does not fit the grid.
        DataError: The conditioner needs captions that the data set lacks.
    """
    torch.manual_seed(seed)
    options = manager().catalogue.config("backbone", config.backbone.name, config.backbone.options, f"{path}.backbone")
    width = getattr(options, "width", None)
    if not isinstance(width, int):
        raise ConfigError(f"The config of backbone '{config.backbone.name}' declares no width; its plugin must.")
    conditioner = _create("conditioner", config.conditioner, width=width, classes=classes)
    assert isinstance(conditioner, Conditioner)
    if conditioner.accepts == "text" and not has_text:
        raise DataError(
            f"The conditioner '{config.conditioner.name}' needs captions, and the data set has none; "
            "use 'labels', or data with texts."
        )
    backbone = _create(
        "backbone",
        config.backbone,
        latent_channels=tokenizer.latent_channels,
        grid=grid,
        pooled_dim=conditioner.pooled_dim,
        token_dim=conditioner.token_dim,
    )
    assert isinstance(backbone, Backbone)
    if grid[0] % backbone.patch or grid[1] % backbone.patch:
        raise ConfigError(
            f"The backbone '{config.backbone.name}' cuts latents into {backbone.patch}×{backbone.patch} patches, "
            f"which do not divide the {grid[0]}×{grid[1]} grid; choose a patch that does."
        )
    return backbone, conditioner


def _create(kind: str, config: ComponentConfig, **context: object) -> object:
    return manager().create(kind, config.name, **config.options, **context)

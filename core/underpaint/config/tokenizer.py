"""The tokenizer: its three parts, or one that is loaded."""

from __future__ import annotations

import attrs

from underpaint.config.component import ComponentConfig
from underpaint.config.ranges import optional_positive
from underpaint.errors import ConfigError

__all__ = ["TokenizerConfig"]


@attrs.frozen(kw_only=True)
class TokenizerConfig:
    """Encoder, adapter and decoder; or a folder of a finished tokenizer.

    Attributes:
        encoder: Encoder.
        adapter: Adapter.
        decoder: Decoder.
        latent_channels: d of the latent; None is 32, or that of the tokenizer that is loaded, which it must equal.
        stride: Pixels of the image that a latent cell covers, per side; an encoder with an option of that name is
            given images of the size that makes it so. None takes what encoder and adapter give.
        load: Folder or URL of an exported tokenizer to start from, instead of the three.
    """

    encoder: ComponentConfig | None = None
    adapter: ComponentConfig | None = None
    decoder: ComponentConfig | None = None
    latent_channels: int | None = attrs.field(default=None, validator=optional_positive)
    stride: int | None = attrs.field(default=None, validator=optional_positive)
    load: str | None = None

    def __attrs_post_init__(self) -> None:
        parts = [self.encoder, self.adapter, self.decoder]
        if self.load is None and None in parts:
            raise ConfigError("tokenizer needs 'encoder', 'adapter' and 'decoder', or 'load' with an exported folder.")
        if self.load is not None and parts != [None] * 3:
            raise ConfigError("tokenizer has 'load' beside 'encoder', 'adapter' or 'decoder'; keep one of the two.")

"""Options of the encoder."""

import attrs
from attrs import validators


@attrs.frozen(kw_only=True)
class ConvConfig:
    """Options of ``blocks/conv``.

    Attributes:
        width: Channels of its map.
        block: Pixels of one cell, per side.
    """

    width: int = attrs.field(default=32, validator=validators.gt(0))
    block: int = attrs.field(default=8, validator=validators.gt(0))

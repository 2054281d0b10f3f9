"""The grammar of component names: ``family/model[@weights]``."""

from __future__ import annotations

import re

import attrs

from underpaint.errors import ConfigError

__all__ = ["KINDS", "Name", "parse_name"]

KINDS = (
    "encoder",
    "adapter",
    "decoder",
    "backbone",
    "conditioner",
    "loss",
    "metric",
    "dataset",
    "sampler",
    "tracker",
    "importer",
)

_BASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9*][A-Za-z0-9._+*-]*)?")


@attrs.frozen
class Name:
    """A parsed name.

    Attributes:
        base: ``family/model``, or a plain word for kinds without families.
        weights: What follows the first ``@``: a tag, ``random``, ``file:PATH`` or an fsspec URL; None
            when the name has no ``@``.
    """

    base: str
    weights: str | None = None

    @property
    def family(self) -> str:
        """The part before the slash, or the whole base."""
        return self.base.partition("/")[0]

    @property
    def model(self) -> str:
        """The part after the slash, or an empty string."""
        return self.base.partition("/")[2]

    def __str__(self) -> str:
        return self.base if self.weights is None else f"{self.base}@{self.weights}"


def parse_name(text: str) -> Name:
    """Parse ``family/model[@weights]``.

    Raises:
        ConfigError: The text is not a name.
    """
    base, at, weights = text.partition("@")
    if not _BASE.fullmatch(base) or (at and not weights):
        raise ConfigError(
            f"'{text}' is not a component name; names look like 'family/model' or 'family/model@weights', "
            "such as 'timm/vit_base_patch14_dinov2@lvd142m'."
        )
    return Name(base, weights if at else None)

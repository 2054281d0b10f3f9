"""What every component has: a record of what it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

__all__ = ["Component", "ComponentSpec"]


@attrs.frozen
class ComponentSpec:
    """The name and the complete options that make a component again.

    Attributes:
        kind: One of the eleven kinds, such as ``"encoder"``.
        name: Canonical registered name, aliases resolved, such as ``"tiny/vit@random"``.
        options: Every field of the component's config, as plain values (YAML and JSON can hold them).
        context: The keyword arguments beside the config, such as channel counts.
        plugin: Name of the plugin that registered it.
        distribution: What to install to have it, such as ``"underpaint-blocks 0.2.0"``.
    """

    kind: str
    name: str
    options: Mapping[str, Any] = attrs.field(factory=dict)
    context: Mapping[str, Any] = attrs.field(factory=dict)
    plugin: str = ""
    distribution: str = ""


class Component:
    """Mixin of all kinds. ``underpaint.create`` sets `spec` after construction."""

    spec: ComponentSpec

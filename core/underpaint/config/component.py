"""A component in a recipe: its registered name and its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from underpaint.errors import ConfigError

__all__ = ["ComponentConfig", "split_options"]


def split_options(value: Any, path: str, reserved: tuple[str, ...]) -> Any:
    """Split ``{name, reserved keys, options…}``, as it is written, into the fields of a class.

    Args:
        value: The name alone, or a mapping.
        path: Where it stands, for messages.
        reserved: Fields of the class; every other key is an option of the component.

    Raises:
        ConfigError: It is neither, or has no name.
    """
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path} must be a component name, or a mapping with 'name' and its options.")
    if "name" not in value:
        raise ConfigError(f"{path} lacks the key 'name', the registered name of the component.")
    options = {key: item for key, item in value.items() if key not in reserved}
    fixed = {key: item for key, item in value.items() if key in reserved}
    return {**fixed, "options": options}


@attrs.frozen(kw_only=True)
class ComponentConfig:
    """A component: its name alone, or ``{name: …, option: …}``."""

    name: str
    options: Mapping[str, Any] = attrs.field(factory=dict)

    @staticmethod
    def from_plain(value: Any, path: str) -> Any:
        """Accept the flat form that recipes are written in."""
        return split_options(value, path, ("name",))

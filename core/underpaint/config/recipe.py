"""Reads and writes recipes: YAML files with dotted overrides."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import yaml

from underpaint.config.component import ComponentConfig
from underpaint.config.losses import LossConfig
from underpaint.config.schema import Recipe
from underpaint.config.structure import structure, unstructure
from underpaint.errors import ConfigError, NotFoundError

__all__ = [
    "apply_overrides",
    "dump_recipe",
    "plain_component",
    "plain_recipe",
    "read_yaml",
    "recipe_from_plain",
    "write_atomically",
]


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number and a key written twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*(\.\d*)?([eE][-+]?\d+)|\d[\d_]*\.\d*|\.\d+([eE][-+]?\d+)?|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise ConfigError(f"The key '{key}' stands twice in line {key_node.start_mark.line + 1}; keep one.")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - derived from SafeLoader


def read_yaml(path: Path, keys: str = "'data' and 'tokenizer'") -> dict[str, Any]:
    """Read a YAML mapping.

    Args:
        path: The file.
        keys: Some of its keys, for the message when it holds something else.

    Raises:
        NotFoundError: There is no such file.
        ConfigError: It is not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(
            f"There is no recipe file '{path}'; shipped recipes are written 'recipe:NAME', "
            "and 'underpaint recipes list' shows them."
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"'{path}' is a folder; name a YAML file, such as '{path / 'config.yaml'}'.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}.") from error
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"'{path}' is not valid YAML{where}: {getattr(error, 'problem', error)}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"'{path}' must hold a mapping with keys such as {keys}.")
    return value


def apply_overrides(plain: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set single values, such as ``stages.align.steps=100`` or ``data.size=64``.

    A list element is addressed by its index or by its ``name``. A component written as a bare name becomes a
    mapping when one of its options is set. Values are YAML.

    Raises:
        ConfigError: An override is not of the form ``path=value``, or its path leads nowhere.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"'{override}' is not an override; write 'path=value', such as 'data.size=64'.")
        try:
            value = _parse(text) if text else ""
        except yaml.YAMLError:
            value = text
        keys = path.strip().split(".")
        node: Any = plain
        for depth, key in enumerate(keys[:-1]):
            node = _enter(node, key, ".".join(keys[: depth + 1]))
        _set(node, keys[-1], value, path)
    return plain


def _enter(node: Any, key: str, path: str) -> Any:
    if isinstance(node, list):
        return _as_mapping(node, _index(node, key, path))
    if not isinstance(node, dict):
        raise ConfigError(f"The override '{path}' leads into {node!r}, which has no keys.")
    if node.get(key) is None:
        node[key] = {}
    return _as_mapping(node, key)


def _as_mapping(node: Any, key: Any) -> Any:
    if isinstance(node[key], str):
        node[key] = {"name": node[key]}
    return node[key]


def _set(node: Any, key: str, value: Any, path: str) -> None:
    if isinstance(node, list):
        node[_index(node, key, path)] = value
    elif isinstance(node, dict):
        node[key] = value
    else:
        raise ConfigError(f"The override '{path}' leads into {node!r}, which has no keys.")


def _index(items: list[Any], key: str, path: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else item for item in items]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(items):
        return int(key)
    raise ConfigError(
        f"The override '{path}' names no element; known: {', '.join(str(name) for name in names)}, "
        f"or an index from 0 to {len(items) - 1}."
    )


def recipe_from_plain(plain: dict[str, Any]) -> Recipe:
    """Check plain values against the schema.

    Raises:
        ConfigError: A key is unknown, missing or of the wrong type; the message names its path.
    """
    return structure(plain, Recipe, "")


def plain_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain values, in the flat form that recipes are written in."""
    result = _flatten(recipe)
    assert isinstance(result, dict)
    return result


def plain_component(config: ComponentConfig) -> Any:
    """Return a component config in the flat form that recipes are written in."""
    return _flatten(config)


def _flatten(value: Any) -> Any:
    if isinstance(value, (ComponentConfig, LossConfig)):
        fields = {a.name: _flatten(getattr(value, a.name)) for a in attrs.fields(type(value)) if a.name != "options"}
        options = unstructure(value.options)
        flat = {**fields, **options}
        return flat["name"] if list(flat) == ["name"] else flat
    if attrs.has(type(value)):
        return {a.name: _flatten(getattr(value, a.name)) for a in attrs.fields(type(value))}
    if isinstance(value, (list, tuple)):
        return [_flatten(item) for item in value]
    if isinstance(value, dict):
        return {key: _flatten(item) for key, item in value.items()}
    return value


def dump_recipe(recipe: Recipe) -> str:
    """Return the complete recipe as YAML."""
    return yaml.safe_dump(plain_recipe(recipe), sort_keys=False, allow_unicode=True, width=120)


def write_atomically(path: Path, text: str | bytes) -> None:
    """Replace a file as a whole: temporary file beside it, fsync, rename, fsync of the folder."""
    data = text.encode() if isinstance(text, str) else text
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

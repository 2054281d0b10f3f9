"""Plain values to attrs classes, strictly: unknown keys and wrong types are errors with a path."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import attrs
import cattrs

from underpaint.errors import ConfigError, suggest

__all__ = ["structure", "unstructure"]

_T = TypeVar("_T")
_MISSING = object()


def structure(value: Any, cls: type[_T], path: str) -> _T:
    """Turn plain values (as YAML gives them) into an object of an attrs class.

    Integers are accepted where floats are wanted; nothing else is converted.

    Args:
        value: A mapping.
        cls: attrs class; its fields may be scalars, Literal, Optional, tuples, mappings and attrs classes.
        path: Where the value stands, for messages, such as ``"tokenizer.encoder"``.

    Raises:
        ConfigError: A key is unknown, a required one is missing, a value has the wrong type, or a
            validator of the class refuses it. The message names the path.
    """
    result = _structure(value, cls, path)
    assert isinstance(result, cls)
    return result


def unstructure(value: Any) -> Any:
    """Turn an attrs object into plain values that YAML and JSON can hold."""
    return _plain(_CONVERTER.unstructure(value))


_CONVERTER = cattrs.Converter(use_alias=True)
_CONVERTER.register_unstructure_hook(Path, str)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _structure(value: Any, target: Any, path: str) -> Any:
    if target is Any:
        return value
    origin = get_origin(target)
    if origin in (Union, types.UnionType):
        return _union(value, get_args(target), path)
    if origin is Literal:
        return _choice(value, get_args(target), path)
    if origin is tuple:
        return _tuple(value, get_args(target), path)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        key_type, item_type = get_args(target)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a mapping, not {_say(value)}.")
        return {
            _structure(key, key_type, f"A key of {_at(path)}"): _structure(item, item_type, _join(path, key))
            for key, item in value.items()
        }
    if attrs.has(target):
        return _attrs(value, target, path)
    # Of an empty text, Path makes the current folder.
    if target is Path and isinstance(value, (str, Path)) and value != "":
        return Path(value)
    if target is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _float(value, path)
    if target is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if target is bool and isinstance(value, bool):
        return value
    if target is str and isinstance(value, str):
        return value
    if target is type(None) and value is None:
        return None
    if target not in _NAMES and target is not type(None):
        raise TypeError(f"{path} is declared as {target}, which a config class cannot have; see structure().")
    raise ConfigError(f"{_at(path)} must be {_name(target)}, not {_say(value)}.")


def _at(path: str) -> str:
    return path or "The config"


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _choice(value: Any, choices: tuple[Any, ...], path: str) -> Any:
    for choice in choices:
        # 1, 1.0 and True are equal to Python, and not to a reader.
        if type(choice) is type(value) and choice == value:
            return choice
    hint = suggest(str(value), map(str, choices)) if isinstance(value, str) else ""
    hint = hint if hint.startswith("Did") else ""
    raise ConfigError(" ".join(f"{path} is {value!r}. {hint} Known: {', '.join(map(repr, choices))}.".split()))


def _float(value: float, path: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        raise ConfigError(f"{path} is too large for a number.") from None
    if math.isnan(number):
        raise ConfigError(f"{path} is not a number (nan).")
    return number


def _attrs(value: Any, cls: Any, path: str) -> Any:
    if isinstance(value, cls):
        return value
    from_plain = getattr(cls, "from_plain", None)
    if from_plain is not None:
        value = from_plain(value, path)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{_at(path)} must be a mapping with keys such as {_keys(cls)}, not {_say(value)}.")
    attrs.resolve_types(cls)
    fields = {field.alias: field for field in attrs.fields(cls) if field.init}
    for key in value:
        if key not in fields:
            raise ConfigError(f"{_at(path)} has no key '{key}'. {suggest(str(key), fields) or 'It has no keys.'}")
    made = {}
    for key, field in fields.items():
        given = value.get(key, _MISSING)
        if given is _MISSING:
            if field.default is attrs.NOTHING:
                raise ConfigError(f"{_at(path)} lacks the key '{key}' ({_name(field.type)}).")
            continue
        made[key] = _structure(given, field.type, _join(path, key))
    try:
        return cls(**made)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{_at(path)}: {_validator_text(error)}") from error


def _validator_text(error: Exception) -> str:
    text = str(error.args[0]) if error.args else str(error)
    return text if text.endswith(".") else text + "."


def _union(value: Any, options: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _structure(value, option, path)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise ConfigError(f"{_at(path)} must be {' or '.join(_name(o) for o in options)}, not {_say(value)}.")


def _tuple(value: Any, items: tuple[Any, ...], path: str) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ConfigError(f"{path} must be a list, not {_say(value)}.")
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_structure(v, items[0], f"{path}[{i}]") for i, v in enumerate(value))
    if len(items) != len(value):
        raise ConfigError(f"{path} must be a list of {len(items)} values, not {len(value)}.")
    return tuple(_structure(v, t, f"{path}[{i}]") for i, (v, t) in enumerate(zip(value, items, strict=True)))


def _keys(cls: Any) -> str:
    return ", ".join(f"'{field.alias}'" for field in attrs.fields(cls)[:4])


def _say(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    return f"{value!r}"


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}


def _name(target: Any) -> str:
    if target in _NAMES:
        return _NAMES[target]
    if target is type(None):
        return "nothing"
    origin = get_origin(target)
    if origin is tuple:
        return "a list"
    if origin in (Union, types.UnionType):
        return " or ".join(_name(option) for option in get_args(target))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(target)))
    return f"a {getattr(target, '__name__', str(target))}"

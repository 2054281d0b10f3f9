"""Measured numbers, each with the protocol it was measured by.

Two numbers are comparable when their protocols agree in everything. A protocol is a mapping of plain JSON values;
a metric gives its part (`underpaint.Metric.protocol`), the evaluation adds its own. The keys that matter:

=====================  ==============================================================================
what was compared      ``metric``, ``images`` and ``references`` (how many), ``image_size``, data set, split and
                       its fingerprint, ``levels`` (8-bit rounding)
features               ``extractor``, ``weights`` (hash), ``features``, ``resize``, ``random_features``,
                       ``rank_deficient``, ``reference_file`` (hash)
labels                 label protocol: balanced or random
sampling               solver, grid points, evaluations, shift; guidance scale, interval, channels and the hash of a
                       weaker model; seed
=====================  ==============================================================================
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers as numeric
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from underpaint.config.recipe import write_atomically
from underpaint.errors import DataError, UnderpaintError

__all__ = ["Number", "compare", "format_table", "protocol_id", "read_numbers", "write_numbers"]

_FORMAT = 1


def _plain_protocol(value: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        plain = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise DataError(f"A protocol must hold plain JSON values only: {error}.") from None
    assert isinstance(plain, dict)
    return plain


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numeric.Real):
        raise DataError(f"The value of a number is {value!r}, which is none.")
    return float(value)


def _finite(_: Any, field: attrs.Attribute[Any], value: float | None) -> None:
    if value is not None and not math.isfinite(value):
        raise DataError(f"The {field.name} of a number is {value}; only finite numbers are reported.")


@attrs.frozen(kw_only=True)
class Number:
    """A measured value with its protocol.

    Attributes:
        name: What was measured, such as ``"psnr"``.
        value: The value; finite.
        protocol: How it was measured, as plain JSON values (tuples become lists).
        std: Standard deviation over repetitions, such as seeds; None when it was measured once.
        higher_is_better: Which of two such values is the better one; None when neither is.

    Raises:
        DataError: The value is not finite, or the protocol holds something that JSON cannot.
    """

    name: str = attrs.field(validator=attrs.validators.instance_of(str))
    value: float = attrs.field(converter=_float, validator=_finite)
    protocol: Mapping[str, Any] = attrs.field(converter=_plain_protocol, hash=False)
    std: float | None = attrs.field(default=None, converter=attrs.converters.optional(_float), validator=_finite)
    higher_is_better: bool | None = None

    @property
    def id(self) -> str:
        """The `protocol_id` of its protocol."""
        return protocol_id(self.protocol)


def protocol_id(protocol: Mapping[str, Any]) -> str:
    """Return the first 12 hex digits of the SHA-256 of a protocol.

    The order of keys does not matter, nor whether a whole number is written as 1 or 1.0.
    """
    text = json.dumps(_canonical(_plain_protocol(protocol)), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def compare(a: Number, b: Number, force: bool = False) -> float:
    """Return by how much `a` is above `b`.

    Args:
        a: A number.
        b: Another of the same name.
        force: Compare although the protocols differ.

    Raises:
        UnderpaintError: The two measure different things, or their protocols differ and `force` is not set.
    """
    if a.name != b.name:
        raise UnderpaintError(f"'{a.name}' and '{b.name}' are different quantities; compare numbers of one name.")
    if a.id != b.id and not force:
        differences = "; ".join(_differences(a.protocol, b.protocol))
        raise UnderpaintError(
            f"The two values of '{a.name}' were measured by different protocols ({a.id} and {b.id}): {differences}. "
            "Measure both by one protocol, or compare them nevertheless with --force."
        )
    return a.value - b.value


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    left, right = _flat(_canonical(dict(a))), _flat(_canonical(dict(b)))
    return [
        f"{key} is {left.get(key, 'absent')} and {right.get(key, 'absent')}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """Return the leaves as JSON texts, by dotted key."""
    if not isinstance(value, dict) or (path and not value):
        return {path: json.dumps(value, ensure_ascii=False, sort_keys=True)}
    leaves: dict[str, str] = {}
    for key, item in value.items():
        leaves.update(_flat(item, f"{path}.{key}" if path else key))
    return leaves


def write_numbers(path: str | Path, numbers: Iterable[Number]) -> None:
    """Write numbers to a JSON file, which is replaced as a whole or not at all."""
    target = Path(path)
    entries = [
        {
            "name": n.name,
            "value": n.value,
            "std": n.std,
            "higher_is_better": n.higher_is_better,
            "protocol_id": n.id,
            "protocol": n.protocol,
        }
        for n in numbers
    ]
    text = json.dumps({"format": _FORMAT, "numbers": entries}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, text)


def read_numbers(path: str | Path) -> list[Number]:
    """Read what `write_numbers` wrote.

    Raises:
        DataError: The file is missing, damaged, of a newer format, or a protocol does not fit its id.
    """
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"There is no file of numbers '{path}'; measure first with 'underpaint evaluate'.") from None
    except IsADirectoryError:
        raise DataError(f"'{path}' is a folder; name a file of numbers that 'underpaint evaluate' saved.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"The file of numbers '{path}' cannot be read: {error}.") from error
    if not isinstance(held, dict) or held.get("format") != _FORMAT or not isinstance(held.get("numbers"), list):
        raise DataError(f"'{path}' is not a file of numbers of format {_FORMAT}; measure again to write one.")
    return [_read_number(entry, f"'{path}', entry {index}") for index, entry in enumerate(held["numbers"])]


def _read_number(entry: Any, where: str) -> Number:
    try:
        number = Number(
            name=entry["name"],
            value=entry["value"],
            protocol=entry["protocol"],
            std=entry["std"],
            higher_is_better=entry.get("higher_is_better"),
        )
        recorded = entry["protocol_id"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}, is not a number with its protocol ({error}); measure again.") from error
    if recorded != number.id:
        raise DataError(
            f"{where}, was changed by hand: its protocol has id {number.id}, not {recorded}; measure again."
        )
    return number


def format_table(numbers: Sequence[Number]) -> str:
    """Return a plain-text table of name, value (± standard deviation), number of images and protocol id."""
    rows = [("name", "value", "images", "protocol")]
    for n in numbers:
        value = f"{n.value:.4f}" if n.std is None else f"{n.value:.4f} ± {n.std:.4f}"
        rows.append((n.name, value, str(n.protocol.get("images", "")), n.id))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

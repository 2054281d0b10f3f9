"""Plain values to config classes: strict, with the path and a suggestion in every error."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
from attrs import validators
from hypothesis import example, given
from hypothesis import strategies as st

from underpaint.config.structure import structure, unstructure
from underpaint.errors import ConfigError


@attrs.frozen(kw_only=True)
class Inner:
    rate: float = attrs.field(default=0.5, validator=validators.ge(0))
    names: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Outer:
    count: int
    flag: bool = False
    mode: Literal["fast", "slow"] = "fast"
    zero: Literal[0, 1, 2, 3] = 0
    size: int | tuple[int, int] = 1
    limit: float | None = None
    inner: Inner = attrs.field(factory=Inner)
    many: tuple[Inner, ...] = ()
    by_name: Mapping[str, float] = attrs.field(factory=dict)
    anything: Any = None
    place: Path = Path("here")
    _hidden: int = 0


def make(**values: Any) -> Outer:
    return structure({"count": 1, **values}, Outer, "top")


ERRORS = [
    ({"cuont": 2}, "top has no key 'cuont'. Did you mean 'count'?"),
    ({"count": "1"}, "top.count must be a whole number, not '1'."),
    ({"count": 1.0}, "top.count must be a whole number, not 1.0."),
    ({"count": True}, "top.count must be a whole number, not True."),
    ({"count": None}, "top.count must be a whole number, not nothing."),
    ({"flag": 1}, "top.flag must be true or false, not 1."),
    ({"flag": "yes"}, "top.flag must be true or false, not 'yes'."),
    ({"mode": "fsat"}, "top.mode is 'fsat'. Did you mean 'fast'? Known: 'fast', 'slow'."),
    ({"mode": 3}, "top.mode is 3. Known: 'fast', 'slow'."),
    ({"mode": []}, "top.mode is []. Known: 'fast', 'slow'."),
    ({"zero": 5}, "top.zero is 5. Known: 0, 1, 2, 3."),
    ({"zero": True}, "top.zero is True. Known: 0, 1, 2, 3."),
    ({"zero": 1.0}, "top.zero is 1.0. Known: 0, 1, 2, 3."),
    ({"size": "big"}, "top.size must be a whole number or a list, not 'big'."),
    ({"size": [1, 2, 3]}, "top.size must be a whole number or a list, not a list."),
    ({"limit": float("nan")}, "top.limit is not a number (nan)."),
    ({"limit": 10**400}, "top.limit is too large for a number."),
    ({"limit": "high"}, "top.limit must be a number, not 'high'."),
    ({"inner": 3}, "top.inner must be a mapping with keys such as 'rate', 'names', not 3."),
    ({"inner": {"rte": 3}}, "top.inner has no key 'rte'. Did you mean 'rate'?"),
    ({"inner": {"rate": -1}}, "top.inner: 'rate' must be >= 0: -1.0."),
    ({"inner": {"names": "ab"}}, "top.inner.names must be a list, not 'ab'."),
    ({"inner": {"names": ["a", 2]}}, "top.inner.names[1] must be a text, not 2."),
    ({"many": [{}, {"rate": "x"}]}, "top.many[1].rate must be a number, not 'x'."),
    ({"many": {"rate": 1}}, "top.many must be a list, not a mapping."),
    ({"by_name": {"a": "x"}}, "top.by_name.a must be a number, not 'x'."),
    ({"by_name": {1: 1.0}}, "A key of top.by_name must be a text, not 1."),
    ({"by_name": [1]}, "top.by_name must be a mapping, not a list."),
    ({"place": 3}, "top.place must be a path, not 3."),
    ({3: 3}, "top has no key '3'."),
]


@pytest.mark.parametrize(("values", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors_name_path_and_remedy(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        structure({"count": 1, **values}, Outer, "top")
    assert str(caught.value).startswith(message)


def test_missing_key_and_root() -> None:
    with pytest.raises(ConfigError, match=r"^The config lacks the key 'count' \(a whole number\)\.$"):
        structure({}, Outer, "")
    with pytest.raises(ConfigError, match=r"^The config has no key 'x'\."):
        structure({"count": 1, "x": 1}, Outer, "")
    with pytest.raises(ConfigError, match=r"^inner\.rate must be a number"):
        structure({"count": 1, "inner": {"rate": []}}, Outer, "")
    with pytest.raises(ConfigError, match=r"^The config must be a mapping with keys such as 'count'"):
        structure([], Outer, "")


def test_accepted_forms() -> None:
    assert make(limit=3).limit == 3.0
    assert type(make(limit=3).limit) is float
    assert make(size=[4, 5]).size == (4, 5)
    assert make(size=4).size == 4
    assert make(place="a/b").place == Path("a/b")
    assert make(inner=Inner(rate=2.0)).inner == Inner(rate=2.0)
    assert make(hidden=3)._hidden == 3
    assert make(anything={"a": [1, None]}).anything == {"a": [1, None]}


def test_type_that_configs_cannot_have() -> None:
    @attrs.frozen
    class Wrong:
        items: set[int]

    with pytest.raises(TypeError, match=r"top\.items is declared as set\[int\], which a config class cannot have"):
        structure({"items": [1]}, Wrong, "top")


def test_from_plain_is_asked_first() -> None:
    @attrs.frozen
    class Named:
        name: str

        @staticmethod
        def from_plain(value: Any, path: str) -> Any:
            return {"name": value} if isinstance(value, str) else value

    assert structure("abc", Named, "top") == Named("abc")
    assert structure({"name": "abc"}, Named, "top") == Named("abc")


# ------------------------------------------------------------------------------ properties

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
INNER = st.builds(Inner, rate=NUMBERS.map(abs), names=st.lists(st.text()).map(tuple))
OUTER = st.builds(
    Outer,
    count=st.integers(),
    flag=st.booleans(),
    mode=st.sampled_from(["fast", "slow"]),
    zero=st.sampled_from([0, 1, 2, 3]),
    size=st.integers() | st.tuples(st.integers(), st.integers()),
    limit=st.none() | NUMBERS,
    inner=INNER,
    many=st.lists(INNER, max_size=3).map(tuple),
    by_name=st.dictionaries(st.text(), NUMBERS, max_size=3),
    anything=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=4),
    place=st.sampled_from([Path("a"), Path("a/b c")]),
    hidden=st.integers(),
)


@given(OUTER)
def test_json_round_trip(value: Outer) -> None:
    plain = json.loads(json.dumps(unstructure(value)))
    assert structure(plain, Outer, "top") == value


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([field.alias for field in attrs.fields(Outer)]), PLAIN)
@example("place", "")
@example("place", "a/")
def test_any_value_is_taken_or_refused_with_its_path(key: str, value: Any) -> None:
    try:
        result = structure({"count": 1, key: value}, Outer, "top")
    except ConfigError as refusal:
        message = str(refusal)
    else:
        # What was taken keeps its type: nothing but a whole number for a real one is converted.
        stored = unstructure(getattr(result, "_hidden" if key == "hidden" else key))
        if key != "anything" and isinstance(value, (str, bool, int)):
            # Two spellings of a place are one, but no text is no place.
            assert stored == (str(Path(value)) if key == "place" and value else value)
        return
    assert message.startswith((f"top.{key}", f"A key of top.{key}", "top:"))
    assert message.endswith(("?", "."))


@given(st.text().filter(lambda text: text not in {field.alias for field in attrs.fields(Outer)}))
def test_unknown_keys_are_never_ignored(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        structure({"count": 1, key: 1}, Outer, "top")
    assert f"top has no key '{key}'" in str(caught.value)

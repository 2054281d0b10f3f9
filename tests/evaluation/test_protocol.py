"""Numbers and their protocols."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from underpaint.errors import DataError, UnderpaintError
from underpaint.evaluation.protocol import Number, compare, format_table, protocol_id, read_numbers, write_numbers

PROTOCOL = {"metric": "psnr", "images": 1000, "guidance": {"scale": 4.0, "channels": 3}, "sizes": ["256x256"]}

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False)
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
protocols = st.dictionaries(st.text(min_size=1), values, max_size=5)


def number(value: float = 1.0, name: str = "psnr", std: float | None = None, **changes: object) -> Number:
    return Number(name=name, value=value, protocol={**PROTOCOL, **changes}, std=std)


def test_the_id_is_the_hash_of_sorted_compact_json():
    text = '{"b":[1,2.5],"é":null}'
    assert protocol_id({"é": None, "b": (1.0, 2.5)}) == hashlib.sha256(text.encode()).hexdigest()[:12]


@given(protocols)
def test_the_id_survives_json_and_the_order_of_keys(protocol):
    turned = dict(reversed(protocol.items()))
    assert protocol_id(json.loads(json.dumps(turned))) == protocol_id(protocol)


@given(protocols, st.text(min_size=1), values)
def test_another_value_of_a_key_gives_another_id(protocol, key, value):
    changed = {**protocol, key: [value, "changed"]}
    assert protocol_id(changed) != protocol_id({**protocol, key: value})


def test_true_is_not_one():
    assert protocol_id({"a": True}) != protocol_id({"a": 1})


def test_numbers_of_one_protocol_compare():
    assert compare(number(25.0), number(24.5)) == 0.5


def test_numbers_of_different_protocols_do_not_compare_without_force():
    a, b = number(25.0), number(24.5, images=500, guidance={"scale": 1.0, "channels": 3}, seed=1)
    with pytest.raises(UnderpaintError) as caught:
        compare(a, b)
    text = str(caught.value)
    assert "guidance.scale is 4 and 1" in text
    assert "images is 1000 and 500" in text
    assert "seed is absent and 1" in text
    assert "--force" in text
    assert "channels" not in text
    assert "metric" not in text
    assert compare(a, b, force=True) == 0.5


def test_different_quantities_never_compare():
    with pytest.raises(UnderpaintError, match="'psnr' and 'ssim'"):
        compare(number(), number(name="ssim"), force=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, "1.0", True, None])
def test_a_value_that_is_no_finite_number_is_refused(value):
    with pytest.raises(DataError):
        number(value)
    if value is not None:
        with pytest.raises(DataError):
            number(1.0, std=value)


@pytest.mark.parametrize("value", [object(), math.nan, {1, 2}])
def test_a_protocol_holds_plain_values_only(value):
    with pytest.raises(DataError, match="plain JSON"):
        number(1.0, extra=value)


def test_a_protocol_is_a_copy():
    guidance = {"scale": 1.0}
    held = number(guidance=guidance)
    guidance["scale"] = 2.0
    assert held.protocol["guidance"] == {"scale": 1.0}


@given(st.lists(st.tuples(st.text(), st.floats(allow_nan=False, allow_infinity=False), protocols), max_size=4))
def test_files_give_back_what_was_written(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("numbers") / "sub" / "numbers.json"
    numbers = [Number(name=name, value=value, protocol=protocol, std=0.5) for name, value, protocol in entries]
    write_numbers(path, numbers)
    assert read_numbers(path) == numbers
    assert [p.name for p in path.parent.iterdir()] == ["numbers.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "numbers.json"
    write_numbers(path, [number(1.0)])
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_numbers(path, [number(2.0)])
    assert read_numbers(path) == [number(1.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["numbers.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not a file of numbers"),
        ('{"format": 99, "numbers": []}', "not a file of numbers"),
        ('{"format": 1, "numbers": [3]}', "entry 0"),
        ('{"format": 1, "numbers": [{"name": "psnr", "value": 1.0}]}', "entry 0"),
        (
            '{"format": 1, "numbers": [{"name": 1, "value": 1.0, "std": null, "protocol": {}, "protocol_id": ""}]}',
            "entry 0",
        ),
        (
            '{"format": 1, "numbers": [{"name": "a", "value": "1", "std": null, "protocol": {}, "protocol_id": ""}]}',
            "entry 0",
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, text, message):
    path = tmp_path / "numbers.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_numbers(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"numbers\.json"):
        read_numbers(tmp_path / "numbers.json")


def test_a_folder_is_no_file_of_numbers(tmp_path):
    with pytest.raises(DataError, match="is a folder; name a file of numbers that 'underpaint evaluate' saved"):
        read_numbers(tmp_path)


def test_a_protocol_changed_by_hand_is_noticed(tmp_path):
    path = tmp_path / "numbers.json"
    write_numbers(path, [number()])
    path.write_text(path.read_text().replace("1000", "50000"))
    with pytest.raises(DataError, match="changed by hand"):
        read_numbers(path)


def test_the_table_shows_value_images_and_id():
    lines = format_table([number(25.12341), number(0.5, name="ssim", std=0.25)]).splitlines()
    assert lines[0].split() == ["name", "value", "images", "protocol"]
    assert lines[2].split() == ["psnr", "25.1234", "1000", protocol_id(PROTOCOL)]
    assert lines[3].split() == ["ssim", "0.5000", "±", "0.2500", "1000", protocol_id(PROTOCOL)]
    assert len({line.rindex("  ") for line in lines[2:]}) == 1

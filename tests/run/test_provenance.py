"""The record of a run's sessions, where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from underpaint.errors import DataError
from underpaint.run.provenance import record_start, update


@pytest.mark.parametrize("text", ["{", "3", "[]", "{}", '{"sessions": 3}', b"\xff"])
def test_damage_is_one_sentence(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "provenance.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=r"provenance\.json' is damaged; delete it, .* run the same command again"):
        record_start(path, seed=0, command=["train"], data={}, ranks=1, device="cpu")
    with pytest.raises(DataError, match="is damaged"):
        update(path, seconds={})


def test_doing_what_the_sentence_says_mends_it(tmp_path: Path) -> None:
    path = tmp_path / "provenance.json"
    for _ in range(2):
        record_start(path, seed=0, command=["train"], data={}, ranks=1, device="cpu")
    update(path, seconds={"align": 1.0})
    found = json.loads(path.read_text())
    assert len(found["sessions"]) == 2
    assert "ended" in found["sessions"][-1]

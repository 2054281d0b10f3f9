"""The record of a run's sessions, where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from underpaint.errors import DataError
from underpaint.run import provenance
from underpaint.run.provenance import check_images, record_start, update


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


def data(count: int, digest: str) -> dict[str, object]:
    return {"train": {"name": "files/folder", "samples": count, "hash": digest}}


def test_each_session_keeps_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "provenance.json"
    for commit in ("first", "second", "second", "first"):
        monkeypatch.setattr(provenance, "git_state", lambda _, commit=commit: {"commit": commit, "dirty": False})
        record_start(path, seed=0, command=["train"], data=data(20, "a" * 32), ranks=1, device="cpu")
    found = json.loads(path.read_text())
    assert [e["git"]["commit"] for e in found["environments"]] == ["first", "second"]
    assert [session["environment"] for session in found["sessions"]] == [0, 1, 1, 0]


def test_a_run_does_not_go_on_with_other_images(tmp_path: Path) -> None:
    path = tmp_path / "provenance.json"
    check_images(path, data(20, "a" * 32))
    record_start(path, seed=0, command=["train"], data=data(20, "a" * 32), ranks=1, device="cpu")
    check_images(path, data(20, "a" * 32))
    with pytest.raises(DataError) as caught:
        check_images(path, data(21, "b" * 32))
    assert "was begun on 20 images of files/folder (hash aaaaaaaaaaaa), and data.train now has 21 images" in str(
        caught.value
    )
    assert "put the earlier files back, or choose another --out" in str(caught.value)

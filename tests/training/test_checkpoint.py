"""Checkpoints that are complete or absent, whatever happens to the files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import engine_cases as cases
import pytest
from processes import on_ranks, report_of

from underpaint.errors import DataError, UnderpaintError
from underpaint.training import checkpoint
from underpaint.training.checkpoint import CheckpointStore


def writer(content: bytes = b"0123456789" * 100):
    def write(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(content)
        (folder / "sub").mkdir()
        (folder / "sub" / "more.bin").write_bytes(content[:7])

    return write


def full_disk(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"some")
    raise OSError(28, "No space left on device")


@pytest.fixture
def store(alone, tmp_path):
    return CheckpointStore(tmp_path / "ckpt", 2, alone, config_hash="abc", plugins={"tiny": "1.2"})


def folders(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store._folder.iterdir())


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "underpaint"]


def test_what_was_saved_is_the_latest(store):
    assert store.latest() is None
    made = store.save(7, writer(), {"position": 112, "name": "ä"})
    assert made == store.latest(verify=True)
    assert (made.step, made.folder.name, made.world_size) == (7, "step-0000007", 1)
    assert (made.config_hash, made.plugins, made.extra) == ("abc", {"tiny": "1.2"}, {"position": 112, "name": "ä"})
    assert (made.folder / "sub" / "more.bin").read_bytes() == b"0123456"
    assert sorted(path.name for path in made.folder.iterdir()) == ["manifest.json", "sub", "weights.bin"]


def test_the_manifest_holds_sizes_and_hashes(store):
    made = store.save(1, writer(b"abc"), {})
    files = json.loads((made.folder / "manifest.json").read_text())["body"]["files"]
    # SHA-256 of "abc", from the example in FIPS 180-2.
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files == {"weights.bin": {"size": 3, "sha256": digest}, "sub/more.bin": {"size": 3, "sha256": digest}}


def test_only_the_newest_are_kept(store):
    for step in (1, 2, 10, 3000000, 20000000):
        store.save(step, writer(), {})
    assert folders(store) == ["step-20000000", "step-3000000"]
    assert store.latest().step == 20000000


def test_a_step_is_not_saved_twice(store):
    store.save(3, writer(), {"n": 1})
    again = store.save(3, full_disk, {"n": 2})
    assert again.extra == {"n": 1}
    assert folders(store) == ["step-0000003"]


def half(folder):
    path = folder / "weights.bin"
    path.write_bytes(path.read_bytes()[:500])


def empty(folder):
    (folder / "weights.bin").write_bytes(b"")


def missing(folder):
    (folder / "weights.bin").unlink()


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def empty_manifest(folder):
    (folder / "manifest.json").write_text("")


def list_manifest(folder):
    (folder / "manifest.json").write_text("[1]")


def changed_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"position": 2', '"position": 9'))


def newer_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (half, "'weights.bin' has 500 bytes instead of 1000"),
        (empty, "'weights.bin' has 0 bytes instead of 1000"),
        (missing, "'weights.bin' is missing"),
        (no_manifest, "it has no manifest"),
        (empty_manifest, "its manifest is malformed"),
        (list_manifest, "its manifest is malformed"),
        (changed_manifest, "its manifest is damaged"),
    ],
)
def test_a_damaged_one_is_skipped_with_its_reason_once(store, caplog, damage, reason):
    store.save(1, writer(), {"position": 1})
    damage(store.save(2, writer(), {"position": 2}).folder)
    with caplog.at_level(logging.WARNING, logger="underpaint"):
        assert store.latest().step == 1
        assert store.latest().step == 1
    (message,) = messages(caplog)
    assert "step-0000002' is skipped" in message
    assert reason in message
    assert not any(record.exc_info for record in caplog.records)


def test_another_format_is_refused_and_kept(store):
    # To skip it would be to start anew, and to lose what the other version has trained.
    made = store.save(1, writer(), {})
    newer_manifest(made.folder)
    with pytest.raises(DataError, match=r"step-0000001' was written by another version.*format 2, and this version"):
        store.latest()
    for step in (2, 3, 4):
        store.save(step, writer(), {})
    assert store.latest().step == 4
    assert folders(store) == ["step-0000001", "step-0000003", "step-0000004"]


def test_a_flipped_byte_is_found_on_demand(store, caplog):
    store.save(1, writer(), {})
    path = store.save(2, writer(), {}).folder / "weights.bin"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    assert store.latest().step == 2
    assert store.latest(verify=True).step == 1
    assert "the content of 'weights.bin' does not match its hash" in messages(caplog)[0]


def test_one_of_damaged_content_is_replaced_and_pushes_no_other_out(store, caplog):
    for step in (1, 2):
        store.save(step, writer(), {"n": 1})
    path = store._folder / "step-0000002" / "weights.bin"
    path.write_bytes(path.read_bytes()[::-1])
    assert store.latest(verify=True).step == 1
    # Of the two that are kept, none is the damaged one.
    store.save(3, writer(), {})
    assert folders(store) == ["step-0000001", "step-0000002", "step-0000003"]
    assert store.save(2, writer(), {"n": 2}).extra == {"n": 2}
    assert folders(store) == ["step-0000002", "step-0000003"]
    assert [checkpoint.step for checkpoint in store._valid(verify=True)] == [3, 2]
    assert len(messages(caplog)) == 1


def test_other_files_do_not_matter(store):
    store.save(1, writer(), {})
    (store._folder / "latest").write_text("")
    (store._folder / "step-9").mkdir()
    (store._folder / "notes.txt").write_text("x")
    assert store.latest().step == 1
    store.save(2, writer(), {})
    assert folders(store) == ["latest", "notes.txt", "step-0000001", "step-0000002", "step-9"]


def test_damaged_ones_do_not_push_out_the_last_valid(store):
    store.save(1, writer(), {})
    for step in (2, 3, 4):
        folder = store._folder / f"step-{step:07d}"
        folder.mkdir()
        (folder / "weights.bin").write_bytes(b"x")
    assert store.latest().step == 1
    store.save(5, writer(), {})
    store.save(6, writer(), {})
    assert folders(store) == [f"step-{step:07d}" for step in (2, 3, 4, 5, 6)]


def test_a_damaged_one_of_the_same_step_is_replaced(store):
    half(store.save(2, writer(), {"n": 1}).folder)
    assert store.save(2, writer(), {"n": 2}).extra == {"n": 2}
    assert folders(store) == ["step-0000002"]


def test_crashed_saves_leave_the_last_valid_and_are_cleaned_up(store):
    store.save(1, writer(), {})

    class Crash(BaseException):
        """What no code catches, as a kill."""

    def crash(folder: Path) -> None:
        writer()(folder)
        raise Crash

    for step in (2, 3, 4):
        with pytest.raises(Crash):
            store.save(step, crash, {})
        assert store.latest(verify=True).step == 1
    assert len(folders(store)) == 2
    store.save(5, writer(), {})
    assert folders(store) == ["step-0000001", "step-0000005"]


def test_a_full_disk_fails_the_save_and_not_the_training(store, caplog):
    store.save(1, writer(), {})
    for step in (2, 3):
        assert store.save(step, full_disk, {}) is None
        assert folders(store) == ["step-0000001"]
    assert store.save(4, writer(), {}).step == 4
    errors = messages(caplog)
    assert len(errors) == 2
    assert (
        "step-0000002' could not be saved (rank 0: [Errno 28] No space left on device); training goes on" in errors[0]
    )
    assert all(record.levelno == logging.ERROR and not record.exc_info for record in caplog.records)
    for step in (5, 6):
        assert store.save(step, full_disk, {}) is None
    with pytest.raises(
        UnderpaintError, match=r"3 checkpoints in a row could not be saved.*older checkpoints are intact"
    ):
        store.save(7, full_disk, {})
    assert store.latest(verify=True).step == 4
    assert folders(store) == ["step-0000001", "step-0000004"]


@pytest.mark.parametrize("function", ["_sync", "file_hash"])
def test_a_disk_that_fails_later_fails_the_save_too(store, monkeypatch, function):
    store.save(1, writer(), {})

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, function, fail)
        assert store.save(2, writer(), {}) is None
    assert folders(store) == ["step-0000001"]
    assert store.latest(verify=True).step == 1


def test_the_manifest_is_the_last_thing_written(store, monkeypatch):
    order = []
    real = checkpoint._sync
    monkeypatch.setattr(checkpoint, "_sync", lambda path: (order.append(path.name.split(".tmp-")[0]), real(path)))
    made = store.save(1, writer(), {})
    # Every file, then its folder; at the end the checkpoint's folder with the manifest, and what holds it.
    assert order[-2:] == ["step-0000001", "ckpt"]
    assert {"weights.bin", "more.bin"} < set(order)
    newest = max(made.folder.rglob("*.*"), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "manifest.json"


def test_a_mistake_in_the_code_is_not_a_full_disk(store):
    def mistaken(folder: Path) -> None:
        raise KeyError("a mistake")

    with pytest.raises(KeyError, match="a mistake"):
        store.save(1, mistaken, {})


def test_an_unwritable_place_is_one_error(alone, tmp_path, caplog):
    (tmp_path / "ckpt").write_text("a file is in the way")
    store = CheckpointStore(tmp_path / "ckpt", 2, alone)
    assert store.save(1, writer(), {}) is None
    assert len(messages(caplog)) == 1


@pytest.mark.slow
def test_a_failure_on_one_rank_is_a_failure_on_all(tmp_path):
    main, other = on_ranks(tmp_path / "out", 2, cases.failing_saves, str(tmp_path / "ckpt"))
    outcomes, raised, step, world_size, names = main
    assert outcomes == [(1, {"position": 8}), None, None, (4, {"position": 32})]
    assert other[0] == outcomes
    assert raised == "UnderpaintError: The checkpoint of step 5 failed (rank 1: 'a mistake')."
    assert other[1] == "KeyError: 'a mistake'"
    assert (step, world_size) == (4, 2) == other[2:4]
    assert names == ["engine-00000-of-00002.safetensors", "engine-00001-of-00002.safetensors", "manifest.json"]


@pytest.mark.slow
def test_two_ranks_may_not_write_one_file(tmp_path):
    first, second = on_ranks(tmp_path / "out", 2, cases.same_name, str(tmp_path / "ckpt"))
    assert (first[0], second) == (None, (None, []))
    assert "could not be saved (2 ranks have a file 'weights.bin')" in first[1][0]
    assert list((tmp_path / "ckpt").iterdir()) == []


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes(tmp_path):
    report = report_of("kill_trials.py", str(tmp_path), "20")
    assert len(report["trials"]) == 20
    for reported, resumed in report["trials"]:
        # What save() reported is there; of a save that was cut off after the rename nobody heard.
        assert reported <= resumed <= reported + 1
    assert report["steps"] > 20
    assert report["difference"] == 0.0
    assert report["interrupted"] > 0

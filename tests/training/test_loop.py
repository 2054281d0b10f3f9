"""What the loop logs, and where it ends."""

from __future__ import annotations

import io
import itertools
import resource
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from underpaint.config.engine import EngineConfig
from underpaint.training.checkpoint import CheckpointStore
from underpaint.training.engine import NotFiniteError, StepResult
from underpaint.training.log import StageLog, format_line, read_rows
from underpaint.training.loop import LoopResult, StageStep, Stopped, train_loop
from underpaint.training.ranks import Ranks
from underpaint.training.signals import StopRequest
from underpaint.training.watchdog import Watchdog

# Of each micro-batch: a mean, and a sum with its count.
TERMS = [
    (1.0, [6.0, 2.0]),
    (3.0, [0.0, 0.0]),
    (5.0, [9.0, 1.0]),
    (7.0, [0.0, 0.0]),
    (9.0, [0.0, 0.0]),
    (2.0, [4.0, 4.0]),
]


def run(
    alone: Ranks,
    folder: Path,
    *,
    end: int | None = None,
    steps: int = 6,
    step_fn: StageStep | None = None,
    peak: float | None = 1.0,
    save: Callable[[Path], None] = lambda place: (place / "file").write_text("x") and None,
    checkpoint_every: int = 100,
    **config: Any,
) -> tuple[LoopResult, list[dict[str, Any]]]:
    rows = []
    terms = iter(TERMS)

    def logged(batch: Any, step: int, micro: int) -> tuple[dict[str, Tensor], StepResult]:
        scalar, pair = next(terms)
        return {"loss": torch.tensor(scalar), "binned": torch.tensor(pair)}, StepResult(1.0, {"a": 0.1}, False, True)

    def call(hook: str, **facts: Any) -> None:
        if hook == "on_step_end":
            rows.append({"step": facts["step"], **facts["scalars"]})

    with StopRequest() as stop, Watchdog(alone, "one", 60.0) as watchdog:
        result = train_loop(
            name="one",
            batches=itertools.repeat(None),
            step_fn=step_fn or logged,
            start=0,
            steps=steps,
            images_per_step=1,
            flops_per_image=1.0,
            peak=peak,
            config=EngineConfig(checkpoint_every=checkpoint_every, **config),
            save=save,
            store=CheckpointStore(folder, 2, alone, config_hash="c", plugins={}),
            log=None,
            ranks=alone,
            stop=stop,
            watchdog=watchdog,
            enough=lambda step: step == end,
            call=call,
        )
    return result, rows


def test_sums_are_divided_by_their_counts_and_left_out_without_any(alone: Ranks, tmp_path: Path) -> None:
    _, rows = run(alone, tmp_path, log_every=2)
    assert [(row["step"], row["loss"], row.get("binned")) for row in rows] == [
        (2, 2.0, 3.0),
        (4, 6.0, 9.0),
        (6, 5.5, 1.0),
    ]
    _, rows = run(alone, tmp_path / "each", log_every=1)
    assert [row.get("binned") for row in rows] == [3.0, None, 9.0, None, None, 1.0]


def test_micro_batches_of_a_step_are_averaged(alone: Ranks, tmp_path: Path) -> None:
    _, rows = run(alone, tmp_path, log_every=1, accumulation=3, steps=2)
    assert [(row["loss"], row["binned"]) for row in rows] == [(pytest.approx(3.0), 5.0), (pytest.approx(6.0), 1.0)]


def test_a_stage_that_may_end_is_logged_and_saved_there(alone: Ranks, tmp_path: Path) -> None:
    result, rows = run(alone, tmp_path, end=3, log_every=2)
    assert result.steps == 3
    assert [(row["step"], row["loss"]) for row in rows] == [(2, 2.0), (3, 5.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000003"]


def test_a_share_of_the_peak_is_logged_where_that_is_known(alone: Ranks, tmp_path: Path) -> None:
    _, rows = run(alone, tmp_path / "known", log_every=1, peak=2.0)
    assert all(row["mfu"] == pytest.approx(row["images_per_second"] / 2.0) for row in rows)
    _, rows = run(alone, tmp_path / "unknown", log_every=1, peak=None)
    assert not any("mfu" in row for row in rows)
    assert "MFU" not in format_line(1, 6, rows[0])


@pytest.mark.parametrize("ends", [False, True])
def test_the_samples_of_a_skipped_step_are_kept(alone: Ranks, tmp_path: Path, ends: bool) -> None:
    names = iter("abcdefgh")
    batches = (SimpleNamespace(keys=(name, name.upper())) for name in names)

    def step_fn(batch: Any, step: int, micro: int) -> tuple[dict[str, Tensor], StepResult]:
        if ends and step == 2 and micro == 1:
            raise NotFiniteError("too many")
        return {"loss": torch.tensor(1.0)}, StepResult(1.0, {"a": 0.1}, micro == 1 and step == 1, True)

    (tmp_path / "skipped.jsonl").write_text('{"step": 7, "samples": ["of a session that was lost"]}\n')
    log = StageLog(tmp_path, "one", steps=4, start=0)
    with (
        StopRequest() as stop,
        Watchdog(alone, "one", 60.0) as watchdog,
        pytest.raises(NotFiniteError) if ends else nullcontext(),
    ):
        train_loop(
            name="one",
            batches=batches,
            step_fn=step_fn,
            start=0,
            steps=4,
            images_per_step=1,
            flops_per_image=1.0,
            peak=1.0,
            config=EngineConfig(checkpoint_every=100, accumulation=2),
            save=lambda place: (place / "file").write_text("x") and None,
            store=CheckpointStore(tmp_path / "ckpt", 2, alone),
            log=log,
            ranks=alone,
            stop=stop,
            watchdog=watchdog,
            enough=lambda step: False,
            call=lambda hook, **facts: None,
        )
    log.close()
    expected = [{"step": 2, "samples": ["c", "C", "d", "D"]}]
    expected += [{"step": 3, "samples": ["e", "E", "f", "F"]}] if ends else []
    assert read_rows(tmp_path / "skipped.jsonl") == expected


def test_a_full_disk_delays_the_log_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    # What a batch job prints lies on that disk too.
    monkeypatch.setattr("sys.stderr", Full())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = StageLog(tmp_path, "one", steps=9, start=0)
    log.row(1, {"loss": 1.0})
    # The system takes a part of the next line and then nothing, as on a disk that fills.
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 7, before[1]))
    try:
        for step in (2, 3):
            log.row(step, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "metrics.jsonl").stat().st_size == size + 7
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]
    log.row(4, {"loss": 1.0})
    log.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    (message,) = [record.getMessage() for record in caplog.records if record.name == "underpaint"]
    assert "metrics.jsonl' cannot be written ([Errno 27] File too large); training goes on" in message


def test_what_is_said_to_be_saved_is(alone: Ranks, tmp_path: Path) -> None:
    def save(place: Path) -> None:
        if place.parent.name.startswith("step-0000005"):
            raise OSError(28, "No space left on device")
        (place / "file").write_text("x")

    def step_fn(batch: Any, step: int, micro: int) -> tuple[dict[str, Tensor], StepResult]:
        if step == 4:
            signal.raise_signal(signal.SIGUSR1)
        return {"loss": torch.tensor(1.0)}, StepResult(1.0, {"a": 0.1}, False, True)

    with pytest.raises(Stopped) as caught:
        run(alone, tmp_path, step_fn=step_fn, save=save, checkpoint_every=2)
    assert (caught.value.signal, caught.value.step) == ("SIGUSR1", 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000002", "step-0000004"]


def test_a_signal_in_the_last_step_ends_the_run(alone: Ranks, tmp_path: Path) -> None:
    def step_fn(batch: Any, step: int, micro: int) -> tuple[dict[str, Tensor], StepResult]:
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        return {"loss": torch.tensor(1.0)}, StepResult(1.0, {"a": 0.1}, False, True)

    with pytest.raises(Stopped) as caught:
        run(alone, tmp_path, step_fn=step_fn)
    assert (caught.value.signal, caught.value.step) == ("SIGTERM", 6)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000006"]


def test_a_signal_while_the_last_step_is_saved_ends_the_run(alone: Ranks, tmp_path: Path) -> None:
    def save(place: Path) -> None:
        signal.raise_signal(signal.SIGUSR1)
        (place / "file").write_text("x")

    with pytest.raises(Stopped) as caught:
        run(alone, tmp_path, save=save)
    assert (caught.value.signal, caught.value.step) == ("SIGUSR1", 6)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000006"]

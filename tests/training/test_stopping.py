"""When a stage may end before its last step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from underpaint.config.component import ComponentConfig
from underpaint.config.stages import StopConfig
from underpaint.training import stopping
from underpaint.training.ranks import Ranks
from underpaint.training.stopping import StopRule


@pytest.fixture(scope="module")
def world() -> Iterator[Ranks]:
    with Ranks("cpu") as ranks:
        yield ranks


def make_rule(
    world: Ranks, path: Path, values: Iterable[tuple[float, ...]], *, higher: bool | None = True, **settings: float
) -> StopRule:
    """A rule that measures `values` one after another, every 2 steps."""
    config = StopConfig(metrics=(ComponentConfig(name="m"),), every=2, **{"patience": 4, "tolerance": 0.0} | settings)
    stream = iter(values)
    return StopRule(config, path, lambda: {f"m{i}": (value, higher) for i, value in enumerate(next(stream))}, world)


def end(rule: StopRule, first: int = 1, last: int = 40) -> int | None:
    """The step after which the stage may end."""
    return next((step for step in range(first, last + 1) if rule(step)), None)


def single(*values: float) -> list[tuple[float, ...]]:
    return [(value,) for value in values]


def test_it_measures_at_its_interval_alone(world: Ranks, tmp_path: Path) -> None:
    rule = make_rule(world, tmp_path / "s", single(1.0))
    assert [rule(step) for step in (1, 2, 3)] == [False, False, False]
    assert (tmp_path / "s").read_text().count("\n") == 1
    with pytest.raises(StopIteration):
        rule(4)


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        # Best at step 2; at 4 that is 2 steps ago, at 6 it is 4, the patience.
        ((5, 5, 5, 5), {}, 6),
        ((5, 4, 3, 9), {}, 6),
        # The last improvement is that of step 8.
        ((5, 5, 6, 7, 7, 7, 7), {}, 12),
        ((5, 5, 6, 7, 7, 7, 7), {"patience": 2}, 4),
        # Six steps without an improvement fall between two measurements.
        ((5, 5, 5, 5, 5), {"patience": 5}, 8),
        # A tenth of 10, of 11.5, of 13: 11 is not more than a tenth better than 10, 11.5 is.
        ((10, 11, 11.5, 12.6, 12.6), {"tolerance": 0.1}, 10),
        ((1, 2, 3, 4, 5, 6), {}, None),
        # Of a negative best, a tenth is above it too.
        ((-10, -9.5, -9, -8.9, -8.9), {"tolerance": 0.1}, 6),
        # Numbers that are none improve nothing, and anything improves on them.
        ((math.nan, 1, 1, 1), {}, 8),
        ((1, math.nan, math.nan), {}, 6),
        ((-math.inf, 1, 1, 1), {"tolerance": 0.1}, 8),
        ((math.inf, math.inf, math.inf), {"tolerance": 0.1}, 6),
    ],
)
def test_where_it_ends(
    world: Ranks, tmp_path: Path, values: tuple[float, ...], settings: dict[str, float], expected: int | None
) -> None:
    rule = make_rule(world, tmp_path / "s", single(*values), **settings)
    assert end(rule, last=2 * len(values)) == expected
    # The same numbers with the sign and the direction turned round.
    mirrored = make_rule(world, tmp_path / "t", single(*(-v for v in values)), higher=False, **settings)
    assert end(mirrored, last=2 * len(values)) == expected


def test_lower_is_better(world: Ranks, tmp_path: Path) -> None:
    assert end(make_rule(world, tmp_path / "s", single(9, 8, 7, 7, 7), higher=False), last=10) == 10
    assert end(make_rule(world, tmp_path / "t", single(7, 8, 9), higher=False), last=6) == 6


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # Half of what the encoder knew is lost at step 6, and a hundredth at 8, which is within the tolerance.
        ((40, 40, 20, 19.8, 20, 20), 10),
        ((40, 44, 46, 46, 46, 46), 10),
        # Ever further from the first, though each step is small.
        ((100, 99.5, 98.9, 98.4, 97.8, 97.3), None),
    ],
)
def test_a_value_without_a_direction_has_to_stand_still(
    world: Ranks, tmp_path: Path, values: tuple[float, ...], expected: int | None
) -> None:
    rule = make_rule(world, tmp_path / "s", single(*values), higher=None, tolerance=0.01)
    assert end(rule, last=2 * len(values)) == expected


def test_one_metric_that_improves_is_enough_to_go_on(world: Ranks, tmp_path: Path) -> None:
    rule = make_rule(world, tmp_path / "s", [(1, 1), (1, 2), (1, 3), (1, 3), (1, 3)])
    assert end(rule, last=10) == 10


VALUES = (5.0, 6.0, 6.1, 6.0, 6.0, 6.0)


@pytest.mark.parametrize("checkpoint", range(1, 10))
def test_a_resumed_stage_decides_as_an_uninterrupted_one(world: Ranks, tmp_path: Path, checkpoint: int) -> None:
    straight = make_rule(world, tmp_path / "straight", single(*VALUES))
    assert end(straight) == 10
    # Killed after step 9, to go on from a checkpoint: what was measured after it is measured again.
    killed = make_rule(world, tmp_path / "run", single(*VALUES))
    assert end(killed, last=9) is None
    resumed = make_rule(world, tmp_path / "run", single(*VALUES[checkpoint // 2 :]))
    resumed.rewind(checkpoint)
    assert not resumed.met
    assert end(resumed, first=checkpoint + 1) == 10
    assert (tmp_path / "run").read_text() == (tmp_path / "straight").read_text()


def test_a_rule_that_was_met_still_is(world: Ranks, tmp_path: Path) -> None:
    assert end(make_rule(world, tmp_path / "run", single(*VALUES))) == 10
    resumed = make_rule(world, tmp_path / "run", [])
    resumed.rewind(10)
    assert resumed.met
    resumed.rewind(9)
    assert not resumed.met


def test_nothing_measured_is_no_reason_to_end(world: Ranks, tmp_path: Path) -> None:
    assert not make_rule(world, tmp_path / "s", []).met


def test_a_full_disk_delays_the_file_and_ends_nothing(
    world: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    rule = make_rule(world, tmp_path / "s", single(5.0, 6.0, 6.0, 6.0))
    with monkeypatch.context() as patch:
        patch.setattr(stopping, "write_atomically", full)
        assert not rule(2)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "underpaint"]
    assert message.endswith(
        "cannot be written ([Errno 28] No space left on device); training goes on, and its lines wait."
    )
    assert not (tmp_path / "s").exists()
    assert end(rule, first=3) == 8
    assert (tmp_path / "s").read_text().count("\n") == 4

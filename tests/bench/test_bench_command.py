"""``underpaint bench`` as it is typed: real trainings, a plugin that ends its process, a signal; and mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bench.conftest import Bench, write_matrix
from tests.cli.test_main import call
from underpaint.training.log import read_rows

PLUGIN = """
from underpaint import hookimpl


@hookimpl
def register_adapters(register):
    register("faulty/mlp", "faulty_parts:Faulty", config="underpaint_aligntok.config:MlpConfig", summary="Ends it all")
"""
PARTS = """
import os
from pathlib import Path

from underpaint_aligntok.adapter import Mlp


class Faulty(Mlp):
    def __init__(self, *arguments, **context):
        if Path("faulty").exists():
            os._exit(7)
        super().__init__(*arguments, **context)
"""
CELLS = [
    {"name": "good"},
    {"name": "faulty", "overrides": ["plugins=[faulty.py]", "tokenizer.adapter.name=faulty/mlp"]},
    {"name": "long", "overrides": ["stages.0.steps=30"]},
]
SHORT = ["stages=[{name: align, trains: [adapter, decoder], losses: [l1], steps: 2, batch: 4, ema: 0.5}]"]


def states(out: Path) -> dict[str, str]:
    found = {path.parent.name[:-11]: json.loads(path.read_text()) for path in out.glob("cells/*/cell.json")}
    return {name: record["state"] for name, record in found.items()}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_real_matrix_survives_a_crash_and_a_signal(tmp_path: Path) -> None:
    path = write_matrix(tmp_path, CELLS, overrides=SHORT)
    (tmp_path / "faulty.py").write_text(PLUGIN)
    (tmp_path / "faulty_parts.py").write_text(PARTS)
    (tmp_path / "faulty").touch()
    command = [sys.executable, "-m", "underpaint", "bench", "run", str(path), "--out", "out", "--json"]
    options = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE}
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    while first.poll() is None:
        rows = [
            row for log in (tmp_path / "out").glob("cells/long-*/stages/align/metrics.jsonl") for row in read_rows(log)
        ]
        if len(rows) >= 3:
            first.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    _, error = first.communicate(timeout=300)
    assert first.returncode == 128 + signal.SIGTERM, error
    assert states(tmp_path / "out") == {"good": "finished", "faulty": "failed", "long": "interrupted"}
    assert "exit code 7" in error

    (tmp_path / "faulty").unlink()
    second = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=500, **options)  # type: ignore[call-overload]
    assert second.returncode == 0, second.stderr
    assert "[1/3] good: finished before" in second.stderr
    cells = {cell["name"]: cell for cell in json.loads(second.stdout)["cells"]}
    assert {name: (cell["state"], cell["attempts"]) for name, cell in cells.items()} == {
        "good": ("finished", 1), "faulty": ("finished", 2), "long": ("finished", 2),
    }  # fmt: skip
    (log,) = (tmp_path / "out").glob("cells/long-*/stages/align/metrics.jsonl")
    assert [row["step"] for row in read_rows(log)] == list(range(1, 31))
    assert len(cells["long"]["provenance"]["sessions"]) == 2
    again = (log.parents[2] / "cell.log").read_text().split("\n== ")[1]
    assert "align 1/30" not in again

    names = {number["name"]: number for number in cells["good"]["numbers"]}
    # Two linear layers of the MLP adapter, 32 to 32 to 4.
    assert names["adapter, M parameters"]["value"] * 1e6 == pytest.approx((32 * 32 + 32) + (32 * 4 + 4))
    for what in ("encode img/s", "decode img/s"):
        assert names[what]["value"] > 0
        assert names[what]["protocol"]["batch"] == 32
        assert names[what]["protocol"]["image_size"] == [32, 32]
    assert {"psnr", "ssim"} <= names.keys()
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


MAIN = """
import sys
sys.argv = ["underpaint", *{arguments!r}]
from underpaint.cli.main import run
try:
    run()
except SystemExit as stop:
    assert stop.code == {code}, stop.code
heavy = {{"torch", "timm", "deepspeed", "numpy", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""


def light(*arguments: str, code: int) -> subprocess.CompletedProcess[str]:
    """Call the command, which must not import what is slow to import."""
    text = MAIN.format(arguments=arguments, code=code)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_a_wrong_cell_ends_with_2_before_anything_runs(tmp_path: Path) -> None:
    path = write_matrix(tmp_path, [{"name": "a"}, {"name": "b", "overrides": ["tokenizer.decoder.bass=8"]}])
    done = light("bench", "run", str(path), "--out", str(tmp_path / "out"), code=2)
    assert done.stderr == (
        "Error: Cell 'b' of matrix 'trio': tokenizer.decoder has no key 'bass'. Did you mean 'base'?\n"
    )
    assert not (tmp_path / "out").exists()


def test_list_says_what_would_be_run(tmp_path: Path) -> None:
    path = write_matrix(tmp_path)
    done = light("bench", "run", str(path), "--list", "--json", "--only", "s*", "seed=3", code=0)
    (row,) = json.loads(done.stdout)
    assert (row["name"], row["state"]) == ("second", "not run")
    assert row["overrides"] == ["stages.align.steps=5", "seed=3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "absent.yaml"], "There is no matrix file 'absent.yaml'"),
        (["run", "MATRIX", "--only", "sekond"], "Did you mean 'second'?"),
        (["run", "MATRIX", "--launcher", "torchrum -m"], "there is no such program"),
        (["run", "MATRIX", "data.sise=3"], "Cell 'one' of matrix 'trio': data has no key 'sise'"),
        (["run", "MATRIX", "--out", "matrix.yaml"], "'matrix.yaml' is a file, and a matrix becomes a folder"),
        (["report", "MATRIX"], "No cell of matrix 'trio' was run"),
    ],
)
def test_mistakes_end_with_2(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_matrix(tmp_path)
    assert call(monkeypatch, "bench", *(str(path) if a == "MATRIX" else a for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_exit_codes_and_json(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_matrix(bench.folder)
    monkeypatch.chdir(bench.folder)
    bench.run(path, second="exit")
    assert call(monkeypatch, "bench", "report", str(path), "--out", "out", "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert [cell["state"] for cell in plain["cells"]] == ["finished", "failed", "finished"]
    fake = f"{sys.executable} {Path(__file__).with_name('fake.py')}"
    assert call(monkeypatch, "bench", "run", str(path), "--out", "out", "--launcher", fake) == 1
    assert "Report: out/report.html" in capsys.readouterr().out
    (bench.out / "behaviour.json").write_text("{}")
    assert call(monkeypatch, "bench", "run", str(path), "--out", "out", "--launcher", fake) == 0


@pytest.mark.parametrize("action", ["run", "report"])
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("report.html", "mine", "report.html' exists and belongs to no report of a matrix"),
        ("report.md", "mine", "report.md' exists and belongs to no report of a matrix"),
        ("results.json", '{"mine": 1}', "results.json' exists and holds no results of a matrix"),
        ("results.json", '{"matrix": {"name": "duo"}}', "holds the results of matrix 'duo', not of 'trio'"),
    ],
)
def test_only_a_report_of_the_matrix_is_replaced(
    action: str,
    name: str,
    text: str,
    message: str,
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_matrix(bench.folder)
    bench.run(path)
    bench.calls()
    (bench.out / name).write_text(text)
    assert call(monkeypatch, "bench", action, str(path), "--out", str(bench.out)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "choose another --out" in error
    assert bench.calls() == []
    assert (bench.out / name).read_text() == text


def test_figures_are_those_of_a_report(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_matrix(bench.folder)
    bench.run(path)
    (bench.out / "figures").mkdir()
    assert call(monkeypatch, "bench", "report", str(path), "--out", str(bench.out)) == 2
    assert "figures' exists and belongs to no report" in capsys.readouterr().err
    (bench.out / "figures").rmdir()
    for _ in range(2):
        assert call(monkeypatch, "bench", "report", str(path), "--out", str(bench.out)) == 0

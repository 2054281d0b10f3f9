"""The command line: help, exit codes, and one clear sentence for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from underpaint.cli import main as cli

HELP = """\
Usage: underpaint [OPTIONS] COMMAND [ARGS]...

  Turn pretrained vision encoders into image tokenizers, and train latent
  diffusion on them.

  Start with: underpaint quickstart

Options:
  --version                 Show the version and exit.
  -p, --plugin FILE|MODULE  Load a plugin from a .py file or module.
  --no-plugin NAME          Leave a plugin out; NAME@DISTRIBUTION if
                            ambiguous.
  --only-plugins NAMES      Load only these plugins, separated by commas; ''
                            for none.
  --strict-plugins          Make every plugin failure fatal.
  -h, --help                Show this message and exit.

Commands:
  quickstart   Run the main job end to end: on rendered scenes, or your
               images.
  train        Run a recipe, or a part of it. Resumes by itself.
  encode       Encode a data set into a latent cache.
  reconstruct  Encode and decode images, and measure the difference.
  sample       Draw images from a generator.
  evaluate     Measure a tokenizer or a generator.
  report       Write the HTML report of a run folder again.
  bench        Run a matrix of recipes, and compare them in one report.
  import       Read published weights of other projects.
  recipes      List and show the recipes that plugins ship.
  plugins      List, show, check and create plugins.
  doctor       Say what works on this machine.
"""


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["underpaint", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.run()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_is_the_snapshot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert call(monkeypatch, "--help") == 0
    assert capsys.readouterr().out == HELP


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plugins", "list"], ["recipes", "list"], ["recipes", "show", "recipe:quickstart"]]
)
def test_listing_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['underpaint', *{arguments!r}]\n"
        "from underpaint.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "heavy = {'torch', 'timm', 'open_clip', 'deepspeed', 'numpy', 'torchmetrics'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    python(code)


def test_every_command_has_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, (_, line) in cli._COMMANDS.items():
        assert call(monkeypatch, name, "--help") == 0
        assert "Usage:" in capsys.readouterr().out
        assert line.endswith(".")


RECIPE = """
name: bad
data: {train: {name: files/folder, path: PATH}, size: 32, workers: 0}
tokenizer: {encoder: tiny/vit@random, adapter: aligntok/mlp, decoder: {name: ldm/decoder, base: 8}, latent_channels: 4}
stages: [{name: align, trains: [adapter, decoder], losses: [l1], steps: 1, batch: 2}]
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.align.stepz=3", "stages[0] has no key 'stepz'. Did you mean 'steps'"),
        ("stages.align.steps=many", "stages[0].steps must be a whole number"),
        ("tokenizer.encoder=timmm/vit_base", "There is no encoder 'timmm/vit_base'"),
        ("tokenizer.decoder.bass=8", "tokenizer.decoder has no key 'bass'. Did you mean 'base'?"),
    ],
)
def test_config_mistakes_end_before_torch_is_imported(tmp_path: Path, override: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    code = (
        "import sys\n"
        f"sys.argv = ['underpaint', 'train', {str(recipe)!r}, {override!r}]\n"
        "from underpaint.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit as stop:\n    assert stop.code == 2, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "absent.yaml"], "There is no recipe file 'absent.yaml'"),
        (["train", "recipe:quikstart"], "Did you mean 'quickstart'?"),
        (["train", "quickstart"], "Did you mean 'recipe:quickstart'?"),
        (["train", "recipe:quickstart", "--until", "nope"], "its steps are align, perceive, refine"),
        (["train", "."], "'.' is a folder; name a YAML file, such as 'config.yaml'"),
        (["quickstart", "--data", "absent"], "There is no data at 'absent'"),
        (["sample", "absent", "--out", "x"], "'absent' does not exist"),
        (["sample", "absent", "--out", "file"], "--out is 'file', a file; samples become two files, so name a folder"),
        (["import", "ldm", "absent.pt", "x"], "There is no weights file 'absent.pt'; check the path."),
        (["report", "absent"], "There is no run folder 'absent'"),
        (["recipes", "show", "recipe:none"], "There is no recipe 'none'"),
    ],
)
def test_mistakes_end_with_exit_code_2_and_no_traceback(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def bad_data(folder: Path, kind: str) -> Path:
    folder.mkdir()
    if kind == "empty folder":
        return folder
    if kind == "text files":
        (folder / "notes.txt").write_text("not an image")
        return folder
    if kind == "truncated tar":
        whole = folder / "whole"
        whole.mkdir()
        for i in range(4):
            Image.new("RGB", (64, 64), (i, 0, 0)).save(whole / f"{i}.png")
        path = folder / "data.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(4):
                tar.add(whole / f"{i}.png", arcname=f"{i}.png")
        path.write_bytes(path.read_bytes()[:1200])
        return path
    if kind == "truncated parquet":
        path = folder / "data.parquet"
        path.write_bytes(b"PAR1" + b"\0" * 100)
        return path
    assert kind == "1×1 images"
    for i in range(4):
        Image.new("RGB", (1, 1)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("kind", ["empty folder", "text files", "truncated tar", "truncated parquet", "1×1 images"])
def test_bad_data_is_one_sentence(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = bad_data(tmp_path / "data", kind)
    assert call(monkeypatch, "quickstart", "--data", str(path), "--out", str(tmp_path / "run"), "data.workers=0") == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("Error: ")


def test_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(**_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    assert call(monkeypatch) == 130
    assert "intact" in capsys.readouterr().err


def test_full_disk_ends_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(**_: object) -> int:
        raise OSError(28, "No space left on device", "/somewhere/file")

    monkeypatch.setattr(cli, "main", full)
    assert call(monkeypatch) == 2
    assert "No space left on device" in capsys.readouterr().err


CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 "
    "bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(CPU), "you tried to allocate 4 bytes"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB.\nProcess 5 has 70 GiB"),
            "allocate 3.00 GiB. What",
        ),
        (MemoryError(), "Python could not allocate an object. What"),
        (MemoryError("Unable to allocate 71.1 PiB for an array"), "71.1 PiB"),
    ],
)
def test_memory_that_runs_out_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    def greedy(**_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "main", greedy)
    assert call(monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: Memory ran out: ")
    assert said in line


def test_other_errors_of_a_program_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(**_: object) -> int:
        raise RuntimeError("a mistake in the code")

    monkeypatch.setattr(cli, "main", wrong)
    with pytest.raises(RuntimeError, match="a mistake"):
        call(monkeypatch)


def test_recipes_list_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "recipes", "list", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert "recipe:quickstart" in {row["name"] for row in rows}


def test_switches_reach_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("UNDERPAINT_NO_PLUGINS", "UNDERPAINT_PLUGINS", "UNDERPAINT_STRICT_PLUGINS", "UNDERPAINT_LOAD_PLUGINS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert call(monkeypatch, "--no-plugin", "timm", "--only-plugins", "tiny,timm", "recipes", "list") == 0
    assert os.environ.pop("UNDERPAINT_NO_PLUGINS") == "timm"
    assert os.environ.pop("UNDERPAINT_PLUGINS") == "tiny,timm"
    capsys.readouterr()


def test_the_deepspeed_launcher_s_argument_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--local_rank=1", "recipes", "list") == 0
    assert "recipe:quickstart" in capsys.readouterr().out

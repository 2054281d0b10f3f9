"""What the README says is what happens."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import click
import pytest

from tests.models.test_folders import make_generator
from underpaint.bench.matrix import read_matrix, resolve_cells
from underpaint.cli.main import main
from underpaint.models.folders import save_generator

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_generator(make_generator(), tmp_path / "underpaint-quickstart" / "generator")
    namespace: dict[str, object] = {}
    out = io.StringIO()
    examples = [text for language, text in BLOCKS if language == "python"]
    assert len(examples) >= 2
    with contextlib.redirect_stdout(out):
        for text in examples:
            # Each is copied alone.
            namespace = {}
            exec(compile(text, "README.md", "exec"), namespace)
    promised = re.findall(r"print\(.*\)\s+# (.*)", "".join(examples))
    assert out.getvalue().splitlines() == promised
    assert namespace["latents"].shape[0] == 3  # type: ignore[attr-defined]


def test_shell_examples_name_commands_and_options_that_exist() -> None:
    lines = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    calls = [part for line in lines for part in line.split("#")[0].split("&&") if "underpaint " in part]
    assert len(calls) >= 6
    context = click.Context(main)
    for call in calls:
        words = shlex.split(call[call.index("underpaint ") :])[1:]
        command = main.get_command(context, words[0])
        assert command is not None, call
        if isinstance(command, click.Group):
            command = command.get_command(click.Context(command), words[1])
            assert command is not None, call
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, call


def test_matrices_resolve_to_what_is_said_of_them(tmp_path: Path) -> None:
    (text,) = [text for language, text in BLOCKS if language == "yaml"]
    (tmp_path / "matrix.yaml").write_text(text)
    cells = resolve_cells(read_matrix(tmp_path / "matrix.yaml"))
    loads = [cell.loads for cell in cells]
    assert loads == [None, None, *["tokenizer.trained"] * 2, *["tokenizer.random"] * 2]

"""``underpaint report`` writes into the folder of a run, and into no other."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.test_main import call


def test_only_a_run_folder_gets_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report" / "index.html"
    page.parent.mkdir()
    page.write_text("mine")
    assert call(monkeypatch, "report", str(tmp_path)) == 2
    assert "is not the folder of a run, for it has no config.yaml; give the --out of" in capsys.readouterr().err
    # A file of this name is not rare.
    (tmp_path / "config.yaml").write_text("name: mine")
    assert call(monkeypatch, "report", str(tmp_path)) == 2
    assert "it has no provenance.json" in capsys.readouterr().err
    assert page.read_text() == "mine"
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]
    assert call(monkeypatch, "report", str(page)) == 2
    assert f"There is no run folder '{page}'" in capsys.readouterr().err


def test_damaged_files_do_not_keep_a_run_from_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("[")
    (tmp_path / "provenance.json").write_text("{")
    assert call(monkeypatch, "report", str(tmp_path)) == 0
    assert (tmp_path / "report" / "index.html").is_file()

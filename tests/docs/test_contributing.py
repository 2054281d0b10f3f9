"""What the plugin author's guide shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path

from underpaint.cli.skeleton import write_skeleton
from underpaint.registration.names import KINDS
from underpaint.testing import checks

GUIDE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_checks_that_it_names_exist() -> None:
    named = set(re.findall(r'expected_failures=\{"(\w+)"', GUIDE))
    assert named
    assert named <= {check.name for kind in KINDS for check in checks(kind)}


def test_its_registration_is_that_of_a_new_plugin(tmp_path: Path) -> None:
    folder = write_skeleton("lab", "encoder", tmp_path)
    written = (folder / "underpaint_lab" / "__init__.py").read_text(encoding="utf-8").replace("lab", "blocks")
    targets = re.findall(r'"underpaint_blocks\.\w+:\w+"', GUIDE)
    assert len(targets) == 2
    assert all(target in written for target in targets)

"""The eleven packages that ``plugins new`` writes, importable, with their spoilt variants, as the installed plugins."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from underpaint.cli.skeleton import write_skeleton
from underpaint.registration.discovery import Switches
from underpaint.registration.manager import PluginManager, reset_manager
from underpaint.registration.names import KINDS

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def skeletons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Write one package per kind, put them on the path, and return their modules."""
    out = tmp_path_factory.mktemp("skeletons")
    folders = [write_skeleton(f"demo-{kind}", kind, out) for kind in KINDS]
    before = list(sys.path)
    sys.path[:0] = [str(folder) for folder in folders]
    yield [f"underpaint_demo_{kind}" for kind in KINDS]
    sys.path[:] = before


@pytest.fixture
def demo(skeletons: list[str]) -> Iterator[PluginManager]:
    """A manager of the eleven packages and of the plugin file ``mutants.py`` alone."""
    manager = PluginManager(Switches(only=(), extra=(*skeletons, str(HERE / "mutants.py"))))
    reset_manager(manager)
    yield manager
    reset_manager()

"""Plugins made of a few lines, and managers that load only these."""

import textwrap
import types
from collections.abc import Callable

import pytest

from underpaint.registration.discovery import Candidate, Switches
from underpaint.registration.manager import PluginManager

Make = Callable[..., Candidate]
Load = Callable[..., PluginManager]

HEAD = "import underpaint\n"


@pytest.fixture
def make() -> Make:
    def _make(name: str, source: str, distribution: str | None = None) -> Candidate:
        def load() -> types.ModuleType:
            module = types.ModuleType(f"fake_{name}")
            exec(HEAD + textwrap.dedent(source), module.__dict__)
            return module

        package = f"underpaint-{name} 1.0" if distribution is None else distribution
        return Candidate(name=name, origin=f"fake_{name}", distribution=package, load=load)

    return _make


@pytest.fixture
def load() -> Load:
    def _load(*candidates: Candidate, **switches: object) -> PluginManager:
        return PluginManager(Switches(**switches), candidates)  # type: ignore[arg-type]

    return _load


@pytest.fixture
def good(make: Make) -> Candidate:
    """A plugin with two metrics, both of which are real."""
    return make(
        "good",
        """
        @underpaint.hookimpl
        def register_metrics(register):
            register("good/first", "good_module:First")
            register("good/second", "good_module:Second")
        """,
    )

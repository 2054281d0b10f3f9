"""The ways in which a plugin breaks: each is recorded, and takes nobody else down (anchors D.6)."""

import sys
import textwrap
from pathlib import Path

import pytest

from tests.registration.conftest import Load, Make
from underpaint.errors import NotFoundError, PluginError
from underpaint.registration import manager as manager_module
from underpaint.registration.discovery import Candidate, Switches, find_candidates
from underpaint.registration.manager import PluginManager, PluginWarning, manager, reset_manager

BROKEN = {
    "raises_at_import": ('raise RuntimeError("no such library")', "RuntimeError: no such library"),
    "import_error": ("import no_module_of_this_name", "ModuleNotFoundError: No module named"),
    "syntax_error": ("def register_metrics(:", "SyntaxError"),
    "exits_at_import": ("import sys\nsys.exit(3)", "SystemExit: 3"),
    "raises_in_hook": (
        '@underpaint.hookimpl\ndef register_metrics(register):\n    register("half/done", "a:B")\n    1 / 0',
        "ZeroDivisionError",
    ),
    "exits_in_hook": ("@underpaint.hookimpl\ndef register_metrics(register):\n    raise SystemExit(0)", "SystemExit"),
    "misspelled_hook": (
        "@underpaint.hookimpl\ndef register_metric(register):\n    pass",
        "There is no hook 'register_metric'. Did you mean 'register_metrics'",
    ),
    "unmarked_hook": ("def register_metrics(register):\n    pass", "is not marked; write @underpaint.hookimpl"),
    "wrong_signature": ("@underpaint.hookimpl\ndef register_metrics(registry):\n    pass", "PluginValidationError"),
    "wrong_lifecycle_signature": ("@underpaint.hookimpl\ndef on_step_end(loss):\n    pass", "PluginValidationError"),
    "newer_interface": ('underpaint_api = ">=2"', "needs plugin interface >=2, and this underpaint has 1.0"),
    "older_interface": ('underpaint_api = "<1"', "needs plugin interface <1"),
    "bad_interface": ("underpaint_api = 'two'", "is not a version range"),
    "interface_is_number": ("underpaint_api = 2", "is not a version range"),
    "bad_name": (
        '@underpaint.hookimpl\ndef register_metrics(register):\n    register("a b", "a:B")',
        "'a b' is not a component name",
    ),
    "bad_target": (
        '@underpaint.hookimpl\ndef register_metrics(register):\n    register("a", "a.B")',
        "must look like 'package.module:Name'",
    ),
    "weights_in_name": (
        '@underpaint.hookimpl\ndef register_metrics(register):\n    register("a/b@c", "a:B")',
        "register 'a/b' and pass takes_weights=True",
    ),
    "partial_wildcard": (
        '@underpaint.hookimpl\ndef register_metrics(register):\n    register("a/b*", "a:B", examples=("a/b",))',
        "a family is registered as 'a/*'",
    ),
    "family_without_examples": (
        '@underpaint.hookimpl\ndef register_metrics(register):\n    register("a/*", "a:B")',
        "a family without examples",
    ),
    "examples_as_text": (
        '@underpaint.hookimpl\ndef register_metrics(register):\n    register("a/*", "a:B", examples="a/b")',
        r"examples=('a/b',)",
    ),
}


@pytest.mark.parametrize("strict", [False, True], ids=["guarded", "strict"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_plugin(make: Make, load: Load, good: Candidate, case: str, strict: bool) -> None:
    source, expected = BROKEN[case]
    # Before and after the good one in the order of loading.
    for candidates in ([make("bad", source), good], [good, make("bad", source)]):
        if strict:
            with pytest.raises(PluginError, match="Plugin 'bad' failed"):
                load(*candidates, strict=True)
            continue
        with pytest.warns(PluginWarning, match="'bad' is left out.*underpaint plugins show bad") as caught:
            manager = load(*candidates)
        assert len(caught) == 1
        record = manager.record("bad")
        assert record.status == "failed"
        assert expected in record.error
        assert "\n" not in record.error
        assert "Traceback" in record.traceback or "Error" in record.traceback
        assert manager.record("good").status == "active"
        assert [item.name for item in manager.catalogue.registrations()] == ["good/first", "good/second"]


def test_half_registered_plugin_keeps_no_hook(make: Make, load: Load, good: Candidate) -> None:
    source = """
    calls = []
    @underpaint.hookimpl
    def on_step_end(step):
        raise AssertionError("called")
    @underpaint.hookimpl
    def register_metrics(register, nonsense):
        pass
    """
    with pytest.warns(PluginWarning):
        manager = load(make("bad", source), good)
    manager.call("on_step_end", stage="a", step=1, scalars={})


def test_duplicate_plugin_names(make: Make, load: Load, good: Candidate) -> None:
    twins = [make("twin", "", "one 1.0"), make("twin", "", "two 2.0")]
    with pytest.warns(PluginWarning, match="claimed by 'one 1.0' and 'two 2.0'"):
        manager = load(*twins, good)
    assert [record.status for record in manager.records] == ["failed", "failed", "active"]
    assert "--no-plugin twin@two" in manager.records[1].error


def test_duplicate_plugin_names_settled_by_a_switch(make: Make, load: Load) -> None:
    twins = [make("twin", "", "one 1.0"), make("twin", "", "two 2.0")]
    manager = load(*twins, off=("twin@two",))
    assert [record.status for record in manager.records] == ["active", "off"]
    assert manager.record("twin").distribution == "one 1.0"


METRIC = '@underpaint.hookimpl\ndef register_metrics(register):\n    register("same", "{0}:A", override={1})'


def test_duplicate_component_names(make: Make, load: Load) -> None:
    rivals = [make(name, METRIC.format(name, False)) for name in ("one", "two")]
    with pytest.warns(PluginWarning, match="metric 'same' is registered by 'one'.*and 'two'"):
        manager = load(*rivals)
    with pytest.raises(PluginError, match="--no-plugin two"):
        manager.catalogue.resolve("metric", "same")
    with pytest.raises(PluginError):
        load(*rivals, strict=True)


def test_duplicate_component_names_with_override(make: Make, load: Load) -> None:
    manager = load(make("one", METRIC.format("one", False)), make("two", METRIC.format("two", True)))
    assert manager.catalogue.resolve("metric", "same").registration.plugin == "two"
    assert manager.catalogue.conflicts() == []


def test_two_overrides_are_a_conflict(make: Make, load: Load) -> None:
    with pytest.warns(PluginWarning, match="'same'"):
        load(make("one", METRIC.format("one", True)), make("two", METRIC.format("two", True)))


def test_slow_plugin(monkeypatch: pytest.MonkeyPatch, make: Make, load: Load, good: Candidate) -> None:
    clock = iter([0.0, 1.5, 2.0, 2.1])
    monkeypatch.setattr(manager_module.time, "perf_counter", lambda: next(clock))
    manager = load(make("slow", ""), good)
    assert [(record.name, record.slow) for record in manager.records] == [("slow", True), ("good", False)]


def test_one_module_under_two_names(load: Load, good: Candidate) -> None:
    module = good.load()
    first = Candidate(name="first", origin="m", distribution="d 1", load=lambda: module)
    second = Candidate(name="second", origin="m", distribution="d 1", load=lambda: module)
    with pytest.warns(PluginWarning, match="already loaded as plugin 'first'"):
        manager = load(first, second)
    assert manager.record("first").status == "active"
    assert len(list(manager.catalogue.registrations("metric"))) == 2


# ------------------------------------------------------------------------------ switches


def test_switches(make: Make, load: Load) -> None:
    plugins = [make("a", ""), make("b", ""), make("c", "")]

    def active(**switches: object) -> list[str]:
        return [record.name for record in load(*plugins, **switches).records if record.status == "active"]

    assert active() == ["a", "b", "c"]
    assert active(only=("b",)) == ["b"]
    assert active(only=()) == []
    assert active(off=("b",)) == ["a", "c"]
    assert active(only=("a", "b"), off=("b",)) == ["a"]
    assert active(only=("b@underpaint-b",)) == ["b"]
    assert active(off=("b@somebody-else",)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("UNDERPAINT_NO_PLUGINS", "tiny,timn", r"--no-plugin \(UNDERPAINT_NO_PLUGINS\) names 'timn'.* 'timm'"),
        (
            "UNDERPAINT_PLUGINS",
            "blah",
            r"--only-plugins \(UNDERPAINT_PLUGINS\) names 'blah', and no plugin is called so",
        ),
        ("UNDERPAINT_NO_PLUGINS", "timm@somebody-else", "Known: 'timm@underpaint'"),
    ],
)
def test_switches_that_mean_no_plugin_are_refused(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    reset_manager()
    with pytest.raises(PluginError, match=message):
        manager()
    monkeypatch.delenv(variable)
    reset_manager()


def test_a_switch_may_mean_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin_mine.py").write_text("")
    monkeypatch.setenv("UNDERPAINT_LOAD_PLUGINS", str(tmp_path / "plugin_mine.py"))
    monkeypatch.setenv("UNDERPAINT_PLUGINS", "plugin_mine")
    reset_manager()
    assert [record.name for record in manager().records if record.status == "active"] == ["plugin_mine"]
    reset_manager()


def test_switches_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UNDERPAINT_PLUGINS", "UNDERPAINT_NO_PLUGINS", "UNDERPAINT_LOAD_PLUGINS", "UNDERPAINT_STRICT_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    assert Switches.from_environment() == Switches()
    monkeypatch.setenv("UNDERPAINT_PLUGINS", "")
    assert Switches.from_environment().only == ()
    monkeypatch.setenv("UNDERPAINT_PLUGINS", "a, b,")
    monkeypatch.setenv("UNDERPAINT_NO_PLUGINS", "c")
    monkeypatch.setenv("UNDERPAINT_LOAD_PLUGINS", "x.py,y.z")
    monkeypatch.setenv("UNDERPAINT_STRICT_PLUGINS", "1")
    assert Switches.from_environment() == Switches(only=("a", "b"), off=("c",), extra=("x.py", "y.z"), strict=True)
    monkeypatch.setenv("UNDERPAINT_STRICT_PLUGINS", "0")
    assert not Switches.from_environment().strict


# ------------------------------------------------------------------------------ files and modules

FILE = """
import underpaint

class Thing:
    pass

@underpaint.hookimpl
def register_metrics(register):
    register("{0}/thing", "{0}:Thing")
"""


def _file(folder: Path, stem: str) -> Path:
    path = folder / f"{stem}.py"
    path.write_text(FILE.format(stem))
    return path


def _only_extra(*extra: str) -> PluginManager:
    return PluginManager(Switches(only=(), extra=extra))


def test_file_plugin(tmp_path: Path) -> None:
    path = _file(tmp_path, "plugin_of_one_file")
    manager = _only_extra(str(path), str(path))  # given twice, loaded once
    record = manager.record("plugin_of_one_file")
    assert (record.status, record.origin, record.distribution) == ("active", str(path), "")
    assert record.names == (("metric", "plugin_of_one_file/thing"),)
    del sys.modules["plugin_of_one_file"]


def test_file_plugin_that_is_missing() -> None:
    with pytest.raises(PluginError, match=r"There is no plugin file 'nowhere/x\.py'"):
        find_candidates(["nowhere/x.py"])


@pytest.mark.parametrize("stem", ["json", "wave"], ids=["loaded module", "module not loaded yet"])
def test_file_plugin_hides_no_module(tmp_path: Path, stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if stem == "wave":
        monkeypatch.delitem(sys.modules, "wave", raising=False)
    with pytest.warns(PluginWarning, match=f"would hide the module '{stem}'"):
        manager = _only_extra(str(_file(tmp_path, stem)))
    assert manager.record(stem).status == "failed"


def test_file_plugin_that_raises_leaves_no_module(tmp_path: Path) -> None:
    path = tmp_path / "plugin_that_raises.py"
    path.write_text("1 / 0")
    with pytest.warns(PluginWarning):
        _only_extra(str(path))
    assert "plugin_that_raises" not in sys.modules


def test_dotted_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lab_tools"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "plugin.py").write_text(FILE.format("lab"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert _only_extra("lab_tools.plugin").record("lab_tools.plugin").status == "active"


def test_required_file_is_loaded(tmp_path: Path) -> None:
    path = _file(tmp_path, "plugin_required")
    manager = _only_extra()
    assert manager.require(str(path)).status == "active"
    assert manager.require(str(path)).name == "plugin_required"
    assert sum(record.name == "plugin_required" for record in manager.records) == 1
    assert manager.catalogue.resolve("metric", "plugin_required/thing")
    del sys.modules["plugin_required"]


def test_required_file_does_not_replace_a_plugin(tmp_path: Path, load: Load, good: Candidate) -> None:
    manager = load(good)
    with pytest.warns(PluginWarning), pytest.raises(PluginError, match="Another plugin is called 'good'"):
        manager.require(str(_file(tmp_path, "good")))
    assert manager.record("good").status == "active"
    assert len(list(manager.catalogue.registrations())) == 2
    del sys.modules["good"]


def test_required_plugin(make: Make, load: Load, good: Candidate) -> None:
    with pytest.warns(PluginWarning):
        manager = load(good, make("bad", "1 / 0"), make("away", ""), off=("away",))
    assert manager.require("good").name == "good"
    with pytest.raises(PluginError, match=r"asks for plugin 'bad', which failed(.|\n)*ZeroDivisionError"):
        manager.require("bad")
    with pytest.raises(PluginError, match="switched off"):
        manager.require("away")
    with pytest.raises(NotFoundError, match="Did you mean 'good'"):
        manager.require("goood")


def test_missing_name_shows_the_error_of_its_plugin(make: Make, load: Load, good: Candidate) -> None:
    with pytest.warns(PluginWarning):
        manager = load(good, make("bad", "1 / 0"), make("away", ""), off=("away",))
    with pytest.raises(PluginError, match=r"no metric 'bad/one'(.|\n)*'bad', which may provide it, failed: Zero"):
        manager.create("metric", "bad/one")
    with pytest.raises(PluginError, match="'away', which may provide it, is switched off"):
        manager.create("metric", "away/one")
    with pytest.raises(NotFoundError, match="Did you mean 'good/first'"):
        manager.create("metric", "good/frist")


def test_plugin_file_is_shown_whole(tmp_path: Path) -> None:
    path = tmp_path / "plugin_with_long_error.py"
    path.write_text(
        textwrap.dedent("""
        def inner():
            raise ValueError("the real\\nreason")
        inner()
    """)
    )
    with pytest.warns(PluginWarning):
        record = _only_extra(str(path)).record("plugin_with_long_error")
    assert record.error == "ValueError: the real reason"
    assert "in inner" in record.traceback

"""How the kit names, runs and judges checks."""

import subprocess
import sys
from pathlib import Path

import pytest

from underpaint.errors import ConfigError, NotFoundError, PluginError
from underpaint.registration.discovery import Switches
from underpaint.registration.manager import PluginManager, PluginWarning, reset_manager
from underpaint.registration.names import KINDS
from underpaint.testing import KIT_VERSION, cases, check_component, checks, parametrize

PLUGIN = '''
import underpaint

@underpaint.hookimpl
def register_samplers(register):
    base = {{"config": "underpaint_demo_sampler.config:MidpointConfig", "summary": "A sampler"}}
    target = "underpaint_demo_sampler.sampler:Midpoint"
    register("fine", target, **base)
    register("family/*", "{stem}:Model", config=base["config"], summary="x", takes_weights=True,
             examples=("family/a", "family/b@tag"))
    register("declared", "tests.testing.mutant_classes:Crude", **base,
             expected_failures={{"linear_flow_converges": "it is crude"}})
    register("stale", target, **base, expected_failures={{"linear_flow_converges": "it was crude"}})
    register("anything", "tests.testing.mutant_classes:Crude", **base, expected_failures={{"*": "no solver here"}})
    register("misspelled", target, **base, expected_failures={{"linear_flow": "it is crude"}})
    register("reasonless", target, **base, expected_failures={{"linear_flow_converges": " "}})
    register("silent", target, config=base["config"])
    register("sized", target, **base, options={{"steps": 3}})
    register("small", target, **base, options={{"steps": 3}}, tiny={{"steps": 50}})
    register("wrong", target, **base, options={{"steps": 0}})
    register("needs_extra", "{stem}:NeedsExtra", summary="x", extra="solvers")
    register("crash", "{stem}:Crash", summary="x")
    register.alias("short", "fine")


def __getattr__(name):
    if name not in ("NeedsExtra", "Crash", "Model"):
        raise AttributeError(name)
    from underpaint_demo_sampler.sampler import Midpoint

    class NeedsExtra(Midpoint):
        """Needs a library."""
        def __init__(self):
            raise ImportError("no solvers")

    class Crash(Midpoint):
        """Crashes."""
        def __init__(self):
            raise RuntimeError("out of order")

    class Model(Midpoint):
        """Takes weights."""
        def __init__(self, config, *, model, weights, load=True):
            super().__init__(config)
            if weights is None:
                raise RuntimeError("no weights were named")

    return {{"NeedsExtra": NeedsExtra, "Crash": Crash, "Model": Model}}[name]
'''


@pytest.fixture
def kit(skeletons: list[str], tmp_path: Path):
    path = tmp_path / "plugin_for_the_kit.py"
    path.write_text(PLUGIN.format(stem=path.stem))
    reset_manager(PluginManager(Switches(only=(), extra=(str(path), *skeletons))))
    yield
    reset_manager()
    del sys.modules[path.stem]


def _status(name: str, check: str) -> tuple[str, str]:
    (result,) = [r for r in check_component("sampler", name) if r.check == check]
    return result.status, result.message


def test_version_and_list() -> None:
    assert KIT_VERSION.count(".") == 1
    for kind in KINDS:
        names = [item.name for item in checks(kind)]
        assert len(names) == len(set(names)) >= 9
        for item in checks(kind):
            assert item.kind == kind
            assert item.description
            assert tuple(map(int, item.since.split("."))) <= tuple(map(int, KIT_VERSION.split(".")))
    with pytest.raises(ConfigError, match="Did you mean 'encoder'"):
        checks("encodr")


@pytest.mark.usefixtures("kit")
def test_ids() -> None:
    ids = [str(case) for case in cases("sampler", plugin="plugin_for_the_kit")]
    assert len(ids) == len(set(ids))
    assert "sampler:fine:time_runs_down" in ids
    # A family is stood for by its examples; weights are random unless an example names some.
    assert "sampler:family/a@random:time_runs_down" in ids
    assert "sampler:family/b@tag:time_runs_down" in ids
    assert not any("*" in name or "short" in name for name in ids)
    mark = parametrize("sampler", plugin="plugin_for_the_kit")
    assert mark.args[0] == "case"
    assert [mark.kwargs["ids"](case) for case in mark.args[1]] == ids


@pytest.mark.usefixtures("kit")
def test_only_what_is_asked_for() -> None:
    assert {case.kind for case in cases()} == set(KINDS)
    assert {case.kind for case in cases("loss")} == {"loss"}
    assert {case.kind for case in cases(plugin="underpaint_demo_metric")} == {"metric"}
    with pytest.raises(NotFoundError, match="There is no plugin 'plugin_for_the_kitt'"):
        parametrize(plugin="plugin_for_the_kitt")


@pytest.mark.usefixtures("kit")
def test_declared_failures() -> None:
    assert _status("declared", "linear_flow_converges") == ("expected", "it is crude")
    assert _status("declared", "time_runs_down") == ("passed", "")
    status, message = _status("stale", "linear_flow_converges")
    assert status == "failed"
    assert "declared to fail (it was crude), and does not; remove it" in message
    assert _status("anything", "linear_flow_converges") == ("expected", "no solver here")
    assert _status("anything", "time_runs_down") == ("passed", "")


@pytest.mark.usefixtures("kit")
def test_wrong_declarations() -> None:
    assert "which is no check of a sampler" in _status("misspelled", "declares_what_exists")[1]
    assert "gives no reason" in _status("reasonless", "declares_what_exists")[1]
    assert "has no summary" in _status("silent", "declares_what_exists")[1]


@pytest.mark.usefixtures("kit")
def test_missing_extra_is_skipped_and_a_crash_is_not() -> None:
    assert _status("needs_extra", "time_runs_down") == (
        "skipped",
        "It needs the extra 'solvers', which is not installed.",
    )
    assert _status("crash", "time_runs_down") == ("failed", "RuntimeError: out of order")


@pytest.mark.usefixtures("kit")
def test_names_options_and_aliases() -> None:
    assert {r.component for r in check_component("sampler", "family/c")} == {"sampler:family/c@random"}
    assert {r.message for r in check_component("sampler", "short", {"steps": 3})} == {""}
    with pytest.raises(NotFoundError):
        check_component("sampler", "fien")
    failed = [r for r in check_component("sampler", "fine", {"steps": 0}) if r.status == "failed"]
    assert failed
    assert all("'steps' must be > 0" in r.message for r in failed)


@pytest.mark.usefixtures("kit")
def test_names_that_make_equal_components_share_outcomes() -> None:
    results = {str(case): case.run() for case in cases("sampler", plugin="plugin_for_the_kit")}

    def ran(check: str) -> dict[str, str | None]:
        return {name.split(":")[1]: r.ran_as for name, r in results.items() if name.endswith(check)}

    # One class with equal options, whether its defaults, a preset or ``tiny`` say them.
    same = {name for name, other in ran("time_runs_down").items() if other == "fine"}
    assert same == {"misspelled", "reasonless", "silent", "small", "stale"}
    # Another class; other options; a model and weights, of which the class is told; options that are wrong.
    others = {name for name, other in ran("time_runs_down").items() if other is None} - {"fine"}
    assert others == {"anything", "crash", "family/a@random", "family/b@tag", "needs_extra", "sized", "wrong"}
    # What is registered is looked at name by name.
    assert set(ran("declares_what_exists").values()) == set(ran("config_round_trip").values()) == {None}
    # Each name is judged by what it declares.
    told = {
        name: (results[f"sampler:{name}:linear_flow_converges"].status, ran("linear_flow_converges")[name])
        for name in ("anything", "declared", "fine", "stale", "small")
    }
    assert told == {
        "anything": ("expected", None),
        "declared": ("expected", "anything"),
        "fine": ("passed", None),
        "stale": ("failed", "fine"),
        "small": ("passed", "fine"),
    }
    assert results["sampler:declared:linear_flow_converges"].message == "it is crude"


@pytest.mark.usefixtures("kit")
def test_a_case_that_is_run_again_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = [c for c in cases("sampler") if (c.name, c.check.name) == ("fine", "time_runs_down")]
    assert case.run().status == "passed"
    monkeypatch.setattr("underpaint_demo_sampler.sampler.Midpoint.sample", lambda *_: None)
    assert case.run().status == "failed"


@pytest.mark.usefixtures("kit")
def test_a_failure_names_the_plugin() -> None:
    (case,) = [c for c in cases("sampler") if (c.name, c.check.name) == ("crash", "time_runs_down")]
    with pytest.raises(AssertionError, match="^sampler:crash:time_runs_down of plugin 'plugin_for_the_kit': "):
        case()


@pytest.mark.usefixtures("kit")
def test_as_a_pytest_test() -> None:
    def outcome(name: str, check: str) -> str:
        (case,) = [c for c in cases("sampler") if c.name == name and c.check.name == check]
        try:
            case()
        except BaseException as raised:
            return type(raised).__name__
        return "passed"

    assert outcome("fine", "time_runs_down") == "passed"
    assert outcome("crash", "time_runs_down") == "AssertionError"
    assert outcome("stale", "linear_flow_converges") == "AssertionError"
    assert outcome("declared", "linear_flow_converges") == "XFailed"
    assert outcome("needs_extra", "time_runs_down") == "Skipped"


def test_plugin_that_failed_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "plugin_that_is_broken.py"
    path.write_text("1 / 0")
    with pytest.warns(PluginWarning):
        reset_manager(PluginManager(Switches(only=(), extra=(str(path),))))
    try:
        with pytest.raises(PluginError, match="ZeroDivisionError"):
            parametrize(plugin="plugin_that_is_broken")
    finally:
        reset_manager()


@pytest.mark.slow
def test_eager_imports_are_found(skeletons: list[str], tmp_path: Path) -> None:
    eager = tmp_path / "plugin_eager.py"
    eager.write_text(
        "import torch\nimport underpaint\n@underpaint.hookimpl\ndef register_samplers(register):\n"
        "    register('eager', 'underpaint_demo_sampler.sampler:Midpoint', summary='x',\n"
        "             config='underpaint_demo_sampler.config:MidpointConfig')\n"
    )
    config = tmp_path / "plugin_eager_config.py"
    config.write_text(
        "import underpaint\n@underpaint.hookimpl\ndef register_samplers(register):\n"
        "    register('late', 'underpaint_demo_sampler.sampler:Midpoint', summary='x',\n"
        "             config='underpaint_demo_sampler.sampler:MidpointConfig')\n"
    )
    reset_manager(PluginManager(Switches(only=(), extra=(str(eager), str(config)))))
    try:
        assert "loading the plugin imports torch" in _status("eager", "imports_lazily")[1]
        assert "lives in a module that imports torch" in _status("late", "imports_lazily")[1]
    finally:
        reset_manager()
        for path in (eager, config):
            del sys.modules[path.stem]


def test_kit_is_importable_without_torch() -> None:
    code = "import sys; import underpaint.testing; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"

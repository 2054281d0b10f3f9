"""Every hook is documented in one order, called as documented, and has a test of its own."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from tests.registration.conftest import Load, Make
from underpaint import hookspecs
from underpaint.registration.manager import HOOKS, REGISTRATION_HOOKS, PluginWarning
from underpaint.registration.names import KINDS

LIFECYCLE = {
    "on_train_start": {"folder": Path("run"), "config": {"name": "x"}},
    "on_stage_start": {"folder": Path("run"), "stage": "align", "step": 0},
    "on_step_end": {"stage": "align", "step": 20, "scalars": {"loss": 0.5}},
    "on_checkpoint_saved": {"stage": "align", "step": 20, "checkpoint": Path("run/stages/align/20")},
    "on_stage_end": {"folder": Path("run"), "stage": "align", "step": 100},
    "on_train_end": {"folder": Path("run"), "error": None},
}


@pytest.mark.parametrize("name", HOOKS)
def test_documentation_has_its_order(name: str) -> None:
    text = inspect.getdoc(getattr(hookspecs, name)) or ""
    places = [text.find(part) for part in ("Called ", "Args:\n", "Result: ", "Implemented by: ")]
    assert places[0] == 0, "the first sentence says when the hook is called"
    assert -1 not in places
    assert places == sorted(places)
    documented = re.findall(r"^    (\w+): ", text.partition("Args:\n")[2].partition("Result:")[0], re.MULTILINE)
    assert documented == list(inspect.signature(getattr(hookspecs, name)).parameters)


def test_every_hook_has_a_test() -> None:
    sources = [path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("test_*.py")]
    tested = {name for source in sources for name in re.findall(r"def test_hook_(\w+)\(", source)}
    assert set(HOOKS) - tested == set()
    assert tested - set(HOOKS) == set(), "tests of hooks that do not exist"


def test_every_kind_has_a_registration_hook() -> None:
    assert sorted(REGISTRATION_HOOKS.values()) == sorted(KINDS)
    assert set(REGISTRATION_HOOKS) <= set(HOOKS)


# ------------------------------------------------------------------------------ registration


def _register(hook: str, make: Make, load: Load) -> None:
    """A plugin's hook is called once, and what it registers belongs to its kind and plugin."""
    plugin = make(
        "one",
        f"""
        calls = []
        @underpaint.hookimpl
        def {hook}(register):
            calls.append(register)
            register("one/thing", "one.module:Thing", summary="A thing", extra="more")
            register.alias("thing", "one/thing")
        """,
    )
    modules = []
    watched = type(plugin)(
        name=plugin.name,
        origin=plugin.origin,
        distribution=plugin.distribution,
        load=lambda: modules.append(plugin.load()) or modules[0],
    )
    manager = load(watched, make("two", ""))
    assert len(modules[0].calls) == 1
    (item,) = manager.catalogue.registrations()
    kind = REGISTRATION_HOOKS[hook]
    assert (item.kind, item.name, item.target) == (kind, "one/thing", "one.module:Thing")
    assert (item.plugin, item.distribution, item.summary) == ("one", "underpaint-one 1.0", "A thing")
    assert manager.catalogue.resolve(kind, "thing").registration is item
    assert manager.record("one").hooks == (hook,)
    assert manager.record("one").names == ((kind, "one/thing"), (kind, "thing"))


def test_hook_register_encoders(make: Make, load: Load) -> None:
    _register("register_encoders", make, load)


def test_hook_register_adapters(make: Make, load: Load) -> None:
    _register("register_adapters", make, load)


def test_hook_register_decoders(make: Make, load: Load) -> None:
    _register("register_decoders", make, load)


def test_hook_register_backbones(make: Make, load: Load) -> None:
    _register("register_backbones", make, load)


def test_hook_register_conditioners(make: Make, load: Load) -> None:
    _register("register_conditioners", make, load)


def test_hook_register_losses(make: Make, load: Load) -> None:
    _register("register_losses", make, load)


def test_hook_register_metrics(make: Make, load: Load) -> None:
    _register("register_metrics", make, load)


def test_hook_register_datasets(make: Make, load: Load) -> None:
    _register("register_datasets", make, load)


def test_hook_register_samplers(make: Make, load: Load) -> None:
    _register("register_samplers", make, load)


def test_hook_register_trackers(make: Make, load: Load) -> None:
    _register("register_trackers", make, load)


def test_hook_register_importers(make: Make, load: Load) -> None:
    _register("register_importers", make, load)


def test_hook_register_recipes(make: Make, load: Load, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "slow.yaml").write_text('# Comment\nname: slow\nabout: "A slow one: really"\n')
    (tmp_path / "all" / "notes.txt").write_text("about: nothing")
    manager = load(
        make(
            "one",
            f"""
            @underpaint.hookimpl
            def register_recipes(register):
                register("quick", "recipes/quick.yaml")
                register.folder({str(tmp_path / "all")!r})
            """,
        )
    )
    recipe, slow = manager.catalogue.recipes()
    assert (recipe.name, recipe.path, recipe.plugin) == ("quick", Path("recipes/quick.yaml"), "one")
    assert (slow.name, slow.path) == ("slow", tmp_path / "all" / "slow.yaml")
    assert (recipe.about(), slow.about()) == ("", "A slow one: really")
    assert manager.catalogue.recipe("quick") is recipe
    assert manager.record("one").names == (("recipe", "quick"), ("recipe", "slow"))


# ------------------------------------------------------------------------------ life of a run


def _call(hook: str, make: Make, load: Load) -> None:
    """Every plugin that has the hook receives the arguments it asks for; one that raises is called no more."""
    arguments = LIFECYCLE[hook]
    names = ", ".join(arguments)
    received: list[Any] = []
    source = f"""
    @underpaint.hookimpl
    def {hook}({names}):
        import builtins
        builtins.underpaint_test_sink.append(({names},))
    """
    part = next(iter(arguments))
    shorter = f"""
    @underpaint.hookimpl
    def {hook}({part}):
        import builtins
        builtins.underpaint_test_sink.append({part})
    """
    failing = f"""
    @underpaint.hookimpl
    def {hook}():
        raise RuntimeError("no disk")
    """
    import builtins

    builtins.underpaint_test_sink = received  # type: ignore[attr-defined]
    try:
        manager = load(make("all", source), make("bad", failing), make("less", shorter), make("none", ""))
        with pytest.warns(PluginWarning, match=f"'bad' failed in {hook} and gets no more calls: RuntimeError: no disk"):
            manager.call(hook, **arguments)
        assert received == [tuple(arguments.values()), arguments[part]]
        manager.call(hook, **arguments)
        assert len(received) == 4
    finally:
        del builtins.underpaint_test_sink  # type: ignore[attr-defined]
    record = manager.record("bad")
    assert record.status == "failed"
    assert "no disk" in record.traceback


def test_hook_on_train_start(make: Make, load: Load) -> None:
    _call("on_train_start", make, load)


def test_hook_on_stage_start(make: Make, load: Load) -> None:
    _call("on_stage_start", make, load)


def test_hook_on_step_end(make: Make, load: Load) -> None:
    _call("on_step_end", make, load)


def test_hook_on_checkpoint_saved(make: Make, load: Load) -> None:
    _call("on_checkpoint_saved", make, load)


def test_hook_on_stage_end(make: Make, load: Load) -> None:
    _call("on_stage_end", make, load)


def test_hook_on_train_end(make: Make, load: Load) -> None:
    _call("on_train_end", make, load)


def test_components_of_a_plugin_outlive_its_hook(make: Make, load: Load) -> None:
    source = """
    @underpaint.hookimpl
    def register_metrics(register):
        register("both", "both:Both")
    @underpaint.hookimpl
    def on_step_end():
        raise SystemExit(4)
    """
    manager = load(make("both", source))
    with pytest.warns(PluginWarning, match="SystemExit: 4"):
        manager.call("on_step_end", **LIFECYCLE["on_step_end"])
    assert manager.catalogue.resolve("metric", "both")


def test_trace(make: Make, load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("UNDERPAINT_TRACE_PLUGINS", "1")
    source = "@underpaint.hookimpl\ndef on_step_end(step):\n    pass"
    load(make("watcher", source)).call("on_step_end", **LIFECYCLE["on_step_end"])
    traced = capsys.readouterr().err
    assert "hook on_step_end → watcher" in traced
    assert "'step': 20" in traced

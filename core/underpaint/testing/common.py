"""Checks of every kind: what is declared, how it is imported, and that it can be made again."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from underpaint.config.structure import structure, unstructure
from underpaint.interfaces.component import ComponentSpec
from underpaint.registration.manager import manager
from underpaint.registration.names import KINDS
from underpaint.registration.registrar import load_target
from underpaint.testing.child import run_child
from underpaint.testing.kit import ANY, Subject, check, checks, expect

__all__: list[str] = []

_LISTING = """
before = "torch" in sys.modules
for target in arguments:
    __import__(target.partition(":")[0])
status = [[r.name, r.status, r.error] for r in manager.records if r.status != "off"]
print(json.dumps([before, "torch" in sys.modules, status]))
"""


@check(*KINDS, every_name=True)
def declares_what_exists(subject: Subject) -> None:
    """Expected failures name checks of the kit, with a reason, and the registration has a summary."""
    known = {item.name for item in checks(subject.kind)} | {ANY}
    for name, reason in subject.registration.expected_failures.items():
        expect(name in known, f"expected_failures names '{name}', which is no check of a {subject.kind}")
        expect(bool(reason.strip()), f"expected_failures gives no reason for '{name}'")
    expect(bool(subject.registration.summary), "the registration has no summary, so listings say nothing about it")


def _listing(subject: Subject, targets: list[str]) -> Any:
    # One process imports the config classes of the whole plugin; an own one is worth its time when that finds fault.
    own = [r for r in manager().catalogue.registrations() if r.plugin == subject.registration.plugin]
    with contextlib.suppress(AssertionError):
        found = run_child(_LISTING, subject.record, *sorted({r.config for r in own if r.config is not None}))
        if not any(found[:2]):
            return found
    return run_child(_LISTING, subject.record, *targets)


@check(*KINDS, every_name=True)
def imports_lazily(subject: Subject) -> None:
    """Loading the plugin, listing its names and importing its config class import no torch."""
    targets = [] if subject.registration.config is None else [subject.registration.config]
    while_loading, after_config, status = _listing(subject, targets)
    broken = [f"{name}: {error}" for name, state, error in status if state != "active"]
    expect(not broken, f"the plugin does not load in a fresh process: {'; '.join(broken)}")
    expect(bool(status), "the plugin is not found in a fresh process")
    expect(not while_loading, "loading the plugin imports torch; register targets as strings, and import in them")
    expect(not after_config, f"the config class {targets} lives in a module that imports torch; move it to its own")


@check(*KINDS, every_name=True)
def config_round_trip(subject: Subject) -> None:
    """Options survive the way to JSON and back, and the component is made again from its spec."""
    options = subject.resolved_options()
    config = manager().catalogue.config(subject.kind, subject.name, options)
    if config is not None:
        plain = json.loads(json.dumps(unstructure(config)))
        again = structure(plain, type(config), "options")
        expect(again == config, f"the options came back from JSON as {again}, and were {config}")
    component = subject.make()
    spec = component.spec
    expect(spec.kind == subject.kind, f"the spec says kind '{spec.kind}'")
    plain = json.loads(json.dumps(unstructure(spec)))
    saved = structure(plain, ComponentSpec, "spec")
    override = {**subject.context, "folder": subject.folder / "again"} if subject.kind == "tracker" else {}
    made = manager().catalogue.create_from_spec(saved, **override)
    expect(type(made) is type(component), f"the spec makes a {type(made).__name__}, not a {type(component).__name__}")
    expect(
        made.spec.options == spec.options and made.spec.name == spec.name,
        f"the component made from the spec has the spec {made.spec}, and the first one {spec}",
    )


@check(*KINDS, every_name=True)
def target_has_docstring(subject: Subject) -> None:
    """The class, and every option of its config class, are documented."""
    target = load_target(subject.registration.target)
    expect(bool((target.__doc__ or "").strip()), f"'{subject.registration.target}' has no docstring")
    if subject.registration.config is not None:
        import attrs

        config = load_target(subject.registration.config)
        text = config.__doc__ or ""
        missing = [field.name for field in attrs.fields(config) if f"{field.name}:" not in text]
        expect(not missing, f"the docstring of {config.__name__} does not explain {', '.join(missing)}")


@check(*KINDS, every_name=True)
def refuses_unknown_options(subject: Subject) -> None:
    """An option that does not exist is refused with an error that names it."""
    from underpaint.errors import ConfigError

    try:
        manager().create(subject.kind, subject.name, **{**subject.context, "no_such_option": 1})
    except ConfigError as error:
        expect("no_such_option" in str(error), f"the error does not name the option: {error}")
    else:
        raise AssertionError("the option 'no_such_option' was accepted")

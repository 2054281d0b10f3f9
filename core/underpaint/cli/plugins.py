"""``underpaint plugins``: what is installed, from where, in what state, and whether it conforms."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from underpaint.cli.output import print_json, print_table
from underpaint.errors import ConfigError, NotFoundError, PluginError, UnderpaintError, suggest
from underpaint.registration.catalogue import Resolved
from underpaint.registration.manager import PluginManager, PluginRecord, PluginWarning, manager
from underpaint.registration.names import KINDS
from underpaint.registration.registrar import Registration, load_target

if TYPE_CHECKING:
    from underpaint.testing import CheckResult

__all__ = ["plugins_group"]


def _manager() -> PluginManager:
    # These commands show failures themselves; a warning beside them would say everything twice.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)
        return manager()


@click.group("plugins", invoke_without_command=True)
@click.pass_context
def plugins_group(context: click.Context) -> None:
    """List, show, check and create plugins; alone, it lists them."""
    if context.invoked_subcommand is None:
        context.invoke(list_plugins, kind=None, as_json=False)


# ------------------------------------------------------------------------------ list


@plugins_group.command("list")
@click.argument("kind", required=False, type=click.Choice(KINDS), metavar="[KIND]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_plugins(kind: str | None, as_json: bool) -> None:
    """List every plugin found: active, failed or off; or, of a KIND such as 'encoder', every name."""
    if kind is not None:
        _list_names(kind, as_json)
        return
    plugins = _manager()
    conflicts = plugins.catalogue.conflicts()
    if as_json:
        print_json({"plugins": [_plugin_row(record) for record in plugins.records], "conflicts": conflicts})
        return
    rows = []
    for record in plugins.records:
        row = _plugin_row(record)
        names = ", ".join(f"{count} {kind}" for kind, count in row["names"].items())
        note = row["error"] or ("slow to load" if record.slow else "")
        rows.append((record.name, record.distribution or record.origin, record.status, row["load_ms"], names, note))
    print_table(rows, ("name", "from", "status", "ms", "names", "note"))
    for sentence in conflicts:
        click.echo(f"Conflict: {sentence}", err=True)
    if any(record.status == "failed" for record in plugins.records):
        click.echo("'underpaint plugins show NAME' prints the whole error of a failed plugin.", err=True)


def _list_names(kind: str, as_json: bool) -> None:
    catalogue = _manager().catalogue
    rows = [{"name": r.name, "plugin": r.plugin, "about": r.summary} for r in catalogue.registrations(kind)]
    aliases = (alias for alias in catalogue.aliases() if alias.kind == kind)
    rows += [{"name": alias.alias, "plugin": alias.plugin, "about": f"→ {alias.name}"} for alias in aliases]
    rows.sort(key=lambda row: row["name"])
    if as_json:
        print_json(rows)
    else:
        print_table([[row["name"], row["plugin"], row["about"]] for row in rows], [kind, "plugin", "about"])


def _plugin_row(record: PluginRecord) -> dict[str, Any]:
    distribution, _, version = record.distribution.partition(" ")
    catalogue = _manager().catalogue
    counts = Counter(item.kind for item in catalogue.registrations() if item.plugin == record.name)
    counts["alias"] = sum(item.plugin == record.name for item in catalogue.aliases())
    counts["recipe"] = sum(item.plugin == record.name for item in catalogue.recipes())
    return {
        "name": record.name,
        "distribution": distribution,
        "version": version,
        "origin": record.origin,
        "status": record.status,
        "hooks": list(record.hooks),
        "names": {kind: counts[kind] for kind in (*KINDS, "alias", "recipe") if counts[kind]},
        "error": record.error,
        "load_ms": round(record.seconds * 1000),
    }


# ------------------------------------------------------------------------------ show


@plugins_group.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str, as_json: bool) -> None:
    """Show a plugin, or a component: NAME is 'timm', 'psnr' or 'encoder:tiny/vit'.

    Of an encoder it says under which licence its weights are.
    """
    found = _find(name)
    plain = _plugin_details(found) if isinstance(found, PluginRecord) else _component_details(*found)
    if as_json:
        print_json(plain)
        return
    for key, value in plain.items():
        if key == "options":
            click.echo("options:" if value else "options: none")
            _print_options(value)
        elif key == "traceback":
            click.echo(f"\n{value}" if value else "", nl=bool(value))
        elif isinstance(value, list):
            click.echo(f"{key}:" + "".join(f"\n  {item}" for item in value) if value else f"{key}: none")
        elif value not in ("", None):
            click.echo(f"{key}: {value}")


def _print_options(options: list[dict[str, Any]]) -> None:
    rows = [
        (o["name"], o["type"], "required" if o["required"] else json.dumps(o["default"]), o["about"]) for o in options
    ]
    if rows:
        print_table(rows, ("option", "type", "default", "about"))


def _find(name: str) -> PluginRecord | tuple[str, str]:
    """Return the plugin or the component, as (kind, name), that a name means."""
    plugins = _manager()
    kind, colon, rest = name.partition(":")
    if colon and kind in KINDS:
        plugins.catalogue.resolve(kind, rest)
        return kind, rest
    if any(record.name == name for record in plugins.records):
        return plugins.record(name)
    kinds = []
    for candidate in KINDS:
        try:
            plugins.catalogue.resolve(candidate, name)
        except NotFoundError:
            continue
        except PluginError:
            pass  # rivals claim it, so it exists; making it says which
        kinds.append(candidate)
    if len(kinds) == 1:
        return kinds[0], name
    if kinds:
        raise ConfigError(f"'{name}' is the name of {' and '.join(kinds)}; write '{kinds[0]}:{name}'.")
    known = {record.name for record in plugins.records}
    known |= {registration.name for registration in plugins.catalogue.registrations()}
    known |= {alias.alias for alias in plugins.catalogue.aliases()}
    raise NotFoundError(f"There is no plugin or component '{name}'. {suggest(name, known)}")


def _plugin_details(record: PluginRecord) -> dict[str, Any]:
    catalogue = _manager().catalogue
    return {
        **{key: value for key, value in _plugin_row(record).items() if key not in ("hooks", "names", "error")},
        "hooks": list(record.hooks),
        "names": [
            f"{item.kind}:{item.name}" + (f" — {item.summary}" if item.summary else "")
            for item in catalogue.registrations()
            if item.plugin == record.name
        ],
        "aliases": [f"{a.kind}:{a.alias} → {a.name}" for a in catalogue.aliases() if a.plugin == record.name],
        "recipes": [
            f"{recipe.name}" + (f" — {about}" if (about := recipe.about()) else "")
            for recipe in catalogue.recipes()
            if recipe.plugin == record.name
        ],
        "error": record.error,
        "traceback": record.traceback,
    }


def _component_details(kind: str, name: str) -> dict[str, Any]:
    resolved = _manager().catalogue.resolve(kind, name)
    registration = resolved.registration
    return {
        "name": f"{kind}:{resolved.name}",
        "summary": registration.summary,
        "plugin": registration.plugin,
        "distribution": registration.distribution,
        "target": registration.target,
        "config": registration.config,
        "weights": "chosen after '@'" if registration.takes_weights else "",
        "examples": list(registration.examples),
        "licence": _licence(resolved),
        "source": registration.source,
        "extra": registration.extra,
        "expected_failures": [f"{check}: {why}" for check, why in registration.expected_failures.items()],
        "options": _options(registration),
    }


def _licence(resolved: Resolved) -> str:
    """Return the licence of a component's weights; of an encoder of a family, what it says itself."""
    registration = resolved.registration
    if registration.kind != "encoder" or not registration.is_family:
        return registration.licence
    import torch

    from underpaint.interfaces.component import ComponentSpec
    from underpaint.interfaces.encoder import Encoder

    spec = ComponentSpec("encoder", str(resolved.name), registration.options)
    try:
        # Neither memory nor weights are needed to ask.
        with torch.device("meta"):
            encoder = _manager().create_from_spec(spec)
    except NotFoundError:
        raise
    except UnderpaintError:
        # More has to be said before it can be made, which of its weights are meant for instance.
        return registration.licence
    assert isinstance(encoder, Encoder)
    return encoder.info.licence or registration.licence


def _options(registration: Registration) -> list[dict[str, Any]]:
    if registration.config is None:
        return []
    cls = load_target(registration.config)
    documentation = _attribute_sentences(cls.__doc__ or "")
    found = []
    for field in attrs.fields(cls):
        default = field.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = default.factory() if not default.takes_self else None
        preset = field.name in registration.options
        required = default is attrs.NOTHING and not preset
        found.append(
            {
                "name": field.alias,
                "type": field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type)),
                "required": required,
                "default": None if required else (registration.options[field.name] if preset else default),
                "about": documentation.get(field.name, ""),
            }
        )
    return found


def _attribute_sentences(docstring: str) -> dict[str, str]:
    """Return the first sentence that the section ``Attributes:`` of a docstring says on each attribute."""
    found: dict[str, str] = {}
    section = inspect.cleandoc(docstring).partition("\nAttributes:\n")[2]
    name = ""
    for line in section.splitlines():
        depth = len(line) - len(line.lstrip())
        if line.strip() and depth == 0:
            break
        if depth == 4:
            name, _, about = line.strip().partition(":")
            found[name] = about.strip()
        elif name:
            found[name] += " " + line.strip()
    return {name: text.strip().partition(". ")[0].rstrip(".") for name, text in found.items()}


# ------------------------------------------------------------------------------ check


@plugins_group.command("check")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--isolated", is_flag=True, help="Run in a process of its own, so that a crash is reported too.")
@click.option("--results", type=click.Path(path_type=Path), hidden=True)
def check(name: str, as_json: bool, isolated: bool, results: Path | None) -> None:
    """Run the conformance kit on a plugin or a component; exit code 1 when a check fails."""
    outcome = _run_isolated(name) if isolated else _run_checks(name)
    if results is not None:
        results.write_text(json.dumps(outcome), encoding="utf-8")
        return
    if as_json:
        print_json(outcome)
    else:
        _print_outcome(outcome)
    if not outcome["passed"]:
        click.get_current_context().exit(1)


def _run_checks(name: str) -> dict[str, Any]:
    from underpaint.testing import KIT_VERSION, cases, check_component

    found = _find(name)
    results: list[CheckResult] = []
    error = ""
    if not isinstance(found, PluginRecord):
        results = check_component(*found)
    elif found.status == "active":
        results = [case.run() for case in cases(plugin=found.name)]
    else:
        error = found.traceback or f"The plugin '{name}' is switched off."
    return {
        "name": name,
        "kit": KIT_VERSION,
        "passed": not error and all(result.status != "failed" for result in results),
        "error": error,
        "results": [attrs.asdict(result, filter=lambda field, _: field.name != "error") for result in results],
    }


def _run_isolated(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="underpaint-check-") as folder:
        report = Path(folder) / "results.json"
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from underpaint.cli.main import run; run()",
                *("plugins", "check", name, "--results", str(report)),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if report.is_file():
            outcome = json.loads(report.read_text(encoding="utf-8"))
            assert isinstance(outcome, dict)
            return outcome
    said = done.stderr.strip()
    if done.returncode == 2 and said.startswith("Error: "):
        raise PluginError(said.removeprefix("Error: "))
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return {
        "name": name,
        "kit": None,
        "passed": False,
        "error": f"The process that checked '{name}' ended with {how} before it could report.\n{said}".strip(),
        "results": [],
    }


def _print_outcome(outcome: dict[str, Any]) -> None:
    results = outcome["results"]
    if results:
        print_table(
            [(r["component"], r["check"], r["status"], round(r["seconds"], 2), _remark(r)) for r in results],
            ("component", "check", "status", "s", "message"),
        )
    if outcome["error"]:
        click.echo(outcome["error"])
        return
    counts = Counter(result["status"] for result in results)
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "it registers no component"
    click.echo(f"\n{outcome['name']}: {told} (conformance kit {outcome['kit']})")


def _remark(result: dict[str, Any]) -> str:
    return str(result["message"] or (f"ran as {result['ran_as']}" if result["ran_as"] else ""))


# ------------------------------------------------------------------------------ new


@plugins_group.command("new")
@click.argument("name")
@click.option("--kind", type=click.Choice(KINDS), default="encoder", show_default=True, help="Kind of its component.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Where the package's folder is made; here by default.",
)
def new(name: str, kind: str, out: Path) -> None:
    """Write the package underpaint-NAME: an installable plugin whose tests pass as it is."""
    from underpaint.cli.skeleton import write_skeleton

    folder = write_skeleton(name, kind, out)
    plugin = folder.name.removeprefix("underpaint-")
    click.echo(f"Wrote {folder}. Next:\n  pip install -e {folder}\n  underpaint plugins check {plugin}")

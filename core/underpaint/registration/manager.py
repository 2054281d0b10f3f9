"""Loads plugins, one guard each, and calls their hooks."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import attrs
import pluggy
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from underpaint import hookspecs
from underpaint.errors import NotFoundError, PluginError, suggest
from underpaint.registration.catalogue import Catalogue
from underpaint.registration.discovery import Candidate, Switches, check_switches, extra_candidate, find_candidates
from underpaint.registration.names import KINDS
from underpaint.registration.registrar import RecipeRegistrar, Registrar

if TYPE_CHECKING:
    from underpaint.interfaces.component import ComponentSpec

__all__ = ["PluginManager", "PluginRecord", "PluginWarning", "manager"]

SLOW_SECONDS = 1.0
_PLURALS = {"loss": "losses"}
REGISTRATION_HOOKS = {f"register_{_PLURALS.get(kind, kind + 's')}": kind for kind in KINDS}
HOOKS = tuple(
    name for name, value in vars(hookspecs).items() if name.startswith(("register_", "on_")) and callable(value)
)


class PluginWarning(UserWarning):
    """A plugin could not be loaded, or a hook of it failed; everything else goes on."""


@attrs.define(kw_only=True)
class PluginRecord:
    """What became of one plugin.

    Attributes:
        name: Name of the plugin.
        origin: Where it was found: entry-point value, file or module.
        distribution: Distribution and version, or an empty string.
        status: ``active``, ``failed`` or ``off``.
        hooks: Hooks it implements.
        names: What it registered, as (kind, name).
        error: One sentence saying what failed.
        traceback: Traceback of the failure.
        seconds: Time to import and register it.
    """

    name: str
    origin: str
    distribution: str
    status: Literal["active", "failed", "off"] = "active"
    hooks: tuple[str, ...] = ()
    names: tuple[tuple[str, str], ...] = ()
    error: str = ""
    traceback: str = ""
    seconds: float = 0.0

    @property
    def slow(self) -> bool:
        """Whether loading it took longer than a second."""
        return self.seconds > SLOW_SECONDS


class PluginManager:
    """All plugins of this process, with the `Catalogue` that they filled.

    A plugin that fails is recorded and left out; the others work. It is fatal when `Switches.strict` is
    set, or when something asks for what the plugin would have provided (`require`, `explain`).
    """

    def __init__(self, switches: Switches | None = None, candidates: Sequence[Candidate] | None = None) -> None:
        self.switches = Switches.from_environment() if switches is None else switches
        self.records: list[PluginRecord] = []
        self.catalogue = Catalogue()
        self._pm = pluggy.PluginManager("underpaint")
        self._pm.add_hookspecs(hookspecs)
        if os.environ.get("UNDERPAINT_TRACE_PLUGINS", "") not in ("", "0"):
            self._pm.add_hookcall_monitoring(_trace, lambda *_: None)
        found = find_candidates(self.switches.extra) if candidates is None else list(candidates)
        self._load_all(found)

    # -- loading

    def _load_all(self, candidates: Sequence[Candidate]) -> None:
        allowed = []
        for candidate in candidates:
            record = PluginRecord(name=candidate.name, origin=candidate.origin, distribution=candidate.distribution)
            self.records.append(record)
            if self._is_off(candidate):
                record.status = "off"
            else:
                allowed.append((candidate, record))
        times = Counter(candidate.name for candidate, _ in allowed)
        for candidate, record in allowed:
            if times[candidate.name] > 1:
                owners = " and ".join(f"'{c.distribution or c.origin}'" for c, _ in allowed if c.name == candidate.name)
                token = f"{candidate.name}@{candidate.distribution.partition(' ')[0]}"
                self._fail(
                    record,
                    PluginError(
                        f"The plugin name '{candidate.name}' is claimed by {owners}; "
                        f"switch one off with '--no-plugin {token}'."
                    ),
                )
            else:
                self._load(candidate, record)
        for sentence in self.catalogue.conflicts():
            self._warn(sentence)

    def _is_off(self, candidate: Candidate) -> bool:
        switches = self.switches
        if any(candidate.is_named(token) for token in switches.off):
            return True
        if switches.only is None or candidate.origin in switches.extra or not candidate.distribution:
            return False
        return not any(candidate.is_named(token) for token in switches.only)

    def _load(self, candidate: Candidate, record: PluginRecord) -> None:
        start = time.perf_counter()
        module, registered = None, False
        try:
            module = candidate.load()
            _check_api(module)
            _check_marked(module)
            self._check_new(module, candidate.name)
            registered = True
            self._pm.register(module, name=candidate.name)
            record.hooks = tuple(sorted(c.name for c in self._pm.get_hookcallers(module) or ()))
            _check_hooks(record.hooks)
            self._collect(module, record)
        except (Exception, SystemExit) as error:
            if registered:
                if self._pm.is_registered(module):
                    self._pm.unregister(module)
                self.catalogue.remove_plugin(record.name)
            self._fail(record, error)
        finally:
            record.seconds = time.perf_counter() - start

    def _check_new(self, module: ModuleType, name: str) -> None:
        known = self._pm.get_name(module)
        if known is not None:
            raise PluginError(
                f"Its module '{module.__name__}' is already loaded as plugin '{known}'; ask for it by that name alone."
            )
        if self._pm.has_plugin(name):
            raise PluginError(f"Another plugin is called '{name}'; rename this one, or switch off '{name}'.")

    def _collect(self, module: ModuleType, record: PluginRecord) -> None:
        names: list[tuple[str, str]] = []

        def sink(item: Any) -> None:
            self.catalogue.add(item)
            names.append((getattr(item, "kind", "recipe"), getattr(item, "alias", item.name)))
            record.names = tuple(names)

        for hook in record.hooks:
            if hook == "register_recipes":
                self._call_one(module, hook, register=RecipeRegistrar(record.name, record.distribution, sink))
            elif hook in REGISTRATION_HOOKS:
                kind = REGISTRATION_HOOKS[hook]
                self._call_one(module, hook, register=Registrar(kind, record.name, record.distribution, sink))

    def _call_one(self, module: ModuleType, hook: str, **arguments: Any) -> None:
        others = [plugin for plugin in self._pm.get_plugins() if plugin is not module]
        self._pm.subset_hook_caller(hook, remove_plugins=others)(**arguments)

    def _fail(self, record: PluginRecord, error: BaseException, what: str = "is left out") -> None:
        record.status = "failed"
        text = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        record.error = " ".join(text.split())
        record.traceback = "".join(traceback.format_exception(error))
        if self.switches.strict:
            raise PluginError(f"Plugin '{record.name}' failed: {record.error}\n{record.traceback}") from error
        self._warn(f"Plugin '{record.name}' {what}: {record.error} 'underpaint plugins show {record.name}' tells more.")

    def _warn(self, sentence: str) -> None:
        if self.switches.strict:
            raise PluginError(sentence)
        warnings.warn(sentence, PluginWarning, stacklevel=2)

    # -- using

    def call(self, hook: str, **arguments: Any) -> None:
        """Call a lifecycle hook of every plugin.

        One that raises gets no more calls, with a warning; its components stay, since they may be in use.
        """
        assert hook in HOOKS
        assert not hook.startswith("register_")
        for record in self.records:
            if record.status != "active" or hook not in record.hooks:
                continue
            module = self._pm.get_plugin(record.name)
            assert module is not None
            try:
                self._call_one(module, hook, **arguments)
            except (Exception, SystemExit) as error:
                self._fail(record, error, f"failed in {hook} and gets no more calls")

    def record(self, name: str) -> PluginRecord:
        """Return the record of a plugin.

        Raises:
            NotFoundError: There is no plugin of that name.
        """
        found = [record for record in self.records if record.name == name]
        if not found:
            raise NotFoundError(
                f"There is no plugin '{name}'. {suggest(name, (r.name for r in self.records))} "
                "'underpaint plugins list' shows all."
            )
        return min(found, key=lambda record: record.status != "active")

    def require(self, name: str) -> PluginRecord:
        """Return the record of a plugin that a config asks for, loading a file or dotted module if it is one.

        Args:
            name: Name of an installed plugin, ``.py`` file or dotted module.

        Raises:
            NotFoundError: It is not installed.
            PluginError: It failed, with its own traceback, or is switched off.
        """
        known = any(record.name == name for record in self.records)
        record = self.record(name) if known or not _is_importable(name) else self._extra(name)
        if record.status == "failed":
            raise PluginError(f"The config asks for plugin '{name}', which failed: {record.error}\n{record.traceback}")
        if record.status == "off":
            raise PluginError(
                f"The config asks for plugin '{name}', which is switched off; remove it from --no-plugin."
            )
        return record

    def _extra(self, text: str) -> PluginRecord:
        candidate = extra_candidate(text)
        for record in self.records:
            if record.origin == candidate.origin and record.status != "off":
                return record
        self._load_all([candidate])
        return self.records[-1]

    def create(self, kind: str, name: str, /, **options: Any) -> Any:
        """Make a component; see `Catalogue.create`. A name that a failed plugin may own shows its error."""
        try:
            return self.catalogue.create(kind, name, **options)
        except NotFoundError as error:
            raise self.explain(name, error) from None

    def create_from_spec(self, spec: ComponentSpec, /, **override: Any) -> Any:
        """Make a component again; see `Catalogue.create_from_spec`. A plugin that failed or is off is named."""
        try:
            return self.catalogue.create_from_spec(spec, **override)
        except PluginError as error:
            for record in self.records:
                if record.name == spec.plugin and record.status != "active":
                    raise PluginError(
                        f"The {spec.kind} '{spec.name}' was made with plugin '{spec.plugin}', which {_state(record)}"
                    ) from error
            raise

    def explain(self, name: str, error: NotFoundError) -> NotFoundError | PluginError:
        """Say why a name is missing, when a plugin that failed or is off is the likely owner."""
        family = name.partition("@")[0].partition("/")[0]
        base = name.partition("@")[0]
        for record in self.records:
            if record.status == "active":
                continue
            owns = any(registered == base for _, registered in record.names)
            if owns or family in (record.name, record.name.removeprefix("underpaint_")):
                return PluginError(f"{error} Plugin '{record.name}', which may provide it, {_state(record)}")
        return error


_manager: PluginManager | None = None


def manager() -> PluginManager:
    """Return the plugins of this process, loaded at the first call from the environment's switches.

    Raises:
        PluginError: A switch names no plugin, or a file that does not exist.
    """
    global _manager
    if _manager is None:
        switches = Switches.from_environment()
        candidates = find_candidates(switches.extra)
        check_switches(switches, candidates)
        _manager = PluginManager(switches, candidates)
    return _manager


def reset_manager(new: PluginManager | None = None) -> None:
    """Replace the plugins of this process (tests, ``plugins check``); None loads them anew when next needed."""
    global _manager
    _manager = new


def _is_importable(name: str) -> bool:
    if name.endswith(".py"):
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _state(record: PluginRecord) -> str:
    if record.status == "off":
        return "is switched off."
    return f"failed: {record.error}\n{record.traceback}"


def _check_api(module: ModuleType) -> None:
    wanted = getattr(module, "underpaint_api", None)
    if wanted is None:
        return
    try:
        fits = SpecifierSet(wanted).contains(hookspecs.API_VERSION)
    except (InvalidSpecifier, TypeError):
        raise PluginError(f"underpaint_api is {wanted!r}, which is not a version range such as '>=1,<2'.") from None
    if not fits:
        raise PluginError(
            f"It needs plugin interface {wanted}, and this underpaint has {hookspecs.API_VERSION}; "
            "upgrade underpaint or install an older release of the plugin."
        )


def _check_marked(module: ModuleType) -> None:
    # Without the marker pluggy does not see the function, and the plugin would silently do nothing.
    for name in HOOKS:
        function = module.__dict__.get(name)
        if callable(function) and not hasattr(function, "underpaint_impl"):
            raise PluginError(f"The hook '{name}' is not marked; write @underpaint.hookimpl above it.")


def _check_hooks(hooks: Sequence[str]) -> None:
    for name in hooks:
        if name not in HOOKS:
            raise PluginError(f"There is no hook '{name}'. {suggest(name, HOOKS)}")


def _trace(name: str, implementations: Sequence[Any], arguments: Mapping[str, Any]) -> None:
    owners = ", ".join(implementation.plugin_name for implementation in implementations)
    print(f"hook {name} → {owners or 'nobody'}: {dict(arguments)}", file=sys.stderr)

"""The catalogue of registered names, and how a component is made from one."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from underpaint.config.structure import structure, unstructure
from underpaint.errors import ConfigError, NotFoundError, PluginError, suggest
from underpaint.registration.names import KINDS, Name, parse_name
from underpaint.registration.registrar import Alias, RecipeRegistration, Registration, load_target

if TYPE_CHECKING:
    from underpaint.interfaces.component import Component, ComponentSpec

__all__ = ["CONTEXT", "Catalogue", "Resolved"]

_Item = TypeVar("_Item", Registration, Alias, RecipeRegistration)

CONTEXT: Mapping[str, frozenset[str]] = {
    "encoder": frozenset(),
    "adapter": frozenset({"in_channels", "latent_channels"}),
    "decoder": frozenset({"latent_channels", "stride"}),
    "backbone": frozenset({"latent_channels", "grid", "pooled_dim", "token_dim"}),
    "conditioner": frozenset({"width", "classes"}),
    "loss": frozenset(),
    "metric": frozenset(),
    "dataset": frozenset(),
    "sampler": frozenset(),
    "tracker": frozenset({"folder", "run"}),
    "importer": frozenset(),
}
"""Keyword arguments beside the config that the framework works out and passes to a constructor, by kind."""


@attrs.frozen
class Resolved:
    """A name with its registration: enough to make the component, nothing imported yet."""

    registration: Registration
    name: Name


class Catalogue:
    """Registered components, aliases and recipes of all plugins."""

    def __init__(self) -> None:
        self._components: dict[tuple[str, str], list[Registration]] = {}
        self._aliases: dict[tuple[str, str], list[Alias]] = {}
        self._recipes: dict[str, list[RecipeRegistration]] = {}

    # -- filling

    def add(self, item: Registration | Alias | RecipeRegistration) -> None:
        """Add one record. A name taken twice is kept twice: it is an error when it is asked for."""
        if isinstance(item, Registration):
            self._components.setdefault((item.kind, item.name), []).append(item)
        elif isinstance(item, Alias):
            self._aliases.setdefault((item.kind, item.alias), []).append(item)
        else:
            self._recipes.setdefault(item.name, []).append(item)

    def remove_plugin(self, plugin: str) -> None:
        """Forget everything that a plugin registered."""
        for table in self._tables():
            for key in list(table):
                table[key] = [item for item in table[key] if item.plugin != plugin]
                if not table[key]:
                    del table[key]

    def _tables(self) -> list[dict[Any, list[Any]]]:
        return [self._components, self._aliases, self._recipes]

    # -- reading

    def registrations(self, kind: str | None = None) -> Iterator[Registration]:
        """Yield what is registered, in the order of kinds, then names."""
        order = {k: i for i, k in enumerate(KINDS)}
        for key in sorted(self._components, key=lambda k: (order[k[0]], k[1])):
            if kind in (None, key[0]):
                yield from self._components[key]

    def aliases(self, kind: str | None = None) -> Iterator[Alias]:
        """Yield the aliases, sorted."""
        for key in sorted(self._aliases):
            if kind in (None, key[0]):
                yield from self._aliases[key]

    def recipes(self) -> Iterator[RecipeRegistration]:
        """Yield the recipes, sorted by name."""
        for name in sorted(self._recipes):
            yield from self._recipes[name]

    def conflicts(self) -> list[str]:
        """Return a sentence for each name that more than one plugin claims."""
        found = []
        for table in self._tables():
            for key, items in table.items():
                try:
                    _only(items, f"recipe '{key}'" if isinstance(key, str) else f"{key[0]} '{key[1]}'")
                except PluginError as error:
                    found.append(str(error))
        found += [
            f"The {kind} '{name}' of plugin '{self._components[kind, name][0].plugin}' hides an alias of plugin "
            f"'{items[0].plugin}'; rename one of them."
            for (kind, name), items in self._aliases.items()
            if (kind, name) in self._components
        ]
        return sorted(found)

    def recipe(self, name: str) -> RecipeRegistration:
        """Return a shipped recipe.

        Raises:
            NotFoundError: No plugin ships it.
            PluginError: Several plugins ship one of that name.
        """
        if name not in self._recipes:
            raise NotFoundError(
                f"There is no recipe '{name}'. {suggest(name, self._recipes)} 'underpaint recipes list' shows all."
            )
        return _only(self._recipes[name], f"recipe '{name}'")

    def resolve(self, kind: str, text: str) -> Resolved:
        """Find the registration behind a name or alias.

        Raises:
            ConfigError: The kind or the text is malformed, it means a whole family, or weights are given where
                none are taken.
            NotFoundError: Nothing of that kind has the name.
            PluginError: Several distributions claim it.
        """
        if kind not in KINDS:
            raise ConfigError(f"There is no kind '{kind}'. {suggest(kind, KINDS)}")
        name = parse_name(text)
        if (kind, name.base) in self._aliases and (kind, name.base) not in self._components:
            full = parse_name(_only(self._aliases[kind, name.base], f"alias '{name.base}'").name)
            name = Name(full.base, full.weights if name.weights is None else name.weights)
        items = self._components.get((kind, name.base))
        if items is None and name.model:
            items = self._components.get((kind, f"{name.family}/*"))
        if items is None:
            raise NotFoundError(self._unknown(kind, text, name))
        registration = _only(items, f"{kind} '{items[0].name}'")
        if "*" in name.base:
            raise ConfigError(
                f"'{text}' stands for all models of a family; write one of them, such as "
                f"'{(registration.examples or (name.family + '/MODEL',))[0]}'."
            )
        if name.weights is not None and not registration.takes_weights:
            raise ConfigError(
                f"The {kind} '{name.base}' has no weights to choose; write '{name.base}' without '@{name.weights}'."
            )
        return Resolved(registration, name)

    def _unknown(self, kind: str, text: str, name: Name) -> str:
        known = {key[1] for key in self._components if key[0] == kind}
        known |= {key[1] for key in self._aliases if key[0] == kind}
        elsewhere = [k for k in KINDS if (k, name.base) in self._components]
        hint = f" There is {elsewhere[0]} of that name." if elsewhere else ""
        article = "an" if kind[0] in "aeiou" else "a"
        return (
            f"There is no {kind} '{text}'.{hint} {suggest(name.base, known)} "
            f"'underpaint plugins list {kind}' shows what is installed; {article} {kind} from another package appears "
            "there once its package is installed."
        )

    # -- making

    def config(self, kind: str, text: str, options: Mapping[str, Any], path: str = "") -> Any:
        """Check options against the config class of a name, without importing torch.

        Args:
            kind: Kind of the component.
            text: Its name.
            options: The user's options.
            path: Where they stand in the recipe, for error messages.

        Returns:
            The config object, or None when the component has no options.

        Raises:
            ConfigError: An option is unknown or of the wrong type.
            PluginError: The config class cannot be imported.
        """
        registration = self.resolve(kind, text).registration
        merged = {**registration.options, **options}
        if registration.config is None:
            if merged:
                raise ConfigError(
                    f"{path or text}: the {kind} '{text}' has no options; remove {', '.join(map(repr, merged))}."
                )
            return None
        return structure(merged, _load(registration, registration.config), path or f"{kind} '{text}'")

    def create(self, kind: str, text: str, /, **options: Any) -> Component:
        """Make a component from its name, its options and its context keywords.

        Args:
            kind: One of the eleven kinds.
            text: Registered name or alias, with ``@weights`` where the component takes weights.
            **options: Fields of its config, and the context keywords of its kind (`CONTEXT`).

        Raises:
            UnderpaintError: The name or an option is wrong, or what it needs is not installed.
        """
        resolved = self.resolve(kind, text)
        context = {key: options.pop(key) for key in list(options) if key in CONTEXT[kind]}
        return self._make(resolved, options, context, load=True)

    def create_from_spec(self, spec: ComponentSpec, /, **override: Any) -> Component:
        """Make a component again from its saved spec, to load a state dict into.

        A component that takes weights is told not to load them: its saved state replaces them, and nothing is
        downloaded. Its own `spec` is the saved one.

        Args:
            spec: The saved spec.
            **override: Options or context keywords in place of the saved ones.

        Raises:
            PluginError: The plugin that registered it is not installed.
            UnderpaintError: The saved options do not fit the installed version of the component.
        """
        try:
            resolved = self.resolve(spec.kind, spec.name)
        except NotFoundError as error:
            raise PluginError(_not_installed(spec, error)) from error
        # JSON has no tuples, and context keywords are passed on as they are.
        saved = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.context.items()}
        changed = {key: value for key, value in override.items() if key in CONTEXT[spec.kind]}
        options = {**spec.options, **{key: value for key, value in override.items() if key not in changed}}
        return self._make(resolved, options, {**saved, **changed}, load=False)

    def _make(
        self, resolved: Resolved, options: Mapping[str, Any], context: Mapping[str, Any], *, load: bool
    ) -> Component:
        from underpaint.interfaces.component import ComponentSpec

        registration, name = resolved.registration, resolved.name
        kind = registration.kind
        config = self.config(kind, name.base, options)
        target = _load(registration, registration.target)
        keywords: dict[str, Any] = dict(context)
        if registration.is_family:
            keywords["model"] = name.model
        if registration.takes_weights:
            keywords |= {"weights": name.weights, "load": load}
        arguments = () if config is None else (config,)
        _check_call(registration, target, arguments, keywords)
        try:
            component = target(*arguments, **keywords)
        except ImportError as error:
            raise PluginError(_missing(registration, error)) from error
        interface = getattr(importlib.import_module(f"underpaint.interfaces.{kind}"), kind.capitalize())
        if not isinstance(component, interface):
            raise PluginError(
                f"'{registration.target}' of plugin '{registration.plugin}' made a {type(component).__name__}, "
                f"which is no {kind}; derive it from underpaint.{kind.capitalize()}."
            )
        component.spec = ComponentSpec(
            kind=kind,
            name=str(name),
            options={} if config is None else unstructure(config),
            context={key: value for key, value in context.items() if kind != "tracker"},
            plugin=registration.plugin,
            distribution=registration.distribution,
        )
        return component  # type: ignore[no-any-return]


def _only(items: list[_Item], what: str) -> _Item:
    if len(items) == 1:
        return items[0]
    winners = [item for item in items if isinstance(item, Registration) and item.override]
    if len(winners) == 1:
        return winners[0]
    owners = " and ".join(f"'{item.plugin}' ({item.distribution})" for item in items)
    raise PluginError(
        f"The {what} is registered by {owners}; switch one off with '--no-plugin {items[-1].plugin}', or let one "
        "of them register it with override=True."
    )


def _missing(registration: Registration, error: ImportError) -> str:
    distribution = registration.distribution.partition(" ")[0] or "the plugin's package"
    if registration.extra:
        how = f"pip install '{distribution}[{registration.extra}]'"
    else:
        how = f"pip install --upgrade '{distribution}'"
    return (
        f"The {registration.kind} '{registration.name}' cannot be imported ({error}); install what it needs with: {how}"
    )


def _load(registration: Registration, target: str) -> Any:
    try:
        return load_target(target)
    except PluginError:
        raise
    except ImportError as error:
        raise PluginError(_missing(registration, error)) from error
    except Exception as error:
        raise PluginError(
            f"'{target}' of plugin '{registration.plugin}' cannot be imported, because of an error in it: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_call(
    registration: Registration, target: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]
) -> None:
    """Refuse a call that Python would refuse, and say whose mistake it is."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return
    missing = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty and name not in keywords
    ]
    if missing and set(missing) <= CONTEXT[registration.kind]:
        raise ConfigError(
            f"The {registration.kind} '{registration.name}' is made for its surroundings; "
            f"pass {', '.join(f'{name}=…' for name in missing)} as well."
        )
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        raise PluginError(
            f"'{registration.target}' of plugin '{registration.plugin}' cannot be called as underpaint does "
            f"({error}); its constructor must take "
            f"(self, {', '.join([*(['config'] if arguments else []), '*', *sorted(keywords)])})."
        ) from error


def _not_installed(spec: ComponentSpec, error: NotFoundError) -> str:
    if not spec.plugin:
        return str(error)
    package = spec.distribution.partition(" ")[0]
    if not package:
        return (
            f"The {spec.kind} '{spec.name}' was made with plugin '{spec.plugin}', which is not loaded; "
            f"load its file or module with '--plugin'."
        )
    return (
        f"The {spec.kind} '{spec.name}' was made with plugin '{spec.plugin}' of '{spec.distribution}', "
        f"which is not installed; pip install '{package}'"
    )

"""The catalogue of registered names, and how a component is made from one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from underpaint.config.structure import structure, unstructure
from underpaint.errors import ConfigError, NotFoundError, PluginError, suggest
from underpaint.registry.names import KINDS, Name, parse_name
from underpaint.registry.registrar import Alias, RecipeRegistration, Registration, load_target

if TYPE_CHECKING:
    from underpaint.interfaces.component import Component

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
        for table in (self._components, self._aliases, self._recipes):
            for key in list(table):
                kept = [item for item in table[key] if item.plugin != plugin]  # type: ignore[attr-defined]
                if kept:
                    table[key] = kept  # type: ignore[index]
                else:
                    del table[key]  # type: ignore[arg-type]

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
        for table in (self._components, self._aliases, self._recipes):
            for key, items in table.items():
                try:
                    _only(items, key if isinstance(key, str) else f"{key[0]} '{key[1]}'")  # type: ignore[arg-type]
                except PluginError as error:
                    found.append(str(error))
        return sorted(found)

    def recipe(self, name: str) -> RecipeRegistration:
        """Return a shipped recipe.

        Raises:
            NotFoundError: No plugin ships it.
            PluginError: Several plugins ship one of that name.
        """
        if name not in self._recipes:
            raise NotFoundError(
                f"There is no recipe '{name}'. {suggest(name, self._recipes)} "
                "'underpaint recipes list' shows all."
            )
        return _only(self._recipes[name], f"recipe '{name}'")

    def resolve(self, kind: str, text: str) -> Resolved:
        """Find the registration behind a name or alias.

        Raises:
            ConfigError: The kind or the text is malformed, or weights are given where none are taken.
            NotFoundError: Nothing of that kind has the name.
            PluginError: Several distributions claim it.
        """
        if kind not in KINDS:
            raise ConfigError(f"There is no kind '{kind}'. {suggest(kind, KINDS)}")
        name = parse_name(text)
        if (kind, name.base) in self._aliases:
            full = parse_name(_only(self._aliases[kind, name.base], f"alias '{name.base}'").name)
            name = Name(full.base, full.weights if name.weights is None else name.weights)
        items = self._components.get((kind, name.base))
        if items is None and name.model:
            items = self._components.get((kind, f"{name.family}/*"))
        if items is None:
            raise NotFoundError(self._unknown(kind, text, name))
        registration = _only(items, f"{kind} '{registration_name(items)}'")
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
            f"'underpaint plugins list' shows what is installed; {article} {kind} from another package appears there "
            "once its package is installed."
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
        """
        registration = self.resolve(kind, text).registration
        merged = {**registration.options, **options}
        if registration.config is None:
            if merged:
                raise ConfigError(
                    f"{path or text}: the {kind} '{text}' has no options; remove {', '.join(map(repr, merged))}."
                )
            return None
        return structure(merged, load_target(registration.config), path or f"{kind} '{text}'")

    def create(self, kind: str, text: str, **options: Any) -> Component:
        """Make a component from its name, its options and its context keywords.

        Args:
            kind: One of the ten kinds.
            text: Registered name or alias, with ``@weights`` where the component takes weights.
            **options: Fields of its config, and the context keywords of its kind (`CONTEXT`).

        Raises:
            UnderpaintError: The name or an option is wrong, or what it needs is not installed.
        """
        from underpaint.interfaces.component import Component, ComponentSpec

        resolved = self.resolve(kind, text)
        registration, name = resolved.registration, resolved.name
        context = {key: options.pop(key) for key in list(options) if key in CONTEXT[kind]}
        config = self.config(kind, text, options)
        arguments: dict[str, Any] = dict(context)
        if registration.is_family:
            arguments["model"] = name.model
        if registration.takes_weights:
            arguments["weights"] = name.weights
        try:
            target = load_target(registration.target)
            component = target(**arguments) if config is None else target(config, **arguments)
        except ImportError as error:
            raise PluginError(_missing(registration, error)) from error
        if not isinstance(component, Component):
            raise PluginError(
                f"'{registration.target}' of plugin '{registration.plugin}' made a {type(component).__name__}, "
                f"which is not an underpaint component; derive it from underpaint.{kind.capitalize()}."
            )
        component.spec = ComponentSpec(
            kind=kind,
            name=str(name),
            options={} if config is None else unstructure(config),
            context={key: value for key, value in context.items() if kind != "tracker"},
            plugin=registration.plugin,
            distribution=registration.distribution,
        )
        return component


def registration_name(items: list[Registration]) -> str:
    """Return the registered name that a list of rivals shares."""
    return items[0].name


def _only(items: list[_Item], what: str) -> _Item:
    if len(items) == 1:
        return items[0]
    winners = [item for item in items if isinstance(item, Registration) and item.override]
    if len(winners) == 1:
        return winners[0]
    owners = " and ".join(f"'{item.plugin}' ({item.distribution})" for item in items)
    raise PluginError(
        f"The {what} is registered by {owners}; switch one off with '--no-plugin {items[-1].plugin}', or let one of them "
        "register it with override=True."
    )


def _missing(registration: Registration, error: ImportError) -> str:
    distribution = registration.distribution.partition(" ")[0] or "the plugin's package"
    if registration.extra:
        how = f"pip install '{distribution}[{registration.extra}]'"
    else:
        how = f"pip install --upgrade '{distribution}'"
    return (
        f"The {registration.kind} '{registration.name}' cannot be imported ({error}); "
        f"install what it needs with: {how}"
    )

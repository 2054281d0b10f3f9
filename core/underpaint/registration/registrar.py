"""The callables that registration hooks receive, and the records they leave."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from underpaint.errors import PluginError
from underpaint.registration.names import KINDS, parse_name

__all__ = ["Alias", "RecipeRegistrar", "RecipeRegistration", "Registrar", "Registration", "load_target"]


@attrs.frozen(kw_only=True)
class Registration:
    """One registered name. Holds strings only: nothing is imported to make it.

    Attributes:
        kind: One of the eleven kinds.
        name: Registered name without weights; ``family/*`` serves every model of a family.
        target: Class as ``"package.module:Class"``.
        config: attrs class of its options as ``"package.module:Class"``, in a module that imports no
            torch; None when it has no options.
        options: Options preset by this name; the user's own win.
        takes_weights: Whether the name may carry ``@weights``. The target then takes the keywords ``weights`` (what
            follows ``@``, or None) and ``load``; with ``load=False`` it is built for those weights without reading
            them, because a saved state follows.
        models: ``"package.module:function"`` that lists the models of a family; it may import the library.
        examples: Names for tests that stand for a family.
        tiny: Options that make it small enough for a conformance test on a CPU.
        context: Context keywords for a conformance test, where the kit's own do not fit.
        extra: pip extra of the registering distribution that it needs.
        summary: One line for listings.
        licence: Licence of the weights, where one answer fits all.
        source: Where the weights or the method come from.
        expected_failures: Conformance checks that fail by nature, each with its reason.
        override: Wins over a registration of the same name that does not claim this.
        plugin: Name of the plugin.
        distribution: Distribution of the plugin with its version.
    """

    kind: str
    name: str
    target: str
    config: str | None = None
    options: Mapping[str, Any] = attrs.field(factory=dict)
    takes_weights: bool = False
    models: str | None = None
    examples: tuple[str, ...] = ()
    tiny: Mapping[str, Any] = attrs.field(factory=dict)
    context: Mapping[str, Any] = attrs.field(factory=dict)
    extra: str | None = None
    summary: str = ""
    licence: str = ""
    source: str = ""
    expected_failures: Mapping[str, str] = attrs.field(factory=dict)
    override: bool = False
    plugin: str = ""
    distribution: str = ""

    @property
    def is_family(self) -> bool:
        """Whether the name is ``family/*``."""
        return self.name.endswith("/*")


@attrs.frozen(kw_only=True)
class Alias:
    """A short name for a full one."""

    kind: str
    alias: str
    name: str
    plugin: str
    distribution: str


@attrs.frozen(kw_only=True)
class RecipeRegistration:
    """A recipe that a plugin ships."""

    name: str
    path: Path
    plugin: str
    distribution: str

    def about(self) -> str:
        """Return what the file says under ``about``; nothing where it says nothing or is not there."""
        # Parsing the YAML of every recipe would cost more than the rest of the discovery.
        with contextlib.suppress(OSError), self.path.open(encoding="utf-8") as file:
            for line in file:
                key, _, text = line.partition(":")
                if key == "about":
                    return text.strip().strip("\"'")
        return ""


class Registrar:
    """Collects the components of one kind from one plugin.

    Registration hooks receive it as ``register``. It is called once per name.
    """

    def __init__(self, kind: str, plugin: str, distribution: str, sink: Callable[[Registration | Alias], None]) -> None:
        assert kind in KINDS
        self._kind = kind
        self._plugin = plugin
        self._distribution = distribution
        self._sink = sink

    def __call__(
        self,
        name: str,
        target: str,
        *,
        config: str | None = None,
        options: Mapping[str, Any] | None = None,
        takes_weights: bool = False,
        models: str | None = None,
        examples: Sequence[str] = (),
        tiny: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        extra: str | None = None,
        summary: str = "",
        licence: str = "",
        source: str = "",
        expected_failures: Mapping[str, str] | None = None,
        override: bool = False,
    ) -> None:
        """Register one component; see `Registration` for the arguments.

        Raises:
            PluginError: The name, target or config is not of the form it must have.
        """
        parsed = parse_name(name)
        if parsed.weights is not None:
            raise PluginError(
                f"'{name}' is registered with weights; register '{parsed.base}' and pass takes_weights=True."
            )
        if "*" in name and not (parsed.model == "*" and "*" not in parsed.family):
            raise PluginError(f"'{name}' is no name; a family is registered as '{parsed.family}/*'.")
        if isinstance(examples, str):
            raise PluginError(f"The examples of '{name}' are a text; write examples=('{examples}',).")
        if parsed.model == "*" and not examples:
            raise PluginError(f"'{name}' is a family without examples; name models of it for its conformance tests.")
        for label, value in (("target", target), ("config", config), ("models", models)):
            if value is not None and (value.count(":") != 1 or not all(value.split(":"))):
                raise PluginError(f"The {label} of '{name}' is '{value}'; it must look like 'package.module:Name'.")
        self._sink(
            Registration(
                kind=self._kind,
                name=name,
                target=target,
                config=config,
                options=dict(options or {}),
                takes_weights=takes_weights,
                models=models,
                examples=tuple(examples),
                tiny=dict(tiny or {}),
                context=dict(context or {}),
                extra=extra,
                summary=summary,
                licence=licence,
                source=source,
                expected_failures=dict(expected_failures or {}),
                override=override,
                plugin=self._plugin,
                distribution=self._distribution,
            )
        )

    def alias(self, alias: str, name: str) -> None:
        """Register a short name for a full one, weights included."""
        parse_name(alias)
        parse_name(name)
        self._sink(Alias(kind=self._kind, alias=alias, name=name, plugin=self._plugin, distribution=self._distribution))


class RecipeRegistrar:
    """Collects the recipes of one plugin. Recipe hooks receive it as ``register``."""

    def __init__(self, plugin: str, distribution: str, sink: Callable[[RecipeRegistration], None]) -> None:
        self._plugin = plugin
        self._distribution = distribution
        self._sink = sink

    def __call__(self, name: str, path: str | Path) -> None:
        """Register the YAML file at `path` under `name`."""
        self._sink(RecipeRegistration(name=name, path=Path(path), plugin=self._plugin, distribution=self._distribution))

    def folder(self, path: str | Path) -> None:
        """Register every YAML file of a folder under its own name."""
        for file in sorted(Path(path).glob("*.yaml")):
            self(file.stem, file)


def load_target(target: str) -> Any:
    """Import ``"package.module:Name"``.

    Raises:
        PluginError: The module has no such name. Import errors pass through.
    """
    module_name, _, attribute = target.partition(":")
    module = importlib.import_module(module_name)
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise PluginError(f"Module '{module_name}' has no '{attribute}', which a plugin registered.") from None

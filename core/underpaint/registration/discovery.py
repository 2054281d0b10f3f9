"""Where plugins are found: entry points of installed packages, single files, dotted modules."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import attrs

from underpaint.errors import PluginError, suggest

__all__ = ["GROUP", "Candidate", "Switches", "check_switches", "extra_candidate", "find_candidates"]

GROUP = "underpaint"
"""Entry-point group; the name of an entry point is the name of the plugin."""


@attrs.frozen(kw_only=True)
class Candidate:
    """A plugin that may be loaded.

    Attributes:
        name: Its name.
        origin: Entry-point value, file path or module name.
        distribution: Name and version of the distribution, or an empty string.
        load: Imports it.
    """

    name: str
    origin: str
    distribution: str
    load: Callable[[], ModuleType]

    def is_named(self, token: str) -> bool:
        """Whether a switch means this one: by ``name`` or ``name@distribution``."""
        return token in (self.name, f"{self.name}@{self.distribution.partition(' ')[0]}")


@attrs.frozen(kw_only=True)
class Switches:
    """Which plugins to load.

    Attributes:
        only: Allow-list of names; None loads all, an empty one none.
        off: Names not to load.
        extra: Files (``*.py``) and dotted modules to load as plugins.
        strict: Make any failure fatal.
    """

    only: tuple[str, ...] | None = None
    off: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    strict: bool = False

    @classmethod
    def from_environment(cls) -> Switches:
        """Read the environment variables that the command line sets too, so that worker processes agree.

        ``UNDERPAINT_PLUGINS`` (allow-list), ``UNDERPAINT_NO_PLUGINS`` (off), ``UNDERPAINT_LOAD_PLUGINS``
        (files and modules), all separated by commas; ``UNDERPAINT_STRICT_PLUGINS=1``.
        """
        only = os.environ.get("UNDERPAINT_PLUGINS")
        return cls(
            only=None if only is None else _split(only),
            off=_split(os.environ.get("UNDERPAINT_NO_PLUGINS", "")),
            extra=_split(os.environ.get("UNDERPAINT_LOAD_PLUGINS", "")),
            strict=os.environ.get("UNDERPAINT_STRICT_PLUGINS", "") not in ("", "0"),
        )


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def find_candidates(extra: Iterable[str] = ()) -> list[Candidate]:
    """List the plugins of installed distributions, sorted by name, then the extra files and modules.

    Raises:
        PluginError: An extra file does not exist.
    """
    found = []
    for point in importlib.metadata.entry_points(group=GROUP):
        dist = point.dist
        found.append(
            Candidate(
                name=point.name,
                origin=point.value,
                distribution=f"{dist.name} {dist.version}" if dist is not None else "",
                load=point.load,
            )
        )
    unique = {(c.name, c.origin, c.distribution): c for c in found}
    found = sorted(unique.values(), key=lambda c: (c.name, c.distribution))
    return found + [extra_candidate(text) for text in dict.fromkeys(extra)]


def check_switches(switches: Switches, candidates: Sequence[Candidate]) -> None:
    """Refuse switches that mean no plugin at all.

    Raises:
        PluginError: The message names the switch, and the plugin that was probably meant.
    """
    for where, tokens in (
        ("--no-plugin (UNDERPAINT_NO_PLUGINS)", switches.off),
        ("--only-plugins (UNDERPAINT_PLUGINS)", switches.only or ()),
    ):
        for token in tokens:
            if not any(candidate.is_named(token) for candidate in candidates):
                name = token.partition("@")[0]
                same = [f"{name}@{c.distribution.partition(' ')[0]}" for c in candidates if c.name == name]
                known = same or [candidate.name for candidate in candidates]
                raise PluginError(f"{where} names '{token}', and no plugin is called so. {suggest(token, known)}")


def extra_candidate(text: str) -> Candidate:
    """Return the plugin in a ``.py`` file or a dotted module.

    Raises:
        PluginError: The file does not exist.
    """
    if not text.endswith(".py"):
        return Candidate(name=text, origin=text, distribution="", load=lambda: importlib.import_module(text))
    path = Path(text).expanduser().resolve()
    if not path.is_file():
        raise PluginError(f"There is no plugin file '{text}'; give the path of a .py file or a dotted module name.")
    return Candidate(name=path.stem, origin=str(path), distribution="", load=lambda: _load_file(path))


def _load_file(path: Path) -> ModuleType:
    # A file's classes are addressed as "stem:Class", so it must be importable under its stem.
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    other = known is not None or importlib.util.find_spec(path.stem)
    if other and not (isinstance(other, ModuleSpec) and other.origin == str(path)):
        raise PluginError(f"The plugin file '{path}' would hide the module '{path.stem}'; rename the file.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module

"""Errors that a user can mend, and how a near name is suggested."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BrokenImageError",
    "ConfigError",
    "DataError",
    "NotFoundError",
    "PluginError",
    "RunLockedError",
    "UnderpaintError",
    "UnreachableError",
    "suggest",
]


class UnderpaintError(ValueError):
    """A mistake the user can mend.

    The message is one sentence in three parts: what was asked, what exists, what to type next. The
    command line prints it without a traceback and ends with exit code 2.
    """


class ConfigError(UnderpaintError):
    """A recipe, an override or a component option is wrong; the message names its path."""


class NotFoundError(UnderpaintError, LookupError):
    """A name, file or folder does not exist."""


class PluginError(UnderpaintError):
    """A plugin that was asked for is missing, broken or in conflict with another."""


class DataError(UnderpaintError):
    """A data source, latent cache, weights file or checkpoint cannot be used."""


class UnreachableError(DataError):
    """Weights are not on this machine, and where they are published cannot be reached or refuses."""


class BrokenImageError(DataError):
    """One sample cannot be decoded. Loaders count it, name it and go on, up to a limit.

    Args:
        key: Name of the sample within its data set.
        reason: Why it cannot be used, without the key.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class RunLockedError(UnderpaintError):
    """Another live process writes to the same run folder."""


def suggest(name: str, known: Iterable[str], *, limit: int = 12) -> str:
    """Say which of the known names was probably meant, else list them.

    Returns:
        A sentence that starts with a capital letter and ends with a full stop, or an empty string
        when nothing is known.
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return "Did you mean " + " or ".join(f"'{n}'" for n in near) + "?"
    if not names:
        return ""
    shown = ", ".join(f"'{n}'" for n in names[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"Known: {shown}{more}."

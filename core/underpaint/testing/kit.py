"""The list of checks, how one is run on a component, and what its result means."""

from __future__ import annotations

import importlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from underpaint.config.structure import unstructure
from underpaint.errors import ConfigError, PluginError, UnderpaintError, suggest
from underpaint.registration.catalogue import CONTEXT
from underpaint.registration.manager import PluginRecord, manager
from underpaint.registration.names import KINDS, parse_name
from underpaint.registration.registrar import Registration

__all__ = [
    "KIT_VERSION",
    "Case",
    "Check",
    "CheckResult",
    "NotApplicable",
    "Subject",
    "cases",
    "check",
    "check_component",
    "checks",
    "expect",
    "parametrize",
]

KIT_VERSION = "1.2"
"""Version of the list of checks. A minor version adds checks, a major one changes what a check demands."""

ANY = "*"
"""Key of `Registration.expected_failures` for what one machine may lack."""

DEFAULT_CONTEXT: Mapping[str, Mapping[str, Any]] = {
    "adapter": {"in_channels": (24, 40), "latent_channels": 8},
    "decoder": {"latent_channels": 8, "stride": 8},
    "backbone": {"latent_channels": 8, "grid": (4, 4), "pooled_dim": 12, "token_dim": 0},
    "conditioner": {"width": 16, "classes": 5},
    "tracker": {"run": "conformance"},
}
"""Context keywords that the kit gives to each kind."""


class NotApplicable(Exception):  # noqa: N818 - it says so and is no error
    """A check does not apply to what the component declares; the message is the declaration."""


def expect(condition: bool, message: str) -> None:
    """Fail the running check with `message` unless `condition` holds."""
    if not condition:
        raise AssertionError(message)


@attrs.frozen(kw_only=True)
class Subject:
    """A component under test: everything to make it, as often as a check wants.

    Attributes:
        kind: Its kind.
        name: Its name, weights included.
        options: Options to make it with.
        registration: What its plugin says about it.
        folder: An empty folder for the running check.
    """

    kind: str
    name: str
    options: Mapping[str, Any]
    registration: Registration
    folder: Path

    @property
    def context(self) -> dict[str, Any]:
        """The context keywords: the kit's, then those of the registration."""
        own = {k: v for k, v in self.registration.context.items() if k in CONTEXT[self.kind]}
        given = {**DEFAULT_CONTEXT.get(self.kind, {}), **own}
        if self.kind == "tracker":
            given.setdefault("folder", self.folder / "tracker")
        return given

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of images that the registration asks for, or None."""
        size = self.registration.context.get("size")
        return None if size is None else (int(size[0]), int(size[1]))

    @property
    def record(self) -> PluginRecord:
        """The plugin that registered it."""
        return manager().record(self.registration.plugin)

    def resolved_options(self) -> dict[str, Any]:
        """Return the options, with a real folder where they ask for one."""
        from underpaint.testing.files import PLACES, place

        return {
            key: place(value, self.folder) if isinstance(value, str) and value in PLACES else value
            for key, value in self.options.items()
        }

    def make(self, seed: int = 0, **context: Any) -> Any:
        """Make the component, in evaluation mode where it has modes.

        Args:
            seed: Seed of its random initialisation.
            **context: Context keywords to change.
        """
        import torch

        torch.manual_seed(seed)
        component = manager().create(self.kind, self.name, **{**self.resolved_options(), **self.context, **context})
        return component.eval() if isinstance(component, torch.nn.Module) else component


@attrs.frozen(kw_only=True)
class Check:
    """One demand on the components of a kind.

    Attributes:
        name: Its name, stable between versions.
        kind: Kind it applies to.
        since: Version of the kit that introduced it.
        description: What it demands, in one line.
        every_name: Whether it looks at what is registered under a name. The other checks look at the component
            that is made, and names that make equal ones share its outcome.
        function: Raises AssertionError when the demand is not met, `NotApplicable` when it does not apply.
    """

    name: str
    kind: str
    since: str
    description: str
    every_name: bool
    function: Callable[[Subject], None]


@attrs.frozen(kw_only=True)
class CheckResult:
    """What came of one check of one component.

    Attributes:
        component: ``kind:name``.
        check: Name of the check.
        status: ``passed``; ``failed``; ``expected`` for a declared failure; ``skipped`` where it does not apply.
        message: Why it failed or was skipped; empty when it passed.
        seconds: How long it took.
        ran_as: The name that ran, where it makes an equal component and ran before this one; None where this one ran.
        error: What was raised, for those who want the traceback.
    """

    component: str
    check: str
    status: Literal["passed", "failed", "expected", "skipped"]
    message: str
    seconds: float
    ran_as: str | None = None
    error: Exception | None = attrs.field(default=None, repr=False, eq=False)


_CHECKS: dict[str, list[Check]] = {kind: [] for kind in KINDS}
_MODULES = ("common", "modules", *KINDS)


def check(
    *kinds: str, since: str = "1.0", every_name: bool = False
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Add a function to the list of checks of some kinds; its name and docstring are the check's."""

    def add(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        assert function.__doc__
        for kind in kinds:
            _CHECKS[kind].append(
                Check(
                    name=function.__name__,
                    kind=kind,
                    since=since,
                    description=function.__doc__.partition("\n")[0].rstrip("."),
                    every_name=every_name,
                    function=function,
                )
            )
        return function

    return add


def checks(kind: str) -> tuple[Check, ...]:
    """Return the checks of a kind, in the order in which they run.

    Raises:
        ConfigError: There is no such kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"There is no kind '{kind}'. {suggest(kind, KINDS)}")
    for module in _MODULES:
        importlib.import_module(f"underpaint.testing.{module}")
    return tuple(_CHECKS[kind])


Outcomes = dict[tuple[str, str], tuple[str, Exception | None]]
"""The name that ran and what it raised, by check and `_component`."""


@attrs.frozen(kw_only=True)
class Case:
    """One check of one component; calling it is a test."""

    kind: str
    name: str
    check: Check
    options: Mapping[str, Any] | None = None
    _outcomes: Outcomes | None = attrs.field(default=None, repr=False, eq=False)

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}:{self.check.name}"

    def run(self) -> CheckResult:
        """Run the check and judge its outcome by what the registration declares.

        A case of `cases` takes the outcome of another name that makes an equal component and ran before it.
        """
        registration = manager().catalogue.resolve(self.kind, self.name).registration
        options = {**registration.tiny, **(self.options or {})}
        reason = registration.expected_failures.get(self.check.name)
        start = time.perf_counter()
        outcomes = {} if self._outcomes is None or self.check.every_name else self._outcomes
        key = (self.check.name, _component(registration, self.name, options))
        if key not in outcomes or outcomes[key][0] == self.name:
            outcomes[key] = self.name, self._try(registration, options)
        ran, error = outcomes[key]
        status, message = _judge(error, registration, self.check.name, reason)
        return CheckResult(
            component=f"{self.kind}:{self.name}",
            check=self.check.name,
            status=status,
            message=" ".join(message.split()),
            seconds=time.perf_counter() - start,
            ran_as=None if ran == self.name else ran,
            error=error,
        )

    def _try(self, registration: Registration, options: Mapping[str, Any]) -> Exception | None:
        import torch

        with tempfile.TemporaryDirectory(prefix="underpaint-check-") as folder, torch.random.fork_rng(devices=[]):
            subject = Subject(
                kind=self.kind, name=self.name, options=options, registration=registration, folder=Path(folder)
            )
            try:
                self.check.function(subject)
            except NotApplicable as raised:
                # Without its traceback, which would keep the component alive as long as the outcome.
                return raised.with_traceback(None)
            except Exception as raised:
                return raised
        return None

    def __call__(self) -> None:
        """Run the check as a pytest test: fail, skip or expect the failure as its result says."""
        import pytest

        result = self.run()
        if result.status == "failed":
            plugin = manager().catalogue.resolve(self.kind, self.name).registration.plugin
            raise AssertionError(f"{self} of plugin '{plugin}': {result.message}") from result.error
        if result.status == "skipped":
            pytest.skip(result.message)
        if result.status == "expected":
            pytest.xfail(result.message)


def _component(registration: Registration, name: str, options: Mapping[str, Any]) -> str:
    """Return all that decides what a name makes; names for which it is equal make equal components.

    A class is told its config and its context, the weights, and the model of a family, but not its name.
    """
    parsed = parse_name(name)
    try:
        config = manager().catalogue.config(registration.kind, name, options)
    except UnderpaintError:
        return name
    told = {
        "kind": registration.kind,
        "plugin": registration.plugin,
        "target": registration.target,
        "config": None if config is None else unstructure(config),
        "context": registration.context,
        "model": parsed.model if registration.is_family else None,
        "weights": parsed.weights,
    }
    return json.dumps(told, sort_keys=True, default=repr)


def _judge(
    error: Exception | None, registration: Registration, name: str, reason: str | None
) -> tuple[Literal["passed", "failed", "expected", "skipped"], str]:
    if isinstance(error, NotApplicable) and reason is None:
        return "skipped", str(error)
    if error is None or isinstance(error, NotApplicable):
        if reason is None:
            return "passed", ""
        return "failed", f"It is declared to fail ({reason}), and does not; remove it from expected_failures."
    if reason is not None:
        return "expected", reason
    if ANY in registration.expected_failures:
        return "expected", registration.expected_failures[ANY]
    if registration.extra and isinstance(error, PluginError) and isinstance(error.__cause__, ImportError):
        return "skipped", f"It needs the extra '{registration.extra}', which is not installed."
    text = str(error) or "no message"
    return "failed", text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


def _names(registration: Registration) -> Iterator[str]:
    """Yield the names that stand for a registration, with random weights where they take any."""
    names = registration.examples or (() if registration.is_family else (registration.name,))
    for name in names:
        random = registration.takes_weights and parse_name(name).weights is None
        yield f"{name}@random" if random else name


def cases(kind: str | None = None, plugin: str | None = None) -> list[Case]:
    """Return every check of every registered component.

    Names that make equal components, such as sizes of one network whose ``tiny`` options are equal, run a check of
    the component once between them, and each is judged by what it declares. Checks of what is registered run for
    every name.

    Args:
        kind: Only components of this kind.
        plugin: Only components of this plugin.

    Raises:
        NotFoundError: There is no such plugin.
        PluginError: The plugin failed or is switched off.
    """
    if plugin is not None:
        manager().require(plugin)
    outcomes: Outcomes = {}
    return [
        Case(kind=registration.kind, name=name, check=item, outcomes=outcomes)
        for registration in manager().catalogue.registrations(kind)
        if plugin in (None, registration.plugin)
        for name in _names(registration)
        for item in checks(registration.kind)
    ]


def check_component(kind: str, name: str, options: Mapping[str, Any] | None = None) -> list[CheckResult]:
    """Run all checks of a kind on one component.

    Args:
        kind: Kind of the component.
        name: Its name; weights are random unless it says otherwise.
        options: Options beside those that its registration calls ``tiny``.

    Raises:
        UnderpaintError: There is no such component.
    """
    resolved = manager().catalogue.resolve(kind, name)
    if resolved.name.weights is None and resolved.registration.takes_weights:
        name = f"{resolved.name.base}@random"
    return [Case(kind=kind, name=name, check=item, options=options).run() for item in checks(kind)]


def parametrize(kind: str | None = None, plugin: str | None = None) -> Any:
    """Return a pytest decorator that gives a test the argument ``case`` once for every check of every component.

    Args:
        kind: Only components of this kind.
        plugin: Only components of this plugin.

    Raises:
        UnderpaintError: There is no such plugin, or it cannot be loaded.
    """
    import pytest

    return pytest.mark.parametrize("case", cases(kind, plugin), ids=str)

"""Writes a new plugin package whose tests pass as it is."""

from __future__ import annotations

import importlib.util
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from underpaint.errors import ConfigError, suggest
from underpaint.registration.discovery import find_candidates
from underpaint.registration.names import KINDS

__all__ = ["write_skeleton"]

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@attrs.frozen
class _Example:
    """What the skeleton of a kind holds: one small component that really works."""

    model: str
    cls: str
    summary: str
    tiny: Mapping[str, Any] = attrs.field(factory=dict)
    has_config: bool = True


_EXAMPLES = {
    "encoder": _Example("conv", "Conv", "A small convolutional encoder", {"width": 16, "patch": 8}),
    "adapter": _Example("linear", "Linear", "A linear adapter of all feature maps"),
    "decoder": _Example("conv", "Conv", "A small convolutional decoder", {"width": 16}),
    "backbone": _Example("conv", "Conv", "A small convolutional backbone", {"width": 16, "depth": 2}),
    "conditioner": _Example("table", "Table", "A learned vector for each class", has_config=False),
    "loss": _Example("charbonnier", "Charbonnier", "A smooth absolute error of the pixels"),
    "metric": _Example("mae", "MeanAbsoluteError", "The mean absolute error of the pixels", has_config=False),
    "dataset": _Example("gradients", "Gradients", "Colour gradients, computed when read", {"count": 20, "size": 16}),
    "sampler": _Example("midpoint", "Midpoint", "The midpoint method for the flow", {"steps": 8}),
    "tracker": _Example("csv", "Csv", "Scalars as CSV, pictures as PNG", has_config=False),
    "importer": _Example("flat", "Flat", "Tokenizers of one flat weights file"),
}


def write_skeleton(name: str, kind: str, out: Path) -> Path:
    """Write the package ``underpaint-NAME`` with one component.

    A name that is taken is not used again: the one package would hide the other wherever both are installed.

    Args:
        name: Name of the plugin, with or without ``underpaint-``.
        kind: Kind of its component.
        out: Folder in which the package's own folder is made.

    Returns:
        The package's folder.

    Raises:
        ConfigError: The name or kind is not valid, the name is that of an installed plugin, or the folder exists.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    name = name.removeprefix("underpaint-")
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"'{name}' is no name for a plugin; use lower-case letters and digits, with '-' between words, such as "
            "'my-encoders'."
        )
    if kind not in KINDS:
        raise ConfigError(f"There is no kind '{kind}'. {suggest(kind, KINDS)}")
    _check_free(name)
    example = _EXAMPLES[kind]
    values = {
        "name": name,
        "kind": kind,
        "distribution": f"underpaint-{name}",
        "module": f"underpaint_{name.replace('-', '_')}",
        "component": f"{name}/{example.model}",
        "model": example.model,
        "class": example.cls,
        "summary": example.summary,
        "plural": "losses" if kind == "loss" else f"{kind}s",
        "has_config": example.has_config,
        "tiny": repr(dict(example.tiny)).replace("'", '"') if example.tiny else "",
    }
    module = values["module"]
    files = {
        "pyproject.toml": "pyproject.toml.j2",
        "README.md": "README.md.j2",
        f"{module}/__init__.py": "init.py.j2",
        f"{module}/{kind}.py": f"{kind}.py.j2",
        "tests/test_conformance.py": "test_conformance.py.j2",
    }
    if example.has_config:
        files[f"{module}/config.py"] = f"{kind}_config.py.j2"
    templates = Environment(
        loader=PackageLoader("underpaint.cli", "templates"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - Python and TOML files, no HTML
    )
    return _write(
        out / f"underpaint-{name}", {path: templates.get_template(t).render(values) for path, t in files.items()}
    )


def _check_free(name: str) -> None:
    module = f"underpaint_{name.replace('-', '_')}"
    taken = {name, name.replace("-", "_")}
    owner = next((c.distribution or c.origin for c in find_candidates() if c.name in taken or c.origin == module), "")
    if not owner and importlib.util.find_spec(module) is not None:
        owner = f"module {module}"
    if owner:
        raise ConfigError(f"'{name}' is the name of an installed plugin, from '{owner}'; choose another name.")


def _write(folder: Path, files: Mapping[str, str]) -> Path:
    if folder.exists():
        raise ConfigError(f"'{folder}' exists already; choose another name, or another place with '--out'.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Complete or not at all: the files are written beside the folder, which is then renamed into place.
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for path, text in files.items():
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            (temporary / path).write_text(text, encoding="utf-8")
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder

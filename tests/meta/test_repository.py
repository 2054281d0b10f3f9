"""Rules of the repository that no reviewer should have to remember."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import underpaint

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PLUGINS = sorted(path.name for path in (ROOT / "plugins").iterdir() if (path / "__init__.py").is_file())
MAX_LINES = 600

PUBLIC = [
    "API_VERSION",
    "Adapter",
    "AdversarialLoss",
    "Backbone",
    "BrokenImageError",
    "Component",
    "ComponentSpec",
    "Condition",
    "Conditioner",
    "ConfigError",
    "DataError",
    "Dataset",
    "Decoder",
    "Denoiser",
    "Encoder",
    "EncoderInfo",
    "Features",
    "FreshNoise",
    "GroupNorm",
    "Importer",
    "LatentStatistics",
    "Loss",
    "Metric",
    "NotFoundError",
    "PluginError",
    "Posterior",
    "Prediction",
    "RecipeRegistrar",
    "Reconstruction",
    "Registrar",
    "Sample",
    "Sampler",
    "StepSizes",
    "StepTensors",
    "Tokenizer",
    "Tracker",
    "UnderpaintError",
    "UnreachableError",
    "VarianceField",
    "VelocityField",
    "check_fit",
    "create",
    "ddpm_fractions",
    "decode_image",
    "hookimpl",
    "hub_file",
    "is_location",
    "load",
    "load_weights",
    "plugins",
    "registry",
    "short_side",
    "suggest",
    "swiglu_linear",
    "tensor_hash",
]
"""The public API. Whoever changes this list changes what third-party plugins rely on."""

# Paths of somebody's machine, and package indexes: neither means anything to a reader of the project.
FORBIDDEN = [
    re.compile(r"(?<![\w.~}*])/(work|root|home|tmp|Users)/"),
    re.compile(r"\bpypi\.\w+|python[h]osted|index[-_]url|registry\.\w+\.\w+/", re.IGNORECASE),
]


def run(*arguments: str) -> None:
    """Run a Python module in the root; fail with what it printed."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def repository_files() -> list[Path]:
    """Everything that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = sorted({ROOT / name for name in listed.split("\0") if name})
    assert ROOT / "pyproject.toml" in files
    return [path for path in files if path.is_file()]


def test_modules_are_short():
    found = [path for folder in ("core", "plugins", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert Path(__file__) in found
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in found}
    assert {name: size for name, size in sizes.items() if size > MAX_LINES} == {}


def test_nothing_of_a_machine_is_named():
    found = []
    for path in repository_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        where = path.relative_to(ROOT)
        found += [f"{where}:{n}: {line}" for n, line in enumerate(lines, 1) if any(p.search(line) for p in FORBIDDEN)]
    assert found == []


# Joined here, because written out they would be found in this file.
@pytest.mark.parametrize("parts", ["open('/|work/x')", "cd /|tmp/y", "https://pypi|.example/x", "--index|-url=x"])
def test_the_check_for_machine_names_can_fail(parts):
    assert any(pattern.search(parts.replace("|", "")) for pattern in FORBIDDEN)


@pytest.mark.slow
def test_layers_are_kept():
    run("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache")


def test_ruff_is_content():
    run("-m", "ruff", "check", "--no-cache", "--output-format=concise", ".")


def test_code_is_formatted():
    run("-m", "ruff", "format", "--check", "--no-cache", ".")


@pytest.mark.slow
def test_types_are_strict(tmp_path):
    assert PYPROJECT["tool"]["mypy"]["strict"] is True
    run("-m", "mypy", "--cache-dir", str(tmp_path))


def test_every_plugin_is_in_every_list():
    # A plugin missing from one of these lists would be unchecked, or not installed at all.
    assert sorted(PYPROJECT["project"]["entry-points"]["underpaint"].values()) == PLUGINS
    tools = PYPROJECT["tool"]
    assert sorted(tools["mypy"]["packages"]) == ["underpaint", *PLUGINS]
    assert sorted(tools["importlinter"]["root_packages"]) == ["underpaint", *PLUGINS]
    contracts = {contract["name"]: contract for contract in tools["importlinter"]["contracts"]}
    assert sorted(contracts["The core imports no plugin"]["forbidden_modules"]) == PLUGINS
    assert sorted(contracts["Plugins import nothing of the core but its public names"]["source_modules"]) == PLUGINS
    assert sorted(contracts["No plugin imports another"]["modules"]) == PLUGINS
    for name in PLUGINS:
        assert (ROOT / "plugins" / name / "py.typed").is_file()


def test_the_public_names_are_these():
    assert underpaint.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_importable_and_documented(name):
    value = getattr(underpaint, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        # An inherited docstring describes another thing.
        assert vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        assert value.__module__.startswith("underpaint.")


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = underpaint.Nothing


IMPORTS = """
import importlib, sys
import underpaint, underpaint.api
from underpaint.registration.discovery import Switches
from underpaint.registration.manager import PluginManager
from underpaint.registration.registrar import load_target

def check(after):
    heavy = {"torch", "numpy", "timm", "open_clip", "deepspeed", "cleanfid"} & set(sys.modules)
    assert not heavy, f"{after} imports {sorted(heavy)}"

check("underpaint")
for name in sys.argv[1].split(","):
    importlib.import_module(name)
    check(name)
manager = PluginManager(Switches(only=tuple(sys.argv[2].split(",")), strict=True))
assert all(record.status == "active" for record in manager.records if record.name in sys.argv[2].split(","))
for registration in manager.catalogue.registrations():
    if registration.config is not None:
        load_target(registration.config)
        check(registration.config)
"""


def test_plugins_and_their_configs_import_no_torch():
    names = PYPROJECT["project"]["entry-points"]["underpaint"]
    run("-c", IMPORTS, ",".join(PLUGINS), ",".join(names))

"""A real third-party package in a fresh environment: installed, found, checked, used, and uninstalled."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

PACKAGE = Path(__file__).parent / "underpaint-blocks"

SAVE = """
import json, attrs, torch, underpaint
torch.manual_seed(0)
encoder = underpaint.create("encoder", "blocks/conv", width=8)
print(json.dumps(attrs.asdict(encoder.spec)))
"""

LOAD = """
import json, sys
from underpaint import ComponentSpec, PluginError
from underpaint.registration.manager import manager
try:
    encoder = manager().create_from_spec(ComponentSpec(**json.loads(sys.argv[1])))
    print(encoder.info.channels)
except PluginError as error:
    print(error)
"""


RECIPE = {
    "name": "blocks",
    "data": {"train": {"name": "scenes/shapes", "length": 40, "size": 32}, "size": 32, "workers": 0, "holdout": 0.2},
    "tokenizer": {
        "encoder": {"name": "blocks/conv", "width": 8},
        "adapter": "aligntok/mlp",
        "decoder": {"name": "ldm/decoder", "base": 8, "blocks": 1, "multipliers": [1, 1, 1, 2]},
        "latent_channels": 4,
    },
    "stages": [{"name": "align", "trains": ["adapter", "decoder"], "losses": ["l1"], "steps": 2, "batch": 8}],
    "evaluation": {"images": 4, "batch": 4, "show": 4, "reconstruction": ["psnr", "mae"]},
    "engine": {"device": "cpu"},
}


class Environment:
    """A virtual environment that also sees every package of the current one."""

    def __init__(self, folder: Path, package: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.folder, self.package = folder, package
        self.python = folder / "bin" / "python"
        site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        current = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
        lines = [f"import site; site.addsitedir({path!r})" for path in current]
        site.mkdir(parents=True, exist_ok=True)
        (site / "_current_environment.pth").write_text("\n".join(lines) + "\n")

    def run(self, *arguments: str, status: int = 0) -> str:
        hidden = ("PYTHONPATH", "UNDERPAINT_PLUGINS", "UNDERPAINT_NO_PLUGINS", "UNDERPAINT_LOAD_PLUGINS")
        done = subprocess.run(
            [str(self.python), *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={k: v for k, v in os.environ.items() if k not in hidden},
            timeout=300,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def underpaint(self, *arguments: str, status: int = 0) -> str:
        return self.run("-c", "from underpaint.cli.main import run; run()", *arguments, status=status)

    def install(self) -> None:
        self.run("-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "-q", str(self.package))

    def uninstall(self) -> None:
        self.run("-m", "pip", "uninstall", "-q", "-y", "underpaint-blocks")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    root = tmp_path_factory.mktemp("third_party")
    # Building leaves files beside the sources, so a copy is installed.
    copy = root / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    return Environment(root / "environment", copy)


def _names(environment: Environment) -> dict[str, dict[str, object]]:
    return {
        plugin["name"]: plugin for plugin in json.loads(environment.underpaint("plugins", "list", "--json"))["plugins"]
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the fresh environment is made in the POSIX layout")
def test_life_of_a_plugin(environment: Environment) -> None:
    assert "blocks" not in _names(environment)

    environment.install()
    found = _names(environment)["blocks"]
    assert (found["status"], found["distribution"], found["version"]) == ("active", "underpaint-blocks", "0.1.0")
    assert found["names"] == {"encoder": 1, "metric": 1}
    assert _names(environment).keys() > {"blocks", "timm", "tiny"}

    outcome = json.loads(environment.underpaint("plugins", "check", "blocks", "--json"))
    assert outcome["passed"]
    assert {result["component"] for result in outcome["results"]} == {"encoder:blocks/conv", "metric:mae"}
    assert {result["status"] for result in outcome["results"]} <= {"passed", "skipped"}

    recipe = environment.folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    environment.underpaint("train", str(recipe), "--out", "run")
    numbers = json.loads((environment.folder / "run" / "report" / "numbers.json").read_text())
    assert "mae after align" in json.dumps(numbers)
    trained = 'import underpaint; print(underpaint.load("run").encoder.spec.name)'
    assert environment.run("-c", trained).strip() == "blocks/conv"

    spec = json.loads(environment.run("-c", SAVE))
    assert spec["plugin"] == "blocks"
    assert spec["distribution"] == "underpaint-blocks 0.1.0"
    assert environment.run("-c", LOAD, json.dumps(spec)).strip() == "(8,)"

    environment.uninstall()
    assert "blocks" not in _names(environment)
    refused = environment.underpaint("reconstruct", "run", "--data", "none", "--out", "x.png", status=2)
    assert refused == ""
    assert environment.run("-c", LOAD, json.dumps(spec)).strip() == (
        "The encoder 'blocks/conv' was made with plugin 'blocks' of 'underpaint-blocks 0.1.0', which is not "
        "installed; pip install 'underpaint-blocks'"
    )

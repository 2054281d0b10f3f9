"""``underpaint plugins``: list, show, check and new."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from underpaint.cli.output import print_json, print_table
from underpaint.cli.plugins import plugins_group
from underpaint.errors import ConfigError, NotFoundError, PluginError
from underpaint.registration.discovery import Switches
from underpaint.registration.manager import PluginManager, PluginWarning, reset_manager
from underpaint.registration.names import KINDS

FILE = '''
import underpaint
import attrs

underpaint_api = ">=1"

@attrs.frozen(kw_only=True)
class Config:
    """Options.

    Attributes:
        steps: Steps that it takes. This is the second sentence.
        names: Names, over
            two lines.
        needed: It has no default.
    """

    steps: int = 4
    names: tuple[str, ...] = attrs.field(factory=tuple)
    needed: str

@underpaint.hookimpl
def register_samplers(register):
    register("shop/one", "{stem}:One", config="{stem}:Config", options={{"steps": 9}}, summary="The first",
             licence="MIT", source="a paper", expected_failures={{"time_runs_down": "it jumps"}})
    register.alias("one", "shop/one")

@underpaint.hookimpl
def register_metrics(register):
    register("both", "{stem}:Both")

@underpaint.hookimpl
def register_losses(register):
    register("both", "{stem}:Both")

@underpaint.hookimpl
def on_step_end(step):
    pass
'''


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[PluginManager]:
    files = {
        "plugin_shop": FILE.format(stem="plugin_shop"),
        "plugin_ruin": "def inner():\n    raise OSError('the roof\\nfell in')\ninner()",
        "plugin_rival": "import underpaint\n@underpaint.hookimpl\ndef register_metrics(register):\n"
        "    register('both', 'x:Y')",
    }
    for stem, source in files.items():
        (tmp_path / f"{stem}.py").write_text(source)
    with pytest.warns(PluginWarning):
        manager = PluginManager(Switches(only=(), extra=tuple(str(tmp_path / f"{stem}.py") for stem in files)))
    reset_manager(manager)
    yield manager
    reset_manager()
    for stem in files:
        sys.modules.pop(stem, None)


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(plugins_group, arguments)


def _json(*arguments: str) -> Any:
    result = _run(*arguments, "--json")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return json.loads(result.stdout)


def _command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from underpaint.cli.main import run; run()", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


# ------------------------------------------------------------------------------ list


def test_list_as_json(shop: PluginManager) -> None:
    plain = _json("list")
    plugins = {plugin["name"]: plugin for plugin in plain["plugins"] if plugin["status"] != "off"}
    assert list(plugins) == ["plugin_shop", "plugin_ruin", "plugin_rival"]
    assert plugins["plugin_shop"]["names"] == {"metric": 1, "loss": 1, "sampler": 1, "alias": 1}
    assert plugins["plugin_shop"]["hooks"] == [
        "on_step_end",
        "register_losses",
        "register_metrics",
        "register_samplers",
    ]
    assert plugins["plugin_ruin"]["status"] == "failed"
    assert plugins["plugin_ruin"]["error"] == "OSError: the roof fell in"
    assert plugins["plugin_ruin"]["names"] == {}
    assert all(isinstance(plugin["load_ms"], int) for plugin in plugins.values())
    (conflict,) = plain["conflicts"]
    assert "metric 'both' is registered by 'plugin_shop'" in conflict


def test_list_for_people(shop: PluginManager) -> None:
    result = _run("list")
    assert result.exit_code == 0
    assert _run().output == result.output, "'plugins' alone lists"
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("plugin_ruin")]
    assert "failed" in line
    assert line.endswith("OSError: the roof fell in")
    assert "Conflict: The metric 'both'" in result.stderr
    assert "plugins show NAME" in result.stderr


def test_list_of_a_kind_has_every_name(shop: PluginManager) -> None:
    assert _json("list", "sampler") == [
        {"name": "one", "plugin": "plugin_shop", "about": "→ shop/one"},
        {"name": "shop/one", "plugin": "plugin_shop", "about": "The first"},
    ]
    lines = _run("list", "sampler").stdout.splitlines()
    assert lines[0].split() == ["sampler", "plugin", "about"]
    assert [line.split()[0] for line in lines[2:]] == ["one", "shop/one"]
    # Where an unknown name sends its reader.
    assert "'underpaint plugins list sampler' shows what is installed" in str(_run("show", "sampler:two").exception)
    assert _run("list", "samplr").exit_code == 2


def test_list_imports_no_torch() -> None:
    code = (
        "import sys\nfrom underpaint.cli.plugins import plugins_group\n"
        "plugins_group(['list', '--json'], standalone_mode=False)\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "False"
    assert {"timm", "metrics", "tiny"} <= {plugin["name"] for plugin in json.loads(done.stdout)["plugins"]}


# ------------------------------------------------------------------------------ show


def test_show_plugin(shop: PluginManager) -> None:
    plain = _json("show", "plugin_shop")
    assert plain["names"] == ["loss:both", "metric:both", "sampler:shop/one — The first"]
    assert plain["aliases"] == ["sampler:one → shop/one"]
    assert plain["status"] == "active"
    assert plain["origin"].endswith("plugin_shop.py")
    text = _run("show", "plugin_ruin").output
    assert "error: OSError: the roof fell in" in text
    assert "in inner" in text


@pytest.mark.parametrize("name", ["shop/one", "sampler:shop/one", "one", "sampler:one"])
def test_show_component(shop: PluginManager, name: str) -> None:
    plain = _json("show", name)
    assert plain["name"] == "sampler:shop/one"
    assert (plain["licence"], plain["source"], plain["plugin"]) == ("MIT", "a paper", "plugin_shop")
    assert plain["target"] == "plugin_shop:One"
    assert plain["expected_failures"] == ["time_runs_down: it jumps"]
    assert plain["options"] == [
        {"name": "steps", "type": "int", "required": False, "default": 9, "about": "Steps that it takes"},
        {"name": "names", "type": "tuple", "required": False, "default": [], "about": "Names, over two lines"},
        {"name": "needed", "type": "str", "required": True, "default": None, "about": "It has no default"},
    ]
    assert "required" in _run("show", name).output


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("tiny/vit", "Apache-2.0"),
        ("dinov3-b", "DINOv3 License"),
        ("open_clip/ViT-L-14@openai", "MIT"),
        # It cannot be made before somebody says which weights are meant.
        ("open_clip/ViT-L-14", "as published with each tag"),
    ],
)
def test_show_says_the_licence_of_an_encoder(name: str, licence: str) -> None:
    assert f"\nlicence: {licence}\n" in _run("show", name).output


def test_show_refuses(shop: PluginManager) -> None:
    for name, error, message in [
        ("plugin_shp", NotFoundError, "no plugin or component 'plugin_shp'. Did you mean 'plugin_shop'"),
        ("both", ConfigError, "'both' is the name of loss and metric; write 'loss:both'"),
        ("metric:both", PluginError, "registered by"),
        ("sampler:two", NotFoundError, "There is no sampler 'two'"),
        ("a b", ConfigError, "not a component name"),
    ]:
        result = _run("show", name)
        assert isinstance(result.exception, error), (name, result.exception)
        assert message in str(result.exception)


# ------------------------------------------------------------------------------ check


def test_check_component(shop: PluginManager) -> None:
    result = _run("check", "loss:both", "--json")
    plain = json.loads(result.stdout)
    assert result.exit_code == 1
    assert not plain["passed"]
    assert {item["component"] for item in plain["results"]} == {"loss:both"}
    assert set(plain["results"][0]) == {"component", "check", "status", "message", "seconds", "ran_as"}
    assert any("has no 'Both'" in item["message"] for item in plain["results"])
    text = _run("check", "loss:both")
    assert text.exit_code == 1
    assert "conformance kit" in text.output


def test_check_broken_plugin(shop: PluginManager) -> None:
    result = _run("check", "plugin_ruin")
    assert result.exit_code == 1
    assert "the roof" in result.output
    assert _json("check", "plugin_ruin")["passed"] is False


@pytest.mark.slow
def test_check_conforming_component() -> None:
    done = _command("plugins", "check", "euler", "--isolated", "--json")
    plain = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert plain["passed"]
    assert {item["component"] for item in plain["results"]} == {"sampler:euler"}


@pytest.mark.slow
def test_isolated_check_survives(tmp_path: Path) -> None:
    for stem, source in {
        "plugin_exits": "import os\nos._exit(0)",
        "plugin_fails": "import os\nos._exit(7)",
        "plugin_dies": "import os\nos.kill(os.getpid(), 9)",
    }.items():
        path = tmp_path / f"{stem}.py"
        path.write_text(source)
        done = _command("--plugin", str(path), "plugins", "check", stem, "--isolated")
        assert done.returncode == 1, done.stderr
        how = {"plugin_exits": "exit code 0", "plugin_fails": "exit code 7", "plugin_dies": "signal 9"}[stem]
        assert f"The process that checked '{stem}' ended with {how} before it could report" in done.stdout
    done = _command("plugins", "check", "no_such_plugin", "--isolated")
    assert done.returncode == 2
    assert "There is no plugin or component 'no_such_plugin'" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------ new


@pytest.mark.parametrize("kind", KINDS)
def test_new_writes_a_package(tmp_path: Path, kind: str) -> None:
    result = _run("new", "my-lab", "--kind", kind, "--out", str(tmp_path / "some where"))
    assert result.exit_code == 0, result.output
    folder = tmp_path / "some where" / "underpaint-my-lab"
    assert str(folder) in result.output
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "pyproject.toml",
        "README.md",
        "underpaint_my_lab/__init__.py",
        f"underpaint_my_lab/{kind}.py",
        "tests/test_conformance.py",
    } <= files
    for path in folder.rglob("*.py"):
        compile(path.read_text(), str(path), "exec")
        assert "{{" not in path.read_text()
    assert list((tmp_path / "some where").iterdir()) == [folder], "nothing is left beside it"


def test_new_overwrites_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "underpaint-lab" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    result = _run("new", "lab", "--out", str(tmp_path))
    assert isinstance(result.exception, ConfigError)
    assert "exists already" in str(result.exception)
    assert [path.name for path in mine.parent.iterdir()] == ["mine.txt"]
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("name", ["My", "a b", "", "1a", "a--b", "../x", "a_b", "underpaint-"])
def test_new_refuses_bad_names(tmp_path: Path, name: str) -> None:
    result = _run("new", name, "--out", str(tmp_path))
    assert isinstance(result.exception, ConfigError)
    assert "no name for a plugin" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["timm", "open-clip", "underpaint-tiny", "scenes"])
def test_new_hides_no_installed_plugin(tmp_path: Path, name: str) -> None:
    result = _run("new", name, "--out", str(tmp_path))
    assert isinstance(result.exception, ConfigError)
    taken = name.removeprefix("underpaint-")
    assert f"'{taken}' is the name of an installed plugin, from 'underpaint 0." in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_new_hides_no_importable_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "installed" / "underpaint_lab").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "installed")
    result = _run("new", "lab", "--out", str(tmp_path / "new"))
    assert isinstance(result.exception, ConfigError)
    assert "from 'module underpaint_lab'" in str(result.exception)


def test_new_accepts_the_prefix(tmp_path: Path) -> None:
    assert _run("new", "underpaint-lab", "--out", str(tmp_path)).exit_code == 0
    assert (tmp_path / "underpaint-lab" / "underpaint_lab").is_dir()


@pytest.mark.slow
def test_new_packages_pass_their_tests(tmp_path: Path) -> None:
    """All eleven kinds, installed with pip as they were written, pass their own tests as they were written."""
    folders = []
    for kind in KINDS:
        assert _run("new", f"new-{kind}", "--kind", kind, "--out", str(tmp_path)).exit_code == 0
        folders.append(tmp_path / f"underpaint-new-{kind}")
    target = tmp_path / "installed"
    pip = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([sys.executable, *pip, *map(str, folders)], check=True, capture_output=True, timeout=300)
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "--import-mode=importlib"),
            *(str(folder / "tests") for folder in folders),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"},
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "xfailed" not in done.stdout


# ------------------------------------------------------------------------------ output


def test_output(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([("a", 1), ("longer", 20)], ("name", "count"))
    assert capsys.readouterr().out == "name    count\n------  -----\na           1\nlonger     20\n"
    print_table([], ("name",))
    assert capsys.readouterr().out == "name\n----\n"
    print_json({"ä": Path("x")})
    assert json.loads(capsys.readouterr().out) == {"ä": "x"}

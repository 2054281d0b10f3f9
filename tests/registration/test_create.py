"""How a component is made from a name, options and context, and made again from its spec."""

import sys
import types
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch

from tests.registration.conftest import Load, Make
from underpaint import Adapter, ComponentSpec, ConfigError, Encoder, Features, PluginError, Posterior
from underpaint.registration.manager import PluginManager, PluginWarning


@attrs.frozen(kw_only=True)
class Config:
    """Options.

    Attributes:
        width: Width.
        text: A name that ``create`` must not take for its own.
    """

    width: int = 4
    text: str = ""


class Network(Encoder):
    def __init__(self, config: Config, *, model: str, weights: str | None, load: bool = True) -> None:
        super().__init__()
        self.made_with = (config, model, weights if load else "not loaded")

    def forward(self, images: torch.Tensor) -> Features:
        raise NotImplementedError


class Linear(Adapter):
    def __init__(self, *, in_channels: tuple[int, ...], latent_channels: int) -> None:
        super().__init__()
        self.in_channels, self.latent_channels = in_channels, latent_channels

    def forward(self, features: Features) -> Posterior:
        raise NotImplementedError


class Strange(Adapter):
    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, features: Features) -> Posterior:
        raise NotImplementedError


class NeedsLibrary(Adapter):
    def __init__(self, *, in_channels: tuple[int, ...], latent_channels: int) -> None:
        super().__init__()
        import library_that_is_missing  # type: ignore[import-not-found]  # noqa: F401

    def forward(self, features: Features) -> Posterior:
        raise NotImplementedError


SOURCE = """
@underpaint.hookimpl
def register_encoders(register):
    register("fam/*", "parts:Network", config="parts:Config", options={"width": 8}, takes_weights=True,
             examples=("fam/a",))
    register("not/encoder", "parts:Linear")

@underpaint.hookimpl
def register_adapters(register):
    register("linear", "parts:Linear")
    register("strange", "parts:Strange")
    register("needs/library", "parts:NeedsLibrary", extra="lib")
    register("missing/module", "no_module_of_this_name:X")
    register("missing/class", "parts:Absent")
    register("missing/config", "parts:Linear", config="no_module_of_this_name:Config")
    register("broken/module", "parts_broken:X")
    register("no/class", "parts:function")
"""


@pytest.fixture
def manager(make: Make, load: Load, monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginManager]:
    parts = types.ModuleType("parts")
    for item in (Config, Network, Linear, Strange, NeedsLibrary):
        setattr(parts, item.__name__, item)
    parts.function = lambda **_: object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "parts", parts)

    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "parts_broken":
                raise RuntimeError("bad build")

    finder = Broken()
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    yield load(make("one", SOURCE))
    sys.meta_path.remove(finder)  # type: ignore[arg-type]


def test_everything_reaches_the_constructor(manager: PluginManager) -> None:
    encoder = manager.create("encoder", "fam/big@tag", text="hello")
    assert encoder.made_with == (Config(width=8, text="hello"), "big", "tag")
    assert encoder.spec == ComponentSpec(
        kind="encoder",
        name="fam/big@tag",
        options={"width": 8, "text": "hello"},
        context={},
        plugin="one",
        distribution="underpaint-one 1.0",
    )
    assert manager.create("encoder", "fam/big", width=2).made_with == (Config(width=2), "big", None)


def test_context_is_kept_apart_from_options(manager: PluginManager) -> None:
    adapter = manager.create("adapter", "linear", in_channels=(3, 5), latent_channels=7)
    assert (adapter.in_channels, adapter.latent_channels) == ((3, 5), 7)
    assert adapter.spec.options == {}
    assert adapter.spec.context == {"in_channels": (3, 5), "latent_channels": 7}


@pytest.mark.parametrize(
    ("kind", "name", "options", "error", "message"),
    [
        ("encoder", "fam/a", {"widht": 3}, ConfigError, "encoder 'fam/a' has no key 'widht'. Did you mean 'width'"),
        ("encoder", "fam/a", {"width": "3"}, ConfigError, "encoder 'fam/a'.width must be a whole number, not '3'"),
        ("encoder", "not/encoder", {}, PluginError, "cannot be called as underpaint does"),
        ("adapter", "linear", {"width": 3}, ConfigError, "has no options; remove 'width'"),
        ("adapter", "linear", {"latent_channels": 3}, ConfigError, "pass in_channels=… as well"),
        ("adapter", "strange", {}, PluginError, "cannot be called as underpaint does"),
        ("adapter", "missing/module", {}, PluginError, "pip install --upgrade 'underpaint-one'"),
        ("adapter", "missing/config", {}, PluginError, "pip install --upgrade 'underpaint-one'"),
        ("adapter", "missing/class", {}, PluginError, "Module 'parts' has no 'Absent'"),
        ("adapter", "broken/module", {}, PluginError, "because of an error in it: RuntimeError: bad build"),
        ("adapter", "no/class", {}, PluginError, "made a object, which is no adapter"),
    ],
)
def test_refusals(
    manager: PluginManager, kind: str, name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        manager.create(kind, name, **options)
    assert message in str(caught.value)


def test_missing_library_names_the_extra(manager: PluginManager) -> None:
    with pytest.raises(PluginError, match=r"pip install 'underpaint-one\[lib\]'"):
        manager.create("adapter", "needs/library", in_channels=(3,), latent_channels=7)


def test_wrong_kind(manager: PluginManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["parts"], "Linear", lambda: Linear(in_channels=(1,), latent_channels=1))
    with pytest.raises(PluginError, match=r"made a Linear, which is no encoder; derive it from underpaint\.Encoder"):
        manager.create("encoder", "not/encoder")


# ------------------------------------------------------------------------------ from a spec


def test_made_again(manager: PluginManager) -> None:
    spec = manager.create("encoder", "fam/big@tag", text="hello").spec
    again = manager.create_from_spec(spec)
    # The saved state replaces the weights, so nothing is fetched for it.
    assert again.made_with == (Config(width=8, text="hello"), "big", "not loaded")
    assert again.spec == spec
    assert manager.create_from_spec(spec, width=3).made_with[0] == Config(width=3, text="hello")


def test_context_comes_back_from_json(manager: PluginManager) -> None:
    saved = ComponentSpec(kind="adapter", name="linear", context={"in_channels": [3, 5], "latent_channels": 7})
    assert manager.create_from_spec(saved).in_channels == (3, 5)
    assert manager.create_from_spec(saved, latent_channels=2).latent_channels == 2


SAVED = ComponentSpec(kind="encoder", name="blocks/conv", plugin="blocks", distribution="underpaint-blocks 0.1.0")


def test_not_installed_any_more(manager: PluginManager) -> None:
    with pytest.raises(PluginError) as caught:
        manager.create_from_spec(SAVED)
    assert str(caught.value) == (
        "The encoder 'blocks/conv' was made with plugin 'blocks' of 'underpaint-blocks 0.1.0', which is not "
        "installed; pip install 'underpaint-blocks'"
    )
    with pytest.raises(PluginError, match="plugin 'blocks', which is not loaded; load its file or module"):
        manager.create_from_spec(attrs.evolve(SAVED, distribution=""))


def test_installed_but_broken_or_off(make: Make, load: Load) -> None:
    with pytest.warns(PluginWarning):
        manager = load(make("blocks", "1 / 0"))
    with pytest.raises(PluginError, match=r"plugin 'blocks', which failed: ZeroDivisionError(.|\n)*Traceback"):
        manager.create_from_spec(SAVED)
    with pytest.raises(PluginError, match="which is switched off"):
        load(make("blocks", ""), off=("blocks",)).create_from_spec(SAVED)

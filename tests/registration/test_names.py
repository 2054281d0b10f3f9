"""The grammar of component names, and which registration a name finds."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.registration.conftest import Load, Make
from underpaint.errors import ConfigError, NotFoundError, suggest
from underpaint.registration.catalogue import Catalogue
from underpaint.registration.names import KINDS, Name, parse_name

GOOD = {
    "psnr": Name("psnr"),
    "tiny/vit": Name("tiny/vit"),
    "timm/vit_base_patch14_dinov2@lvd142m": Name("timm/vit_base_patch14_dinov2", "lvd142m"),
    "open_clip/ViT-L-14@openai": Name("open_clip/ViT-L-14", "openai"),
    "a/b@file:/some where/w.safetensors": Name("a/b", "file:/some where/w.safetensors"),
    "a/b@s3://bucket/x@2.pt": Name("a/b", "s3://bucket/x@2.pt"),
    "a/vit.v1+x": Name("a/vit.v1+x"),
    "family/*": Name("family/*"),
}
BAD = ["", "@", "a/", "/a", "a//b", "a/b/c", "a b", "a/b@", "@random", "-a", "a/-b", "a:b", "*", "a\n", "ä/b"]


@pytest.mark.parametrize("text", GOOD)
def test_good_names(text: str) -> None:
    assert parse_name(text) == GOOD[text]
    assert str(parse_name(text)) == text


@pytest.mark.parametrize("text", BAD)
def test_bad_names(text: str) -> None:
    with pytest.raises(ConfigError, match="names look like 'family/model'"):
        parse_name(text)


WORD = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,12}", fullmatch=True)


@given(family=WORD, model=WORD, weights=st.none() | st.text(min_size=1))
def test_names_come_back(family: str, model: str, weights: str | None) -> None:
    text = f"{family}/{model}" + ("" if weights is None else f"@{weights}")
    name = parse_name(text)
    assert (name.family, name.model, name.weights) == (family, model, weights)
    assert str(name) == text


@given(st.text())
def test_any_text_is_a_name_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert str(parse_name(text)) == text


SOURCE = """
@underpaint.hookimpl
def register_encoders(register):
    register("fam/*", "m:Any", takes_weights=True, examples=("fam/small",))
    register("fam/special", "m:Special", takes_weights=True)
    register("plain", "m:Plain")
    register.alias("short", "fam/large@tag")
    register.alias("nowhere", "gone/model")

@underpaint.hookimpl
def register_metrics(register):
    register("psnr", "m:Psnr")
"""


@pytest.fixture
def catalogue(make: Make, load: Load) -> Catalogue:
    return load(make("one", SOURCE)).catalogue


@pytest.mark.parametrize(
    ("text", "registered", "name"),
    [
        ("fam/anything", "fam/*", "fam/anything"),
        ("fam/special@w", "fam/special", "fam/special@w"),
        ("short", "fam/*", "fam/large@tag"),
        ("short@other", "fam/*", "fam/large@other"),
        ("plain", "plain", "plain"),
    ],
)
def test_resolution(catalogue: Catalogue, text: str, registered: str, name: str) -> None:
    resolved = catalogue.resolve("encoder", text)
    assert (resolved.registration.name, str(resolved.name)) == (registered, name)


@pytest.mark.parametrize(
    ("kind", "text", "error", "message"),
    [
        ("encodr", "plain", ConfigError, "There is no kind 'encodr'. Did you mean 'encoder'"),
        ("encoder", "plan", NotFoundError, "Did you mean 'plain'"),
        ("encoder", "psnr", NotFoundError, "There is metric of that name"),
        ("encoder", "plain@random", ConfigError, "no weights to choose; write 'plain' without '@random'"),
        ("encoder", "fam/*", ConfigError, "stands for all models of a family; write one of them, such as 'fam/small'"),
        ("encoder", "a b", ConfigError, "not a component name"),
        ("encoder", "nowhere", NotFoundError, "There is no encoder 'nowhere'"),
        ("metric", "short", NotFoundError, "There is no metric 'short'"),
    ],
)
def test_refusals(catalogue: Catalogue, kind: str, text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        catalogue.resolve(kind, text)
    assert message in str(caught.value)


def test_component_hides_alias(make: Make, load: Load) -> None:
    from underpaint.registration.manager import PluginWarning

    other = '@underpaint.hookimpl\ndef register_encoders(register):\n    register("short", "m:Own")'
    with pytest.warns(PluginWarning, match="encoder 'short' of plugin 'two' hides an alias of plugin 'one'"):
        catalogue = load(make("one", SOURCE), make("two", other)).catalogue
    assert catalogue.resolve("encoder", "short").registration.target == "m:Own"


def test_listing_is_in_the_order_of_kinds(catalogue: Catalogue) -> None:
    order = [(item.kind, item.name) for item in catalogue.registrations()]
    assert order == sorted(order, key=lambda pair: (KINDS.index(pair[0]), pair[1]))
    assert [item.name for item in catalogue.registrations("metric")] == ["psnr"]
    assert [item.alias for item in catalogue.aliases("encoder")] == ["nowhere", "short"]


def test_recipes(make: Make, load: Load) -> None:
    source = '@underpaint.hookimpl\ndef register_recipes(register):\n    register("quickstart", "q.yaml")'
    catalogue = load(make("one", source)).catalogue
    assert [recipe.name for recipe in catalogue.recipes()] == ["quickstart"]
    with pytest.raises(NotFoundError, match=r"no recipe 'quikstart'\. Did you mean 'quickstart'"):
        catalogue.recipe("quikstart")


def test_suggestions() -> None:
    assert suggest("ecoder", ["encoder", "decoder", "loss"]).startswith("Did you mean 'encoder'")
    assert suggest("zzz", ["b", "a"]) == "Known: 'a', 'b'."
    assert suggest("zzz", [f"n{i:02d}" for i in range(20)]).endswith("and 8 more.")
    assert suggest("zzz", []) == ""

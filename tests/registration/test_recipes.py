"""Recipes of plugins: which are registered, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from underpaint import registry
from underpaint.registration.registrar import RecipeRegistration

PLUGINS = Path(__file__).parents[2] / "plugins"


def test_every_recipe_of_a_plugin_is_registered_under_the_name_of_its_file_and_says_what_it_is_about() -> None:
    shipped = {path.stem: path for path in PLUGINS.glob("underpaint_*/recipes/*.yaml")}
    registered = {recipe.name: recipe for recipe in registry().recipes()}
    assert len(shipped) > 30
    assert {name: Path(recipe.path) for name, recipe in registered.items()} == shipped
    for name, recipe in registered.items():
        assert recipe.plugin == shipped[name].parents[1].name.removeprefix("underpaint_")
        assert recipe.about(), name


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("name: a\nabout: One line: with a colon\n", "One line: with a colon"),
        ('about: "Quoted"\n', "Quoted"),
        ("name: a\ndata:\n  about: not this\n", ""),
    ],
)
def test_the_about_line_is_what_a_recipe_says_of_itself(tmp_path: Path, text: str, about: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    assert RecipeRegistration(name="a", path=path, plugin="p", distribution="d").about() == about

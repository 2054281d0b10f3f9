"""``underpaint recipes``: what plugins ship."""

from __future__ import annotations

import click

from underpaint.cli.output import print_json, print_table
from underpaint.config.recipe import dump_recipe, plain_recipe
from underpaint.registration.manager import manager
from underpaint.run.recipes import PREFIX, load_recipe

__all__ = ["recipes"]


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """List and show the recipes that plugins ship."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_)


@recipes.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool = False) -> None:
    """List the shipped recipes."""
    rows = [
        {"name": f"{PREFIX}{r.name}", "about": r.about(), "plugin": r.plugin} for r in manager().catalogue.recipes()
    ]
    if as_json:
        print_json(rows)
    else:
        print_table([[row["name"], row["plugin"], row["about"]] for row in rows], ["recipe", "plugin", "about"])


@recipes.command()
@click.argument("name")
@click.argument("overrides", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print a recipe with every default written out. NAME is 'recipe:NAME' or a YAML file."""
    recipe = load_recipe(name, overrides)
    if as_json:
        print_json(plain_recipe(recipe))
    else:
        click.echo(dump_recipe(recipe), nl=False)

"""``underpaint quickstart`` and ``underpaint train``."""

from __future__ import annotations

import signal
from pathlib import Path

import click

from underpaint.config.recipe import apply_overrides, dump_recipe, plain_component, recipe_from_plain
from underpaint.config.schema import Recipe
from underpaint.run.recipes import PREFIX, check_recipe, read_recipe

__all__ = ["quickstart", "train"]


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--data", metavar="PATH", help="Your images: a folder, Parquet or tar files.  [default: the recipe's]")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/NAME]")
@click.option("--until", metavar="STAGE", help="Stop after this stage, 'latents', 'diffusion' or 'samples'.")
@click.option("--print-config", is_flag=True, help="Print the complete recipe and stop.")
def train(
    config: str, overrides: tuple[str, ...], data: str | None, out: Path | None, until: str | None, print_config: bool
) -> None:
    """Run a recipe, or a part of it.

    CONFIG is a YAML file or 'recipe:NAME'; KEY=VALUE pairs such as 'stages.align.steps=100' change it. Run the same
    command again to go on after an interruption. Works alone, under torchrun, the deepspeed launcher and SLURM.
    """
    recipe = _recipe(config, data, overrides)
    if print_config:
        click.echo(dump_recipe(recipe), nl=False)
        return
    _run(recipe, out or Path("runs") / recipe.name, until)


@click.command()
@click.option("--data", metavar="PATH", help="Your images: a folder, Parquet or tar files.  [default: rendered scenes]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("underpaint-quickstart"),
    show_default=True,
    help="Run folder.",
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def quickstart(data: str | None, out: Path, overrides: tuple[str, ...]) -> None:
    """Run the main job end to end in a few minutes on a CPU.

    Trains a tokenizer in AlignTok's three stages, caches its latents, trains a small SiT on them, draws samples,
    measures both, and writes OUT/report/index.html.
    """
    _run(_recipe(f"{PREFIX}quickstart", data, overrides), out, None)
    click.echo(f"Report: {out / 'report' / 'index.html'}")


def _recipe(source: str, data: str | None, overrides: tuple[str, ...]) -> Recipe:
    """Read a recipe, on the user's images where they gave some, and check it."""
    plain = read_recipe(source)
    if data is not None:
        from underpaint.data.sources import guess_dataset

        guessed = guess_dataset(data)
        section = plain.setdefault("data", {})
        section["train"] = plain_component(guessed.train)
        section["validation"] = None if guessed.validation is None else plain_component(guessed.validation)
    recipe = recipe_from_plain(apply_overrides(plain, overrides))
    check_recipe(recipe)
    return recipe


def _run(recipe: Recipe, out: Path, until: str | None) -> None:
    from underpaint.run.pipeline import check_until, run_recipe
    from underpaint.training.loop import Stopped

    check_until(recipe, until)
    try:
        run_recipe(recipe, out, until=until)
    except Stopped as stopped:
        kept = f"step {stopped.step} is saved in '{out}'" if stopped.step else "no step of this stage is saved"
        click.echo(f"Stopped by {stopped.signal}; {kept}. Run the same command to go on.", err=True)
        raise click.exceptions.Exit(128 + signal.Signals[stopped.signal].value) from None

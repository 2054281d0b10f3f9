"""Finds recipes and checks them against what is installed, without importing torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from underpaint.config.component import ComponentConfig
from underpaint.config.losses import LossConfig
from underpaint.config.recipe import apply_overrides, read_yaml, recipe_from_plain
from underpaint.config.schema import Recipe
from underpaint.errors import ConfigError, NotFoundError
from underpaint.registration.manager import manager

__all__ = ["check_recipe", "load_recipe", "read_recipe"]

PREFIX = "recipe:"


def read_recipe(source: str) -> dict[str, Any]:
    """Read a recipe as plain values.

    Args:
        source: ``recipe:NAME`` of a shipped recipe, or the path of a YAML file.

    Raises:
        NotFoundError: There is no such recipe or file.
    """
    from pathlib import Path

    if source.startswith(PREFIX):
        return read_yaml(manager().catalogue.recipe(source.removeprefix(PREFIX)).path)
    if not Path(source).exists() and any(r.name == source for r in manager().catalogue.recipes()):
        raise NotFoundError(f"There is no recipe file '{source}'. Did you mean '{PREFIX}{source}'?")
    return read_yaml(Path(source))


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, and check it against the schema and the installed plugins.

    Raises:
        UnderpaintError: Something in it is wrong; nothing has been built.
    """
    recipe = recipe_from_plain(apply_overrides(read_recipe(source), overrides))
    check_recipe(recipe)
    return recipe


def check_recipe(recipe: Recipe) -> None:
    """Check that every component exists and takes its options, and load the plugins the recipe names.

    Raises:
        NotFoundError: A component is not installed.
        ConfigError: An option is wrong.
        PluginError: A plugin that the recipe asks for is missing or broken.
    """
    plugins = manager()
    for name in recipe.plugins:
        plugins.require(name)
    for kind, config, path in _components(recipe):
        try:
            plugins.catalogue.config(kind, config.name, config.options, path)
        except NotFoundError as error:
            raise plugins.explain(config.name, type(error)(f"{path}: {error}")) from None
        except ConfigError as error:
            text = str(error)
            raise ConfigError(text if text.startswith(path) else f"{path}: {text}") from None


def _components(recipe: Recipe) -> Iterator[tuple[str, ComponentConfig | LossConfig, str]]:
    yield "dataset", recipe.data.train, "data.train"
    if recipe.data.validation is not None:
        yield "dataset", recipe.data.validation, "data.validation"
    tokenizer = recipe.tokenizer
    for kind in ("encoder", "adapter", "decoder"):
        part = getattr(tokenizer, kind)
        if part is not None:
            yield kind, part, f"tokenizer.{kind}"
    for index, stage in enumerate(recipe.stages):
        for position, loss in enumerate(stage.losses):
            yield "loss", loss, f"stages[{index}].losses[{position}]"
        if stage.stop is not None:
            for position, metric in enumerate(stage.stop.metrics):
                yield "metric", metric, f"stages[{index}].stop.metrics[{position}]"
        if stage.denoiser is not None:
            yield "backbone", stage.denoiser.backbone, f"stages[{index}].denoiser.backbone"
            yield "conditioner", stage.denoiser.conditioner, f"stages[{index}].denoiser.conditioner"
            for position, loss in enumerate(stage.denoiser.losses):
                yield "loss", loss, f"stages[{index}].denoiser.losses[{position}]"
    if recipe.diffusion is not None:
        yield "backbone", recipe.diffusion.backbone, "diffusion.backbone"
        yield "conditioner", recipe.diffusion.conditioner, "diffusion.conditioner"
        if recipe.diffusion.companion is not None:
            yield "encoder", recipe.diffusion.companion, "diffusion.companion"
        for position, loss in enumerate(recipe.diffusion.losses):
            yield "loss", loss, f"diffusion.losses[{position}]"
    evaluation = recipe.evaluation
    for position, metric in enumerate(evaluation.reconstruction):
        yield "metric", metric, f"evaluation.reconstruction[{position}]"
    for position, metric in enumerate(evaluation.generation):
        yield "metric", metric, f"evaluation.generation[{position}]"
    yield "sampler", evaluation.sampler, "evaluation.sampler"
    for position, tracker in enumerate(recipe.trackers):
        yield "tracker", tracker, f"trackers[{position}]"

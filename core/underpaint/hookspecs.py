"""Every hook that underpaint calls.

A plugin is a module (or package) with functions of these names, marked with ``@underpaint.hookimpl``.
An implementation may take fewer arguments than the specification, never others. Each docstring says,
in this order: when the hook is called, its arguments, what its result means, who implements it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from underpaint.registration.registrar import RecipeRegistrar, Registrar

__all__ = ["API_VERSION", "hookimpl", "hookspec"]

API_VERSION = "1.0"
"""Version of the plugin interface. A plugin may set ``underpaint_api = ">=1,<2"`` to declare what it needs."""

hookspec = pluggy.HookspecMarker("underpaint")
hookimpl = pluggy.HookimplMarker("underpaint")

# ------------------------------------------------------------------------------ registration, at discovery


@hookspec
def register_encoders(register: Registrar) -> None:
    """Called once, when plugins are discovered, to collect encoders.

    Args:
        register: Callable that takes a name and the target as ``"package.module:Class"``.

    Result: ignored. Nothing heavy may be imported here: targets are strings.

    Implemented by: plugins that turn images into `underpaint.Features`.
    """


@hookspec
def register_adapters(register: Registrar) -> None:
    """Called once, when plugins are discovered, to collect adapters.

    Args:
        register: Callable that takes a name and the target as ``"package.module:Class"``.

    Result: ignored. Nothing heavy may be imported here: targets are strings.

    Implemented by: plugins that turn features into a latent `underpaint.Posterior`.
    """


@hookspec
def register_decoders(register: Registrar) -> None:
    """Called once, when plugins are discovered, to collect decoders.

    Args:
        register: Callable that takes a name and the target as ``"package.module:Class"``.

    Result: ignored. Nothing heavy may be imported here: targets are strings.

    Implemented by: plugins that turn latents into a `underpaint.Reconstruction`.
    """


@hookspec
def register_backbones(register: Registrar) -> None:
    """Called once, when plugins are discovered, to collect backbones.

    Args:
        register: Callable that takes a name and the target as ``"package.module:Class"``.

    Result: ignored. Nothing heavy may be imported here: targets are strings.

    Implemented by: plugins with networks that predict the velocity of noisy latents.
    """


@hookspec
def register_conditioners(register: Registrar) -> None:
    """Called once, when plugins are discovered, to collect conditioners.

    Args:
        register: Callable that takes a name and the target as ``"package.module:Class"``.

    Result: ignored. Nothing heavy may be imported here: targets are strings.

    Implemented by: plugins that turn labels or texts into a `underpaint.Condition`.
    """


@hookspec
def register_losses(register: Registrar) -> None:
    """Called once, when plugins are discovered, to collect losses.

    Args:
        register: Callable that takes a name and the target as ``"package.module:Class"``.

    Result: ignored. Nothing heavy may be imported here: targets are strings.

    Implemented by: plugins with terms to minimise.
    """


@hookspec
def register_metrics(register: Registrar) -> None:
    """Called once, when plugins are discovered, to collect metrics.

    Args:
        register: Callable that takes a name and the target as ``"package.module:Class"``.

    Result: ignored. Nothing heavy may be imported here: targets are strings.

    Implemented by: plugins with numbers to report about images.
    """


@hookspec
def register_datasets(register: Registrar) -> None:
    """Called once, when plugins are discovered, to collect data sets.

    Args:
        register: Callable that takes a name and the target as ``"package.module:Class"``.

    Result: ignored. Nothing heavy may be imported here: targets are strings.

    Implemented by: plugins with sources of samples.
    """


@hookspec
def register_samplers(register: Registrar) -> None:
    """Called once, when plugins are discovered, to collect samplers.

    Args:
        register: Callable that takes a name and the target as ``"package.module:Class"``.

    Result: ignored. Nothing heavy may be imported here: targets are strings.

    Implemented by: plugins with solvers of the flow.
    """


@hookspec
def register_trackers(register: Registrar) -> None:
    """Called once, when plugins are discovered, to collect trackers.

    Args:
        register: Callable that takes a name and the target as ``"package.module:Class"``.

    Result: ignored. Nothing heavy may be imported here: targets are strings.

    Implemented by: plugins that send scalars and pictures to a logging service.
    """


@hookspec
def register_importers(register: Registrar) -> None:
    """Called once, when plugins are discovered, to collect importers.

    Args:
        register: Callable that takes a name and the target as ``"package.module:Class"``.

    Result: ignored. Nothing heavy may be imported here: targets are strings.

    Implemented by: plugins that read published weights of another project, for ``underpaint import``.
    """


@hookspec
def register_recipes(register: RecipeRegistrar) -> None:
    """Called once, when plugins are discovered, to collect recipes.

    Args:
        register: Callable that takes a recipe name and the path of its YAML file; ``register.folder(path)`` takes all
            of a folder under their own names.

    Result: ignored.

    Implemented by: plugins that ship ready configurations of a run.
    """


# ------------------------------------------------------------------------------ life of a run, on every rank


@hookspec
def on_train_start(folder: Path, config: Mapping[str, Any]) -> None:
    """Called when a run folder is locked and its config is resolved, before any model is built.

    Args:
        folder: The run folder.
        config: The resolved recipe, as plain values.

    Result: ignored.

    Implemented by: plugins that watch or record runs.
    """


@hookspec
def on_stage_start(folder: Path, stage: str, step: int) -> None:
    """Called when a stage has built its models and restored its checkpoint, before its first step.

    Args:
        folder: The run folder.
        stage: Name of the stage.
        step: Optimizer steps already done; above 0 after a resume.

    Result: ignored.

    Implemented by: plugins that watch or record runs.
    """


@hookspec
def on_step_end(stage: str, step: int, scalars: Mapping[str, float]) -> None:
    """Called at every logging step of a stage, after the optimizer step.

    Args:
        stage: Name of the stage.
        step: Optimizer steps done.
        scalars: Loss terms and rates, by name.

    Result: ignored.

    Implemented by: plugins that watch or record runs.
    """


@hookspec
def on_checkpoint_saved(stage: str, step: int, checkpoint: Path) -> None:
    """Called when a checkpoint has been committed.

    Args:
        stage: Name of the stage.
        step: Optimizer steps it holds.
        checkpoint: Its folder.

    Result: ignored.

    Implemented by: plugins that copy checkpoints elsewhere.
    """


@hookspec
def on_stage_end(folder: Path, stage: str, step: int) -> None:
    """Called when a stage has reached its last step and its result is exported.

    Args:
        folder: The run folder.
        stage: Name of the stage.
        step: Optimizer steps done.

    Result: ignored.

    Implemented by: plugins that watch or record runs.
    """


@hookspec
def on_train_end(folder: Path, error: BaseException | None) -> None:
    """Called when a run ends, also after an error or an interruption.

    Args:
        folder: The run folder.
        error: What ended it, or None when it finished.

    Result: ignored.

    Implemented by: plugins that watch or record runs.
    """

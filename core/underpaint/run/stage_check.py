"""Whether the tokenizer stages of a recipe can be trained, found out before the first of them is."""

from __future__ import annotations

import torch

from underpaint.config.schema import Recipe
from underpaint.config.stages import StageConfig
from underpaint.errors import ConfigError
from underpaint.evaluation.measure import make_metrics
from underpaint.models.folders import copy_tokenizer
from underpaint.models.tokenizer import Tokenizer
from underpaint.run.data import RunData
from underpaint.training.critics import check_whole
from underpaint.training.diffusion_stage import LEARNING
from underpaint.training.engine import check_parts
from underpaint.training.terms import WeightedLosses
from underpaint.training.tokenizer_stage import TokenizerModule, tokenizer_losses, tokenizer_sizes

__all__ = ["check_stages"]

_CPU = torch.device("cpu")


def check_stages(recipe: Recipe, first: int, tokenizer: Tokenizer, data: RunData) -> None:
    """Refuse tokenizer stages that could not be trained, before hours go into the one that comes first.

    Args:
        recipe: The recipe.
        first: Index of the first stage that is still to be trained.
        tokenizer: The recipe's, of any weights, on the CPU. What of it requires gradients may change.
        data: The images.

    Raises:
        ConfigError: Losses, adaptive weights, trained parts, optimizer or stop rule of a stage do not fit each other,
            the tokenizer or the data.
        DataError: A loss or a metric needs files that are not there.
    """
    sizes = tokenizer_sizes(tokenizer, data.config.height, data.config.width)
    for index, stage in enumerate(recipe.stages[first:], first):
        path = f"stages[{index}]"
        with torch.random.fork_rng(devices=[]):
            try:
                losses = tokenizer_losses(stage, index, _CPU, sizes, has_labels=bool(data.classes))
                _check_learning(stage, path, losses, tokenizer)
            except ConfigError as error:
                text = str(error)
                raise ConfigError(text if text.startswith(path) else f"{path}: {text}") from None
        if losses.adaptive and recipe.engine.zero == 3:
            raise ConfigError(
                f"Stage '{stage.name}' has adaptive weights, and engine.zero is 3, which leaves no rank with the whole "
                "layer that they are measured at; set engine.zero to 2 or less."
            )
        for item in losses.adversaries:
            check_whole(item, recipe.engine)
        _check_watched(stage)


def _check_learning(stage: StageConfig, path: str, losses: WeightedLosses, tokenizer: Tokenizer) -> None:
    # Low-rank pairs could not be taken out of it again.
    student = tokenizer if stage.lora is None else copy_tokenizer(tokenizer, tokenizer.state_dict())
    learner = TokenizerModule(student, stage.trains, losses)
    if stage.lora is not None:
        learner.add_lora(stage.lora)
    joint = () if stage.denoiser is None else LEARNING
    check_parts(stage.optimizer, (*learner.learning, *joint), f"{path}.optimizer")
    for number, loss in enumerate(stage.losses):
        if loss.critic is not None and loss.critic.optimizer is not None:
            check_parts(loss.critic.optimizer, ("critic",), f"{path}.losses[{number}].critic.optimizer")


def _check_watched(stage: StageConfig) -> None:
    if stage.stop is None:
        return
    for item, metric in zip(stage.stop.metrics, make_metrics(stage.stop.metrics, _CPU), strict=True):
        if metric.higher_is_better is None:
            raise ConfigError(
                f"stop.metrics of stage '{stage.name}' has '{item.name}', which does not say whether higher is better; "
                "name another metric."
            )

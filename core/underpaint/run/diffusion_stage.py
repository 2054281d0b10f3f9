"""Runs the diffusion stage of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from underpaint.data.latents import LatentCache
from underpaint.interfaces.loss import StepSizes
from underpaint.models.build import build_generator_parts
from underpaint.models.folders import copy_generator, save_generator
from underpaint.models.generator import Generator, SamplingSettings
from underpaint.models.tokenizer import Tokenizer
from underpaint.run.session import Session
from underpaint.run.training import StagePlan, train_stage
from underpaint.training.diffusion_stage import DiffusionModule, StepNoise, diffusion_losses
from underpaint.training.engine import Engine
from underpaint.training.flops import count_flops
from underpaint.training.latent_batches import LatentBatch, latent_batches
from underpaint.training.loop import LoopResult

__all__ = ["run_diffusion_stage"]

_PARTS = ("backbone.", "conditioner.")


def run_diffusion_stage(session: Session, tokenizer: Tokenizer, cache: LatentCache) -> LoopResult:
    """Train the diffusion model on a latent cache and export the generator.

    Args:
        session: The run.
        tokenizer: With its statistics, on the CPU.
        cache: Its latents.
    """
    recipe, ranks = session.recipe, session.ranks
    config = recipe.diffusion
    assert config is not None
    seed = session.stage_seed(len(recipe.stages))
    shape = cache.identity.shape
    grid = (shape[1], shape[2])
    backbone, conditioner = build_generator_parts(
        config,
        tokenizer,
        grid=grid,
        classes=len(session.data.classes),
        has_text=session.data.train.has_text,
        seed=seed,
    )
    generator = Generator(
        tokenizer,
        backbone,
        conditioner,
        grid=grid,
        classes=session.data.classes,
        settings=SamplingSettings(sampler=recipe.evaluation.sampler, guidance=recipe.evaluation.guidance),
        path=config.path,
        predicts=config.predicts,
        about=_facts(session),
    )
    sizes = StepSizes(
        image=(session.data.config.height, session.data.config.width),
        latent_channels=shape[0],
        grid=grid,
        hidden_width=backbone.width,
    )
    losses = diffusion_losses(config, ranks.device, sizes)
    module = DiffusionModule(backbone, conditioner, losses, path=config.path, predicts=config.predicts).to(ranks.device)
    noise = StepNoise(config, shape, seed, ranks.device)
    one = LatentBatch(torch.zeros(1, *shape), _first_input(conditioner.accepts), slice(0, 1))
    flops = count_flops(module, lambda: _call(module, one, noise, 0, ranks.device)[0])

    def batches(start: int, micro_batches: int) -> Iterator[LatentBatch]:
        return latent_batches(
            cache,
            accepts=conditioner.accepts,
            batch=config.batch,
            accumulation=micro_batches,
            ranks=ranks,
            seed=seed,
            start=start,
        )

    def forward(engine: Engine, batch: LatentBatch, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor], None]:
        return (*_call(engine, batch, noise, step, ranks.device), None)

    def export(state: dict[str, Tensor]) -> None:
        own = {name: tensor for name, tensor in state.items() if name.startswith(_PARTS)}
        save_generator(copy_generator(generator, own), session.folder.generator)

    return train_stage(
        session,
        StagePlan(
            name="diffusion",
            module=module,
            compiled=backbone.blocks() or [backbone],
            parts={"backbone": backbone, "conditioner": conditioner, "losses": module.losses},
            optimizer=config.optimizer,
            steps=config.steps,
            batch=config.batch,
            ema=config.ema,
            flops=flops,
            batches=batches,
            forward=forward,
            export=export,
        ),
    )


def _call(
    module: Any, batch: LatentBatch, noise: StepNoise, step: int, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    epsilon, t, drop = noise.rows(step, batch.rows)
    # Labels stay on the CPU: the conditioner checks their range there without waiting for the device.
    loss, terms = module(batch.latents.to(device, non_blocking=True), batch.inputs, epsilon, t, drop, step)
    return loss, terms


def _first_input(accepts: str) -> Tensor | list[str]:
    return [""] if accepts == "text" else torch.zeros(1, dtype=torch.int64)


def _facts(session: Session) -> dict[str, Any]:
    recipe = session.recipe
    assert recipe.diffusion is not None
    return {
        "title": f"{recipe.name}: generator",
        "facts": [
            f"{recipe.diffusion.backbone.name} trained for {recipe.diffusion.steps} steps of {recipe.diffusion.batch}."
        ],
    }

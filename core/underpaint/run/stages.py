"""Runs one training stage of a recipe: build, resume, train, export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from underpaint.config.schema import ComponentConfig, EngineConfig, OptimizerConfig, Recipe, StageConfig
from underpaint.data.latents import LatentCache
from underpaint.data.loader import Batch, ImageLoader
from underpaint.models.build import build_generator_parts, load_tokenizer
from underpaint.models.folders import copy_generator, copy_tokenizer, save_generator, save_tokenizer
from underpaint.models.generator import Generator, SamplingSettings
from underpaint.models.tokenizer import Tokenizer
from underpaint.registration.manager import manager
from underpaint.run.data import RunData
from underpaint.run.folder import RunFolder
from underpaint.training.checkpoint import CheckpointStore
from underpaint.training.diffusion_stage import DiffusionModule, StepNoise, diffusion_losses
from underpaint.training.engine import Engine
from underpaint.training.flops import count_flops, peak_flops
from underpaint.training.latent_batches import LatentBatch, latent_batches
from underpaint.training.log import StageLog
from underpaint.training.loop import LoopResult, StageStep, train_loop
from underpaint.training.ranks import Ranks
from underpaint.training.signals import StopRequest
from underpaint.training.tokenizer_stage import TokenizerModule, check_teacher, tokenizer_losses

__all__ = ["Session", "run_diffusion_stage", "run_tokenizer_stage"]


@attrs.frozen(eq=False, kw_only=True)
class Session:
    """What every stage of a run shares.

    Attributes:
        recipe: The recipe.
        folder: The run folder.
        data: The images.
        ranks: The processes.
        config_hash: Hash of the recipe, written into every checkpoint.
        plugins: Distribution of each plugin by name, written into every checkpoint.
    """

    recipe: Recipe
    folder: RunFolder
    data: RunData
    ranks: Ranks
    config_hash: str
    plugins: dict[str, str]


def run_tokenizer_stage(session: Session, index: int, tokenizer: Tokenizer) -> LoopResult:
    """Train one tokenizer stage and export its result to ``stages/NAME/tokenizer``.

    The parts that the stage does not train are exported bit by bit as they came in.

    Args:
        session: The run.
        index: Which stage of the recipe.
        tokenizer: Where it starts: the previous stage's result, in evaluation mode on the CPU.
    """
    recipe, ranks = session.recipe, session.ranks
    stage = recipe.stages[index]
    seed = _stage_seed(recipe.seed, index)
    teacher = None
    if stage.teacher is not None:
        teacher = load_tokenizer(str(session.folder.stage(stage.teacher) / "tokenizer")).to(ranks.device)
        check_teacher(teacher, tokenizer, stage)
    losses = tokenizer_losses(stage, index, ranks.device)
    module = TokenizerModule(tokenizer.to(ranks.device), stage.trains, losses, teacher)
    size = (1, session.data.config.height, session.data.config.width, 3)
    blank = torch.randint(0, 256, size, dtype=torch.uint8, device=ranks.device)
    flops = count_flops(module, lambda: module(blank, 0)[0])

    def batches(start: int, micro_batches: int) -> Iterator[Batch]:
        data = session.data
        loader = ImageLoader(
            data.train,
            transform=data.train_crop(),
            batch=stage.batch,
            seed=seed,
            indices=data.train_indices,
            rank=ranks.rank,
            world_size=ranks.world_size,
            workers=data.config.workers,
            start_step=start,
            accumulation=micro_batches,
            max_broken=data.config.max_broken,
        )
        try:
            for batch in loader:
                yield from batch.split(micro_batches)
        finally:
            loader.close()

    def step_fn(engine: Engine, batch: Batch, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(seed + 7919 * step + 104729 * (micro * ranks.world_size + ranks.rank))
        images = batch.images.to(ranks.device, non_blocking=True)
        loss, terms = engine(images, step)
        return loss, terms

    parts: dict[str, nn.Module] = {name: getattr(module, name) for name in stage.trains}

    def export(state: dict[str, Tensor]) -> None:
        result = copy_tokenizer(tokenizer, state)
        result.about = _tokenizer_facts(session, index, stage)
        save_tokenizer(result, session.folder.stage(stage.name) / "tokenizer")

    return _train(
        session,
        name=stage.name,
        module=module,
        compiled=[module.encoder, module.decoder],
        parts=parts,
        optimizer=stage.optimizer,
        steps=stage.steps,
        batch=stage.batch,
        ema=stage.ema,
        flops=flops,
        batches=batches,
        step_fn=step_fn,
        export=export,
    )


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
    seed = _stage_seed(recipe.seed, len(recipe.stages))
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
        about=_generator_facts(session),
    )
    losses = diffusion_losses(config, ranks.device)
    module = DiffusionModule(backbone, conditioner, losses).to(ranks.device)
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

    def step_fn(engine: Engine, batch: LatentBatch, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        return _call(engine, batch, noise, step, ranks.device)

    def export(state: dict[str, Tensor]) -> None:
        save_generator(copy_generator(generator, state), session.folder.generator)

    return _train(
        session,
        name="diffusion",
        module=module,
        compiled=backbone.blocks() or [backbone],
        parts={"backbone": backbone, "conditioner": conditioner},
        optimizer=config.optimizer,
        steps=config.steps,
        batch=config.batch,
        ema=config.ema,
        flops=flops,
        batches=batches,
        step_fn=step_fn,
        export=export,
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


def _train(
    session: Session,
    *,
    name: str,
    module: nn.Module,
    compiled: list[nn.Module],
    parts: dict[str, nn.Module],
    optimizer: OptimizerConfig,
    steps: int,
    batch: int,
    ema: float | None,
    flops: float,
    batches: Any,
    step_fn: StageStep,
    export: Any,
) -> LoopResult:
    config: EngineConfig = session.recipe.engine
    ranks = session.ranks
    folder = session.folder.stage(name)
    folder.mkdir(parents=True, exist_ok=True)
    if config.compile:
        for part in compiled:
            part.compile()
    engine = Engine(
        module,
        parts=parts,
        optimizer=optimizer,
        config=config,
        steps=steps,
        micro_batch=batch // (ranks.world_size * config.accumulation),
        ema=ema,
        ranks=ranks,
    )
    store = CheckpointStore(
        folder / "checkpoints", config.keep, ranks, config_hash=session.config_hash, plugins=session.plugins
    )
    latest = store.latest()
    start = 0
    if latest is not None:
        engine.load(latest.folder)
        start = latest.step
    plugins = manager()
    trackers = _trackers(session, folder) if ranks.is_main else []
    log = StageLog(folder, name, steps=steps, start=start, trackers=trackers) if ranks.is_main else None
    peak, _ = peak_flops(ranks.device, config.precision)
    plugins.call("on_stage_start", folder=session.folder.root, stage=name, step=start)
    stream = batches(start, config.accumulation)
    try:
        with StopRequest() as stop:
            result = train_loop(
                name=name,
                engine=engine,
                batches=stream,
                step_fn=step_fn,
                start=start,
                steps=steps,
                images_per_step=batch,
                flops_per_image=flops,
                peak=peak,
                config=config,
                store=store,
                log=log,
                ranks=ranks,
                stop=stop,
                call=plugins.call,
            )
        state = engine.state("raw" if ema is None else "ema")
        if ranks.is_main:
            export(state)
        ranks.barrier()
    finally:
        engine.close()
        stream.close()
        if log is not None:
            log.close()
        for tracker in trackers:
            tracker.close()
    plugins.call("on_stage_end", folder=session.folder.root, stage=name, step=steps)
    return result


def _trackers(session: Session, folder: Path) -> list[Any]:
    def make(config: ComponentConfig) -> Any:
        place = folder / "trackers" / config.name.replace("/", "_")
        place.mkdir(parents=True, exist_ok=True)
        return manager().create("tracker", config.name, **config.options, folder=place, run=session.recipe.name)

    return [make(config) for config in session.recipe.trackers]


def _stage_seed(seed: int, index: int) -> int:
    return (seed + 1) * 1_000_003 + index * 10_007


def _tokenizer_facts(session: Session, index: int, stage: StageConfig) -> dict[str, Any]:
    recipe = session.recipe
    trained = [f"{s.name}: {' + '.join(s.trains)} for {s.steps} steps of {s.batch}" for s in recipe.stages[: index + 1]]
    return {
        "title": f"{recipe.name}: tokenizer after stage {stage.name}",
        "facts": [f"Trained on {session.data.facts()['train']} in stages: {'; '.join(trained)}."],
        "size": [session.data.config.height, session.data.config.width],
    }


def _generator_facts(session: Session) -> dict[str, Any]:
    recipe = session.recipe
    assert recipe.diffusion is not None
    return {
        "title": f"{recipe.name}: generator",
        "facts": [
            f"{recipe.diffusion.backbone.name} trained for {recipe.diffusion.steps} steps of {recipe.diffusion.batch}."
        ],
    }

"""Trains one stage of a run: engines, resume, loop, logs, export."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
from torch import Tensor, nn

from underpaint.config.component import ComponentConfig
from underpaint.config.engine import OptimizerConfig
from underpaint.config.stages import GuardConfig
from underpaint.errors import DataError
from underpaint.registration.manager import manager
from underpaint.run.session import Session
from underpaint.training.checkpoint import Checkpoint, CheckpointStore
from underpaint.training.compilation import compile_modules
from underpaint.training.critics import CriticTrainer
from underpaint.training.engine import Engine
from underpaint.training.flops import peak_flops
from underpaint.training.log import StageLog
from underpaint.training.loop import LoopResult, train_loop
from underpaint.training.ranks import Ranks
from underpaint.training.signals import StopRequest
from underpaint.training.stopping import StopRule
from underpaint.training.terms import LossItem
from underpaint.training.watchdog import Watchdog

__all__ = ["Forward", "StagePlan", "train_stage"]


class Forward(Protocol):
    """Computes the loss of a micro-batch through the engine."""

    def __call__(self, engine: Engine, batch: Any, step: int, micro: int) -> tuple[Tensor, Mapping[str, Tensor], Any]:
        """Return the scalar to minimise, the named terms to log, and what critics judge, all on the device."""


@attrs.frozen(eq=False, kw_only=True)
class StagePlan:
    """What a stage trains, on what, and what becomes of it.

    Attributes:
        name: Name of its folder.
        module: What the engine trains.
        compiled: Modules to compile when the recipe asks for it.
        differentiated_again: Whether gradients go through them more than once a step.
        passed: Parts that gradients go through on their way to a layer before them.
        parts: Parts with their own learning rate.
        optimizer: Optimizer and schedule.
        steps: Optimizer steps.
        batch: Samples per step, over all ranks.
        ema: Decay of the exported average, or None.
        ema_ramp: Its ramp.
        flops: Arithmetic of one sample, forward and backward.
        batches: Endless micro-batches of this rank from a step on.
        forward: The loss of a micro-batch.
        adversaries: Losses whose critics are trained beside the module.
        guard: Which steps are dropped for a loss that jumped, or None.
        keep: Whether the micro-batch whose loss was computed last may count, as `Engine.backward` takes it; it is given
            the step. None keeps all.
        stop_rule: Makes the rule that may end the stage early, given the engine.
        export: Writes the result, from the full state dict on rank 0.
        origin: Hashes of weights and images that the stage reads and its checkpoints do not hold, by what they are. A
            stage does not go on with others.
        notes: What to tell where the stage does not go on from a checkpoint.
    """

    name: str
    module: nn.Module
    compiled: Sequence[nn.Module]
    differentiated_again: bool = False
    passed: Sequence[nn.Module] = ()
    parts: Mapping[str, nn.Module]
    optimizer: OptimizerConfig
    steps: int
    batch: int
    ema: float | None
    ema_ramp: float | None = None
    flops: float
    batches: Callable[[int, int], Iterator[Any]]
    forward: Forward
    adversaries: Sequence[LossItem] = ()
    guard: GuardConfig | None = None
    keep: Callable[[int], Tensor] | None = None
    stop_rule: Callable[[Engine], StopRule | None] = lambda engine: None
    export: Callable[[dict[str, Tensor]], None]
    origin: Mapping[str, str] = attrs.field(factory=dict)
    notes: Sequence[str] = ()


def train_stage(session: Session, plan: StagePlan) -> LoopResult:
    """Train a stage from wherever its newest checkpoint is, and export its result.

    Raises:
        DataError: The checkpoint was trained with other frozen weights or images than those that are there now, or the
            ranks do not have the same ones.
    """
    config, ranks = session.recipe.engine, session.ranks
    _check_same(ranks, plan)
    folder = session.folder.stage(plan.name)
    folder.mkdir(parents=True, exist_ok=True)
    if config.compile:
        compile_modules(plan.compiled, differentiated_again=plan.differentiated_again, passed=plan.passed)
    micro_batch = plan.batch // (ranks.world_size * config.accumulation)
    critics = [
        CriticTrainer(
            item,
            optimizer=plan.optimizer,
            config=config,
            steps=plan.steps,
            micro_batch=micro_batch,
            ranks=ranks,
            guard=plan.guard,
        )
        for item in plan.adversaries
    ]
    engine = Engine(
        plan.module,
        parts=plan.parts,
        optimizer=plan.optimizer,
        config=config,
        steps=plan.steps,
        micro_batch=micro_batch,
        ema=plan.ema,
        ema_ramp=plan.ema_ramp,
        ranks=ranks,
    )
    store = CheckpointStore(
        folder / "checkpoints", config.keep, ranks, config_hash=session.config_hash, plugins=session.plugins
    )
    # Reading costs less than training on what a disk has made of the weights.
    latest = store.latest(verify=True)
    start = 0
    if latest is not None:
        _check_origin(latest, plan)
        engine.load(latest.folder)
        for critic in critics:
            critic.load(latest.folder)
        start = latest.step
    elif ranks.is_main:
        for note in plan.notes:
            print(f"stage {plan.name}: {note}", file=sys.stderr, flush=True)
    rule = plan.stop_rule(engine)
    if rule is not None:
        rule.rewind(start)
    steps = start if rule is not None and rule.met else plan.steps

    def save(place: Path) -> None:
        engine.save(place)
        for critic in critics:
            critic.save(place)

    def step_fn(batch: Any, step: int, micro: int) -> tuple[Mapping[str, Tensor], Any]:
        loss, terms, shown = plan.forward(engine, batch, step, micro)
        engine.backward(loss, None if plan.keep is None else plan.keep(step))
        result = engine.step(terms)
        named = {"loss": loss, **terms}
        for critic in critics:
            for name, value in critic.step(shown).items():
                named[name if name not in named else f"{name}_{critic.key}"] = value
        verdicts = [v for v in (result.dropped, *(critic.dropped for critic in critics)) if v is not None]
        return named, attrs.evolve(result, dropped=any(verdicts) if verdicts else None)

    plugins = manager()
    trackers = _trackers(session, folder) if ranks.is_main else []
    log = StageLog(folder, plan.name, steps=plan.steps, start=start, trackers=trackers) if ranks.is_main else None
    peak = peak_flops(ranks.device, config.precision)
    plugins.call("on_stage_start", folder=session.folder.root, stage=plan.name, step=start)
    stream = plan.batches(start, config.accumulation)
    try:
        with StopRequest() as stop, Watchdog(ranks, plan.name, config.timeout) as watchdog:
            result = train_loop(
                name=plan.name,
                batches=stream,
                step_fn=step_fn,
                start=start,
                steps=steps,
                images_per_step=plan.batch,
                flops_per_image=plan.flops,
                peak=None if peak is None else peak[0],
                config=config,
                save=save,
                store=store,
                log=log,
                ranks=ranks,
                stop=stop,
                watchdog=watchdog,
                enough=rule or (lambda step: False),
                call=plugins.call,
                origin=plan.origin,
            )
        for critic in critics:
            critic.export(folder / "critics", ranks)
        state = engine.state("raw" if plan.ema is None else "ema")
        if ranks.is_main:
            plan.export(state)
        ranks.barrier()
    finally:
        for critic in critics:
            critic.close()
        engine.close()
        close = getattr(stream, "close", None)
        if close is not None:
            close()
        if log is not None:
            log.close()
        for tracker in trackers:
            tracker.close()
    plugins.call("on_stage_end", folder=session.folder.root, stage=plan.name, step=result.steps)
    return result


def _check_same(ranks: Ranks, plan: StagePlan) -> None:
    first, *others = ranks.all_gather_object(dict(plan.origin))
    for rank, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            ours, theirs = (found.get(name, "none")[:12] for found in (first, other))
            if ours != theirs:
                raise DataError(
                    f"Stage '{plan.name}' has on rank {rank} another {name}, of hash {theirs}, than on rank 0, of hash "
                    f"{ours}; give all ranks the same files."
                )


def _check_origin(checkpoint: Checkpoint, plan: StagePlan) -> None:
    for name, before in checkpoint.extra.get("origin", {}).items():
        now = plan.origin.get(name)
        if now is not None and now != before:
            raise DataError(
                f"The checkpoint '{checkpoint.folder}' was trained with another {name}, of hash {before[:12]}, than "
                f"the one that is there now, of hash {now[:12]}; put the earlier files back, or choose another --out "
                f"to start stage '{plan.name}' anew."
            )


def _trackers(session: Session, folder: Path) -> list[Any]:
    def make(config: ComponentConfig) -> Any:
        place = folder / "trackers" / config.name.replace("/", "_")
        place.mkdir(parents=True, exist_ok=True)
        return manager().create("tracker", config.name, **config.options, folder=place, run=session.recipe.name)

    return [make(config) for config in session.recipe.trackers]

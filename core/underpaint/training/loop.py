"""The training loop that every stage shares: resume, step, log, checkpoint, stop."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from underpaint.config.engine import EngineConfig
from underpaint.training.checkpoint import CheckpointStore
from underpaint.training.engine import NotFiniteError, StepResult
from underpaint.training.log import StageLog
from underpaint.training.ranks import Ranks
from underpaint.training.signals import StopRequest
from underpaint.training.watchdog import Watchdog

__all__ = ["LoopResult", "StageStep", "Stopped", "train_loop"]


class Stopped(Exception):  # noqa: N818 - an outcome, not a failure
    """Training was asked to stop, and tried to save.

    Attributes:
        signal: Name of the signal, such as ``"SIGTERM"``.
        step: Optimizer steps in the stage's newest checkpoint, 0 without one: fewer than were done when the disk was
            full at that moment.
    """

    def __init__(self, signal: str, step: int) -> None:
        super().__init__(signal, step)
        self.signal = signal
        self.step = step


class StageStep(Protocol):
    """Trains on a micro-batch: forward, backward and the engines' step."""

    def __call__(self, batch: Any, step: int, micro: int) -> tuple[Mapping[str, Tensor], StepResult]:
        """Return the named terms to log, on the device, and what the main engine did.

        A term is a scalar, or a sum and its count as two values where a step may have nothing to add.
        """


@attrs.frozen(kw_only=True)
class LoopResult:
    """How a stage went.

    Attributes:
        steps: Optimizer steps done in all.
        skipped: Steps skipped since the start or the resume.
        seconds: Wall time of this process in the loop.
    """

    steps: int
    skipped: int
    seconds: float


def train_loop(
    *,
    name: str,
    batches: Iterator[Any],
    step_fn: StageStep,
    start: int,
    steps: int,
    images_per_step: int,
    flops_per_image: float,
    peak: float | None,
    config: EngineConfig,
    save: Callable[[Path], None],
    store: CheckpointStore,
    log: StageLog | None,
    ranks: Ranks,
    stop: StopRequest,
    watchdog: Watchdog,
    enough: Callable[[int], bool],
    call: Callable[..., None],
    origin: Mapping[str, str] | None = None,
) -> LoopResult:
    """Train from step `start` to `steps`.

    Losses stay on the device between log lines, so that the loop does not wait for it. The checkpoint at
    the last step is always written.

    Args:
        name: Name of the stage.
        batches: Endless micro-batches of this rank, already at position `start`.
        step_fn: Trains on a micro-batch.
        start: Optimizer steps done before.
        steps: Optimizer steps to reach.
        images_per_step: Global batch.
        flops_per_image: Forward and backward, per image.
        peak: Peak FLOP/s of one device; None where it is not known, and no share of it is logged.
        config: Logging, checkpoint and accumulation settings.
        save: Writes the state of all engines into a folder.
        store: Where checkpoints go.
        log: Log of the main rank, None elsewhere.
        ranks: The processes of the run.
        stop: Set by signals.
        watchdog: Is told how far this rank has come; entered.
        enough: Whether the stage may end after a step, the same answer on every rank.
        call: Calls a lifecycle hook.
        origin: Hashes that every checkpoint records.

    Raises:
        Stopped: A signal asked for it; what is saved goes on from there.
    """
    begin = last = time.perf_counter()
    waited = 0.0
    skipped = 0
    jumped: int | None = None
    sums: dict[str, Tensor] = {}
    logged_step = start
    done = saved = start
    for step in range(start, steps):
        shown: list[Any] = []
        for micro in range(config.accumulation):
            watchdog.at(step + 1, "reads")
            waiting = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - waiting
            shown.append(batch)
            watchdog.at(step + 1, "computes")
            try:
                terms, result = step_fn(batch, step, micro)
            except NotFiniteError:
                _keep_skipped(step + 1, shown, log, ranks)
                raise
            for key, value in terms.items():
                value = value.detach().float()
                pair = value if value.ndim else torch.stack([value, torch.ones_like(value)])
                sums[key] = sums[key] + pair if key in sums else pair
        if result.skipped:
            skipped += 1
            _keep_skipped(step + 1, shown, log, ranks)
        if result.dropped is not None:
            jumped = (jumped or 0) + result.dropped
        done = step + 1
        watchdog.at(step + 1, "measures")
        asked = time.perf_counter()
        finished = done == steps or enough(done)
        # What it measures is no training: the rates leave it out.
        last += time.perf_counter() - asked
        if done % config.log_every == 0 or finished:
            values = _mean_over_ranks(sums, ranks)
            now = time.perf_counter()
            elapsed = max(now - last, 1e-9)
            rate = (done - logged_step) * images_per_step / elapsed
            values |= {
                **{f"lr_{part}" if part else "lr": lr for part, lr in _rates(result.lr).items()},
                "grad_norm": float(result.grad_norm),
                "images_per_second": rate,
                **({} if peak is None else {"mfu": rate * flops_per_image / (peak * ranks.world_size)}),
                "data_wait": waited / elapsed,
                "memory_gib": _memory(ranks.device),
                "seconds": now - begin,
                "eta": (steps - done) * elapsed / (done - logged_step),
                "skipped": skipped,
                **({} if jumped is None else {"skipped_jump": jumped}),
            }
            if log is not None:
                log.row(done, values)
            call("on_step_end", stage=name, step=done, scalars=values)
            sums, waited, last, logged_step = {}, 0.0, now, done
        signal = _asked(stop, ranks) if ranks.world_size == 1 or finished or _due(done, config) else None
        if signal or done % config.checkpoint_every == 0 or finished:
            watchdog.at(step + 1, "saves")
            checkpoint = store.save(done, save, {"stage": name, "skipped": skipped, "origin": dict(origin or {})})
            if checkpoint is not None:
                saved = done
                call("on_checkpoint_saved", stage=name, step=done, checkpoint=checkpoint.folder)
            if done == logged_step:
                last = time.perf_counter()
            if finished:
                # No later step will ask for a signal that came while the last one was saved.
                signal = signal or _asked(stop, ranks)
        # First, or a signal in the last step would be lost, and the next stage begin.
        if signal:
            raise Stopped(signal, saved)
        if finished:
            break
    return LoopResult(steps=done, skipped=skipped, seconds=time.perf_counter() - begin)


def _keep_skipped(step: int, shown: list[Any], log: StageLog | None, ranks: Ranks) -> None:
    """Log which samples, over all ranks, were in a step that was skipped, for who looks for the one to blame."""
    mine = [key for batch in shown for key in batch.keys]
    samples = [key for part in ranks.all_gather_object(mine) for key in part]
    if log is not None:
        log.skipped(step, samples)


def _asked(stop: StopRequest, ranks: Ranks) -> str | None:
    """Return the signal that any rank was sent, the same on all. Every rank calls it."""
    signals = [stop.requested] if ranks.world_size == 1 else ranks.all_gather_object(stop.requested)
    return next((signal for signal in signals if signal), None)


def _due(step: int, config: EngineConfig) -> bool:
    # Asking all ranks costs a collective, so a signal is honoured within ten steps, not at once.
    return step % 10 == 0 or step % config.checkpoint_every == 0


def _rates(lr: dict[str, float]) -> dict[str, float]:
    values = set(lr.values())
    return {"": next(iter(values))} if len(values) == 1 else lr


def _mean_over_ranks(sums: dict[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """Divide sums by counts over all ranks; a term that nothing was added to is left out."""
    stacked = torch.stack([sums[key] for key in sorted(sums)])
    if ranks.world_size > 1:
        stacked = ranks.all_reduce_sum(stacked)
    pairs = dict(zip(sorted(sums), stacked.tolist(), strict=True))
    return {key: total / count for key, (total, count) in pairs.items() if count}


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    scale = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale

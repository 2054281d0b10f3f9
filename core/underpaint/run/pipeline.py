"""Carries a recipe through its stages: tokenizer, latents, diffusion, samples, report."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch

from underpaint.config.recipe import plain_recipe
from underpaint.config.schema import Recipe
from underpaint.errors import ConfigError
from underpaint.evaluation.measure import Shown, make_metrics, measure_generation, measure_reconstruction
from underpaint.evaluation.protocol import Number
from underpaint.models.build import build_tokenizer, load_tokenizer
from underpaint.models.folders import load_folder, save_tokenizer
from underpaint.models.generator import Generator
from underpaint.models.tokenizer import Tokenizer
from underpaint.registration.manager import manager
from underpaint.run import provenance
from underpaint.run.data import RunData, build_cache, cache_statistics, check_sizes, open_run_data
from underpaint.run.diffusion_stage import check_diffusion, run_diffusion_stage
from underpaint.run.folder import RunFolder
from underpaint.run.joint_stage import check_denoiser
from underpaint.run.kept import Kept
from underpaint.run.notes import write_notes
from underpaint.run.session import Session
from underpaint.run.small_images import leave_out_small
from underpaint.run.stage_check import check_stages
from underpaint.run.tokenizer_stage import check_probe, run_tokenizer_stage
from underpaint.training.lock import RunLock
from underpaint.training.ranks import Ranks

__all__ = ["check_until", "run_recipe"]

_log = logging.getLogger("underpaint")


def check_until(recipe: Recipe, until: str | None) -> None:
    """Refuse a ``--until`` that is no step of the recipe.

    Raises:
        ConfigError: The message lists the steps.
    """
    steps = [stage.name for stage in recipe.stages]
    steps += ["latents", "diffusion", "samples"] if recipe.diffusion is not None else []
    if until is not None and until not in steps:
        raise ConfigError(f"There is no step '{until}' in recipe '{recipe.name}'; its steps are {', '.join(steps)}.")


def run_recipe(recipe: Recipe, out: Path, *, until: str | None = None) -> None:
    """Run a recipe in a folder, from wherever an earlier session stopped.

    A step that is finished is not run again: stages by their exported tokenizer, the cache by its index, diffusion by
    its exported generator.

    Args:
        recipe: Checked recipe.
        out: Run folder; made if it does not exist.
        until: Last step to run, or None for all.

    Raises:
        UnderpaintError: A mistake the user can mend.
        Stopped: A signal asked to stop; everything is saved.
    """
    out = out.expanduser().resolve()
    out.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(out)
    # The watchdog of the training loop knows more than a collective that fails, so it gets to speak first.
    with Ranks(recipe.engine.device, timeout=recipe.engine.timeout + 60.0) as ranks, RunLock(out, ranks):
        error: BaseException | None = None
        try:
            if recipe.engine.deterministic:
                # Read by cuBLAS when it is first used.
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
            torch.backends.cuda.matmul.allow_tf32 = recipe.engine.tf32
            torch.backends.cudnn.allow_tf32 = recipe.engine.tf32
            _on_main(ranks, lambda: folder.claim(recipe))
            manager().call("on_train_start", folder=out, config=plain_recipe(recipe))
            data = leave_out_small(open_run_data(recipe.data), folder.small_images, ranks)
            session = Session(
                recipe=recipe,
                folder=folder,
                data=data,
                ranks=ranks,
                config_hash=_config_hash(recipe),
                plugins={r.name: r.distribution or r.origin for r in manager().records if r.status == "active"},
            )
            _run(session, until)
        except BaseException as caught:
            error = caught
            raise
        finally:
            manager().call("on_train_end", folder=out, error=error)


def _run(session: Session, until: str | None) -> None:
    recipe, folder, ranks, data = session.recipe, session.folder, session.ranks, session.data

    def recorded() -> None:
        if folder.begun:
            provenance.check_images(folder.provenance, data.facts())
        provenance.record_start(
            folder.provenance,
            seed=recipe.seed,
            command=[Path(sys.argv[0]).name, *sys.argv[1:]],
            data=data.facts(),
            ranks=ranks.world_size,
            device=str(ranks.device),
        )
        write_notes(folder, recipe, data)

    _on_main(ranks, recorded)
    if data.left_out:
        total = data.left_out + len(data.train_indices)
        _say(
            ranks,
            f"data: {data.left_out} of {total} training images have a short side below {recipe.data.min_side} px and "
            "are left out",
        )
    kept = Kept(session)
    tokenizer = build_tokenizer(recipe.tokenizer, recipe.seed)
    tokenizer.grid(data.config.height, data.config.width)
    check_sizes(data, tokenizer.stride)
    waiting = [index for index, stage in enumerate(recipe.stages) if not folder.is_finished(stage.name)]
    if waiting:
        check_stages(recipe, waiting[0], tokenizer, data)
    for index, stage in enumerate(recipe.stages):
        check_probe(stage, data)
        if stage.denoiser is not None:
            check_denoiser(recipe, index, tokenizer, data)
    if recipe.diffusion is not None:
        check_diffusion(recipe, tokenizer, data, ranks.device)
    metrics = make_metrics(recipe.evaluation.reconstruction, ranks.device)
    # A decoder that nothing has trained yet shows noise.
    decodes = recipe.tokenizer.load is not None
    for index, stage in enumerate(recipe.stages):
        if not folder.is_finished(stage.name):
            _say(ranks, f"stage {stage.name}: {' + '.join(stage.trains)} for {stage.steps} steps")
            with kept.timed(stage.name):
                run_tokenizer_stage(session, index, tokenizer)
        tokenizer = load_tokenizer(str(folder.stage(stage.name) / "tokenizer"))
        if decodes or any(part.startswith("decoder") for part in stage.trains):
            decodes = True
            kept.reconstructed(*_measured_reconstruction(session, tokenizer, metrics, stage.name), stage.name)
        kept.write()
        if until == stage.name:
            return _finish(session, kept)
    if not recipe.stages:
        kept.reconstructed(*_measured_reconstruction(session, tokenizer, metrics, ""), None)
    if recipe.diffusion is None:
        if ranks.is_main:
            save_tokenizer(tokenizer, folder.tokenizer)
        return _finish(session, kept)

    if not (folder.latents / "index.json").exists():
        _say(ranks, f"latents: encoding {len(data.train_indices)} images")
    with kept.timed("latents"):
        tokenizer = tokenizer.to(ranks.device)
        cache = build_cache(folder.latents, tokenizer, data, recipe.latents, ranks)
        tokenizer = tokenizer.cpu()
        tokenizer.statistics = cache_statistics(cache)
        if ranks.is_main:
            save_tokenizer(tokenizer, folder.tokenizer)
        ranks.barrier()
    if until == "latents":
        return _finish(session, kept)

    if not (folder.generator / "config.json").exists():
        _say(ranks, f"diffusion: {recipe.diffusion.backbone.name} for {recipe.diffusion.steps} steps")
        with kept.timed("diffusion"):
            run_diffusion_stage(session, tokenizer, cache)
    if until == "diffusion":
        return _finish(session, kept)

    with kept.timed("samples", anew=True):
        _say(ranks, f"samples: drawing {_sample_count(session)} images")
        generator = load_folder(folder.generator)
        assert isinstance(generator, Generator)
        kept.sampled(*_measured_generation(session, generator.to(ranks.device)), data.classes)
    return _finish(session, kept)


# ------------------------------------------------------------------------------------------- measuring


def _measured_reconstruction(
    session: Session, tokenizer: Tokenizer, metrics: list[Any], stage: str
) -> tuple[list[Number], Shown]:
    config, data, ranks = session.recipe.evaluation, session.data, session.ranks
    for metric in metrics:
        metric.reset()
    numbers, shown = measure_reconstruction(
        tokenizer.to(ranks.device),
        data.validation_pass(config.images, config.batch, ranks),
        metrics,
        facts=_image_facts(data),
        show=config.show,
    )
    tokenizer.cpu()
    suffix = f" after {stage}" if stage else ""
    named = [attrs.evolve(n, name=f"{n.name}{suffix}") for n in numbers]
    _say(ranks, "  ".join(f"{n.name} {n.value:.4g}" for n in named))
    return named, shown


def _sample_count(session: Session) -> int:
    return min(session.recipe.evaluation.images, len(session.data.validation_indices))


def _measured_generation(session: Session, generator: Generator) -> tuple[list[Number], Shown]:
    config, data, ranks = session.recipe.evaluation, session.data, session.ranks
    metrics = make_metrics(config.generation, ranks.device)
    generator.prepare(precision=config.precision, compile=session.recipe.engine.compile)
    numbers, shown = measure_generation(
        generator,
        data.validation_pass(config.images, config.batch, ranks),
        metrics,
        config,
        count=_sample_count(session),
        facts=_image_facts(data),
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    _say(ranks, "  ".join(f"{n.name} {n.value:.4g}" for n in numbers))
    return numbers, shown


def _image_facts(data: RunData) -> dict[str, Any]:
    return {
        "data": data.validation.spec.name,
        "data_hash": data.fingerprint("validation"),
        "held_out": True,
        "image_size": [data.config.height, data.config.width],
        "crop": "short side resized, centre",
    }


def _finish(session: Session, kept: Kept) -> None:
    from underpaint.report.page import write_report

    kept.write()
    if session.ranks.is_main:
        path = write_report(session.folder.root)
        _say(session.ranks, f"report: {path}")
    session.ranks.barrier()


# --------------------------------------------------------------------------------------------- helpers


def _on_main(ranks: Ranks, action: Callable[[], None]) -> None:
    """Do something on rank 0; every rank raises what it raises, so that none waits for ever."""
    error: Exception | None = None
    if ranks.is_main:
        try:
            action()
        except Exception as caught:
            error = caught
    failed = ranks.broadcast_object(None if error is None else (type(error), str(error)))
    if error is not None:
        raise error
    if failed is not None:
        raise ConfigError(f"Rank 0 refused the run: {failed[1]}")


def _say(ranks: Ranks, line: str) -> None:
    if ranks.is_main and line:
        print(line, file=sys.stderr, flush=True)


def _config_hash(recipe: Recipe) -> str:
    return hashlib.sha256(json.dumps(plain_recipe(recipe), sort_keys=True).encode()).hexdigest()

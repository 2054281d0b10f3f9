"""Runs one tokenizer stage of a recipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from underpaint.config.stages import StageConfig
from underpaint.data.loader import Batch
from underpaint.errors import ConfigError
from underpaint.evaluation.measure import make_metrics, measure_reconstruction
from underpaint.evaluation.probe import linear_probe, pooled_latents
from underpaint.interfaces.encoder import Encoder
from underpaint.models.build import load_tokenizer
from underpaint.models.folders import copy_tokenizer, save_tokenizer
from underpaint.models.tokenizer import Tokenizer
from underpaint.run.data import RunData
from underpaint.run.joint_stage import Partner
from underpaint.run.session import Session
from underpaint.run.training import StagePlan, train_stage
from underpaint.training.compilation import units_of
from underpaint.training.critics import carry_critic
from underpaint.training.engine import Engine
from underpaint.training.flops import count_flops
from underpaint.training.heads import carry_heads, export_heads
from underpaint.training.loop import LoopResult
from underpaint.training.lora import merged
from underpaint.training.stopping import StopRule
from underpaint.training.terms import WeightedLosses
from underpaint.training.tokenizer_stage import TokenizerModule, check_teacher, tokenizer_losses, tokenizer_sizes
from underpaint.weights import tensor_hash

__all__ = ["check_probe", "run_tokenizer_stage"]

_PARTS = ("encoder.", "adapter.", "decoder.")
_JOINT = "tokenizer."


def run_tokenizer_stage(session: Session, index: int, tokenizer: Tokenizer) -> LoopResult:
    """Train one tokenizer stage and export its result to ``stages/NAME/tokenizer``.

    The parts that the stage does not train are exported bit by bit as they came in. A stage with a denoiser also
    exports a generator, to ``stages/NAME/generator``.

    Args:
        session: The run.
        index: Which stage of the recipe.
        tokenizer: Where it starts: the previous stage's result, in evaluation mode on the CPU.
    """
    ranks, data = session.ranks, session.data
    stage = session.recipe.stages[index]
    seed = session.stage_seed(index)
    teacher = _teacher(session, stage, tokenizer)
    sizes = tokenizer_sizes(tokenizer, data.config.height, data.config.width)
    has_labels = bool(data.classes)
    # Losses draw their own layers: the same ones whether the process made the stages before or starts with this one.
    torch.manual_seed(seed)
    losses = tokenizer_losses(stage, index, ranks.device, sizes, has_labels=has_labels, average=ranks.average)
    for item in losses.adversaries:
        if item.config.critic is not None and item.config.critic.carry is not None:
            earlier = item.config.critic.carry
            carry_critic(item, session.folder.stage(earlier) / "critics", earlier)
    heads = _take_heads(session, index, losses)
    partner = None if stage.denoiser is None else Partner(session, index, tokenizer, sizes)
    learner = TokenizerModule(
        tokenizer.to(ranks.device),
        stage.trains,
        losses,
        teacher,
        stage.equivariance,
        frozenset() if partner is None else frozenset({"latents"}),
    )
    module = learner if partner is None else partner.join(learner, tokenizer.latent_channels)
    blank = torch.randint(0, 256, (1, *sizes.image, 3), dtype=torch.uint8, device=ranks.device)
    label = torch.zeros(1, dtype=torch.int64, device=ranks.device) if has_labels else None
    # In evaluation mode, where no view is drawn and no buffer changes.
    module.eval()
    flops = count_flops(module, lambda: module(blank, 0, label, *(partner.one() if partner else ()))[0])
    module.train()
    if stage.lora is not None:
        # After the count: the sums of the pairs are made once a step, not for every image.
        learner.add_lora(stage.lora)
    origin = _origin(learner, teacher) | losses.hashes() | {"set of training images": data.fingerprint()}
    if partner is not None:
        origin |= {f"{name} of the denoiser": found for name, found in partner.losses.hashes().items()}
    keep = None if stage.guard is None else learner.add_guard(stage.guard, ranks.average)

    apart = learner.decoder.last_layer() if "decoder" in losses.adaptive else None
    units = [*units_of(learner.encoder), *units_of(learner.decoder, apart), *losses.units()]
    if partner is not None:
        units += [*partner.blocks, *partner.losses.units()]

    def batches(start: int, micro_batches: int) -> Iterator[Batch]:
        for batch in data.train_batches(stage.batch, seed=seed, start=start, accumulation=micro_batches, ranks=ranks):
            yield from batch.split(micro_batches)

    def forward(engine: Engine, batch: Batch, step: int, micro: int) -> tuple[Tensor, Mapping[str, Tensor], Any]:
        torch.manual_seed(seed + 7919 * step + 104729 * (micro * ranks.world_size + ranks.rank))
        labels = None if batch.labels is None else batch.labels.to(ranks.device, non_blocking=True)
        images = batch.images.to(ranks.device, non_blocking=True)
        loss, terms, shown = engine(images, step, labels, *(partner.arguments(batch, step, micro) if partner else ()))
        return loss, terms, shown

    def export(state: dict[str, Tensor]) -> None:
        own = merged(learner, {name.removeprefix(_JOINT): t for name, t in state.items()})
        result = copy_tokenizer(tokenizer, {name: t for name, t in own.items() if name.startswith(_PARTS)})
        result.about = _facts(session, index, stage, losses)
        if any(part.partition(".")[0] != "decoder" for part in stage.trains):
            # Those of the latents before the stage.
            result.statistics = None
        export_heads(learner.losses, own, session.folder.stage(stage.name) / "heads")
        if partner is not None:
            partner.export(state, result)
        # Last: a stage that has a tokenizer is finished.
        save_tokenizer(result, session.folder.stage(stage.name) / "tokenizer")

    result = train_stage(
        session,
        StagePlan(
            name=stage.name,
            module=module,
            compiled=units,
            differentiated_again=bool(losses.adaptive),
            passed=[learner.decoder] if losses.reaches_back else [],
            parts=module.learning,
            optimizer=stage.optimizer,
            steps=stage.steps,
            batch=stage.batch,
            ema=stage.ema,
            ema_ramp=stage.ema_ramp,
            flops=flops,
            batches=batches,
            forward=forward,
            adversaries=losses.adversaries,
            guard=stage.guard,
            keep=keep,
            stop_rule=lambda engine: _stop_rule(session, stage, learner, engine),
            export=export,
            origin=origin,
            notes=heads,
        ),
    )
    if stage.stop is not None and result.steps < stage.steps:
        _say(session, f"stage {stage.name}: ended after {result.steps} steps, none better in {stage.stop.patience}")
    return result


def _take_heads(session: Session, index: int, losses: WeightedLosses) -> list[str]:
    """Give the losses' layers what an earlier stage has trained, and return what to tell of it."""
    stages = session.recipe.stages
    earlier = stages[index - 1].name if index and len(losses.heads) else None
    taken = () if earlier is None else carry_heads(losses.heads, session.folder.stage(earlier) / "heads")
    return [
        f"the layers of the loss {key} " + (f"go on from stage {earlier}" if key in taken else "start anew")
        for key in losses.heads
    ]


def _say(session: Session, line: str) -> None:
    if session.ranks.is_main:
        print(line, file=sys.stderr, flush=True)


def _teacher(session: Session, stage: StageConfig, student: Tokenizer) -> Tokenizer | None:
    if stage.teacher is None:
        return None
    if stage.teacher == "start":
        location = session.recipe.tokenizer.load
        assert location is not None
    else:
        location = str(session.folder.stage(stage.teacher) / "tokenizer")
    teacher = load_tokenizer(location).to(session.ranks.device)
    check_teacher(teacher, student, stage)
    return teacher


def _origin(learner: TokenizerModule, teacher: Tokenizer | None) -> dict[str, str]:
    """Return hashes of the weights that decide the training and are not in its checkpoints."""
    frozen = {name: param for name, param in learner.named_parameters() if not param.requires_grad}
    found = {"set of frozen weights": tensor_hash(frozen)} if frozen else {}
    if teacher is not None:
        found["teacher"] = teacher.fingerprint()
    return found


def check_probe(stage: StageConfig, data: RunData) -> None:
    """Refuse a stop rule with a probe on images without labels.

    Raises:
        ConfigError: It has one, and they have none.
    """
    if stage.stop is not None and stage.stop.probe is not None and not (data.classes and data.validation.classes):
        part = "validation" if data.classes else "train"
        raise ConfigError(
            f"stop.probe of stage '{stage.name}' tells classes apart, and data.{part} has none; set it to null "
            f"(stages.{stage.name}.stop.probe=null), or give images with labels."
        )


def _stop_rule(session: Session, stage: StageConfig, module: TokenizerModule, engine: Engine) -> StopRule | None:
    config, ranks, data = stage.stop, session.ranks, session.data
    if config is None:
        return None
    metrics = make_metrics(config.metrics, ranks.device)
    view = Tokenizer(module.encoder, module.adapter, module.decoder)

    def measure() -> dict[str, tuple[float, bool | None]]:
        values: dict[str, tuple[float, bool | None]] = {}
        batch = session.recipe.evaluation.batch
        probed: list[Tensor] = []
        module.eval()
        with engine.using("raw" if stage.ema is None else "ema"), engine.autocast():
            for metric in metrics:
                metric.reset()
            images = data.validation_pass(config.images, batch, ranks)
            numbers, _ = measure_reconstruction(view, images, metrics, facts={}, show=1)
            values |= {number.name: (number.value, bool(number.higher_is_better)) for number in numbers}
            if config.probe is not None:
                passes = data.train_pass(config.probe, batch, ranks), data.validation_pass(config.images, batch, ranks)
                probed = [tensor for part in passes for tensor in pooled_latents(view, part)]
        module.train()
        if probed:
            # Of all ranks; the probe itself is no part of what runs in low precision.
            whole = [torch.cat(ranks.all_gather_object(tensor)).to(ranks.device) for tensor in probed]
            values["probe"] = linear_probe(*whole), None
        return values

    return StopRule(config, session.folder.stage(stage.name) / "stopping.jsonl", measure, ranks)


def _facts(session: Session, index: int, stage: StageConfig, losses: WeightedLosses) -> dict[str, Any]:
    recipe = session.recipe
    trained = [f"{s.name}: {_trained(s)} for {_length(s)} of {s.batch}" for s in recipe.stages[: index + 1]]
    # The recipe may leave the choice to the loss.
    seen = [(i.config.name, e.spec.name) for i in losses.items for e in i.loss.held if isinstance(e, Encoder)]
    return {
        "title": f"{recipe.name}: tokenizer after stage {stage.name}",
        "facts": [f"Trained on {session.data.facts()['train']} in stages: {'; '.join(trained)}."]
        + [f"The loss {loss} of stage {stage.name} looked through {encoder}." for loss, encoder in seen],
        "size": [session.data.config.height, session.data.config.width],
    }


def _trained(stage: StageConfig) -> str:
    lora = stage.lora
    parts = (f"{p} (LoRA of rank {lora.rank})" if lora and p in lora.parts else p for p in stage.trains)
    partner = "" if stage.denoiser is None else f" with {stage.denoiser.backbone.name}"
    return " + ".join(parts) + partner


def _length(stage: StageConfig) -> str:
    return f"{stage.steps} steps" if stage.stop is None else f"up to {stage.steps} steps"

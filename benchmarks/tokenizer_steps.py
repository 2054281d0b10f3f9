"""Training steps of tokenizer recipes on one GPU, with critics and all losses: images per second, memory, shares.

    python benchmarks/tokenizer_steps.py recipe:va-vae:align recipe:aligntok:perceive --batch 32 --out NAME.json

Each case is a stage of a recipe as it stands, on random images of the recipe's size, with random weights in place of
published ones, every loss and critic running from the first step, and no views of other sizes. What a part costs is the
time by which the step gets shorter without it; `--profile` says which kernels a step spends its time on.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from record import Record, fast_matrices, kernel_times, timed

from underpaint.config.engine import EngineConfig
from underpaint.config.recipe import plain_recipe, recipe_from_plain
from underpaint.config.schema import Recipe
from underpaint.config.stages import StageConfig
from underpaint.models.build import build_tokenizer
from underpaint.models.tokenizer import Tokenizer
from underpaint.registration.manager import manager
from underpaint.run.recipes import load_recipe
from underpaint.training.compilation import compile_modules, units_of
from underpaint.training.critics import CriticTrainer
from underpaint.training.engine import Engine
from underpaint.training.flops import count_flops
from underpaint.training.ranks import Ranks
from underpaint.training.tokenizer_stage import TokenizerModule, tokenizer_losses, tokenizer_sizes

PUBLISHED = {"VA-VAE, its own code, images per second on one H100": 5.6}


def with_random_encoder(name: str) -> str:
    """Return the name of an encoder with random weights, where it takes any."""
    takes = manager().catalogue.resolve("encoder", name).registration.takes_weights
    return f"{name.partition('@')[0]}@random" if takes else name


def offline(recipe: Recipe) -> Recipe:
    """Return a recipe that needs no files."""
    plain = plain_recipe(recipe)
    encoder = plain["tokenizer"]["encoder"]
    encoder = {"name": encoder} if isinstance(encoder, str) else dict(encoder)
    plain["tokenizer"]["encoder"] = {**encoder, "name": with_random_encoder(encoder["name"])}
    for stage, config in zip(plain["stages"], recipe.stages, strict=True):
        stage["losses"] = [
            offline_loss(loss, item.name, item.options)
            for loss, item in zip(stage["losses"], config.losses, strict=True)
        ]
        stage["equivariance"] = None
        stage["stop"] = None
    return recipe_from_plain(plain)


def offline_loss(loss: Any, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    plain = {"name": loss} if isinstance(loss, str) else dict(loss)
    plain |= {"start": 0}
    if plain.get("critic"):
        plain["critic"] = {**plain["critic"], "start": 0, "carry": None}
    if name == "lpips":
        plain |= {"weights": "random", "heads": None}
    found = manager().catalogue.config("loss", name, options, name)
    if isinstance(getattr(found, "encoder", None), str):
        plain["encoder"] = with_random_encoder(found.encoder)
    return plain


def variants(stage: StageConfig) -> dict[str, StageConfig]:
    """Return the stage whole, and without one of its parts each."""
    found = {"whole": stage}
    judges = [loss for loss in stage.losses if loss.critic is not None or loss.name.startswith("critics/")]
    if judges:
        rest = tuple(loss for loss in stage.losses if loss not in judges)
        # A stage may have nothing but critics.
        if rest:
            found["without critics"] = attrs.evolve(stage, losses=rest)
    for name in ("lpips", "vf", "ssim"):
        if any(loss.name == name for loss in stage.losses):
            found[f"without {name}"] = attrs.evolve(stage, losses=tuple(x for x in stage.losses if x.name != name))
    if any(loss.adaptive for loss in stage.losses):
        found["fixed weights"] = attrs.evolve(
            stage, losses=tuple(attrs.evolve(loss, adaptive=None) for loss in stage.losses)
        )
    return found


def make(
    recipe: Recipe, stage: StageConfig, batch: int, ranks: Ranks, compiled: bool
) -> tuple[Callable[[int], None], Callable[[], None], float]:
    """Return a training step, what ends it, and the FLOPs of an image."""
    tokenizer = build_tokenizer(recipe.tokenizer, 0)
    teacher = None
    if stage.teacher is not None:
        teacher = Tokenizer(*(copy.deepcopy(getattr(tokenizer, n)) for n in ("encoder", "adapter", "decoder")))
        teacher = teacher.to(ranks.device)
    height, width = recipe.data.height, recipe.data.width
    sizes = tokenizer_sizes(tokenizer, height, width)
    losses = tokenizer_losses(stage, 0, ranks.device, sizes, average=ranks.average)
    module = TokenizerModule(tokenizer.to(ranks.device), stage.trains, losses, teacher)
    one = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8, device=ranks.device)
    module.eval()
    flops = count_flops(module, lambda: module(one, 0)[0])
    module.train()
    if compiled:
        apart = module.decoder.last_layer() if "decoder" in losses.adaptive else None
        compile_modules(
            [*units_of(module.encoder), *units_of(module.decoder, apart), *losses.units()],
            differentiated_again=bool(losses.adaptive),
            passed=[module.decoder] if losses.reaches_back else [],
        )
    config = EngineConfig(precision="bf16", compile=compiled)
    critics = [
        CriticTrainer(item, optimizer=stage.optimizer, config=config, steps=1000, micro_batch=batch, ranks=ranks)
        for item in losses.adversaries
    ]
    engine = Engine(
        module,
        parts=module.learning,
        optimizer=stage.optimizer,
        config=config,
        steps=1000,
        micro_batch=batch,
        ema=stage.ema,
        ranks=ranks,
    )
    images = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, device=ranks.device)

    def step(index: int) -> None:
        loss, _, shown = engine(images, index)
        engine.backward(loss)
        engine.step()
        for critic in critics:
            critic.step(shown)

    def close() -> None:
        for critic in critics:
            critic.close()
        engine.close()

    return step, close, flops


def encoder_seconds(recipe: Recipe, batch: int, device: torch.device, steps: int) -> float:
    """Return the time of a forward pass of the encoder without gradients, compiled on a GPU."""
    encoder = build_tokenizer(recipe.tokenizer, 0).encoder.to(device).eval()
    if device.type == "cuda":
        encoder.compile(dynamic=False)
    images = torch.zeros(batch, 3, recipe.data.height, recipe.data.width, device=device)

    def run(index: int) -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            encoder(images)

    return timed(run, device, steps, 3)["median_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", metavar="RECIPE:STAGE")
    parser.add_argument("-o", "--override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--steps", type=int, default=8, help="in each of three groups")
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--whole-only", action="store_true", help="leave out what the parts cost")
    parser.add_argument("--profile", action="store_true", help="say which kernels a step spends its time on")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    fast_matrices()
    with Ranks("auto") as ranks:
        record = Record(
            ranks.device,
            arguments.out,
            precision="bf16 autocast; fp32 master weights, AdamW and EMA in the step; critics trained in it",
            flops="of the model and the losses it goes through, forward and backward; critics' own steps left out",
            weights="random",
            compiled=arguments.compile,
            published=PUBLISHED,
        )
        for name in arguments.stages:
            source, _, wanted = name.rpartition(":")
            recipe = offline(load_recipe(source, arguments.override))
            (stage,) = [item for item in recipe.stages if item.name == wanted]
            for batch in arguments.batch:
                measure(record, name, recipe, stage, batch, ranks, arguments)


def measure(
    record: Record,
    name: str,
    recipe: Recipe,
    stage: StageConfig,
    batch: int,
    ranks: Ranks,
    arguments: argparse.Namespace,
) -> None:
    """Time a stage at one batch: whole, and without each of its parts."""
    whole = None
    for label, variant in variants(stage).items():
        if arguments.whole_only and label != "whole":
            continue

        spent: dict[str, Any] = {}

        def run(variant: StageConfig = variant, spent: dict[str, Any] = spent) -> tuple[dict[str, float], float]:
            step, close, flops = make(recipe, variant, batch, ranks, arguments.compile)
            result = timed(step, ranks.device, arguments.steps, arguments.warm)
            if arguments.profile:
                spent.update(kernel_times(step, ranks.device))
            close()
            return result, flops

        row = record.measure(run, stage=name, variant=label, batch=batch)
        if row is not None and label == "whole":
            whole = row["median_s"]
            seconds = encoder_seconds(recipe, batch, ranks.device, arguments.steps)
            row["share_of_an_encoder_forward"] = round(seconds / whole, 3)
        elif row is not None and whole is not None:
            row["share_of_what_is_left_out"] = round(1.0 - row["median_s"] / whole, 3)
        if row is not None:
            row |= spent
        record.write()


if __name__ == "__main__":
    main()

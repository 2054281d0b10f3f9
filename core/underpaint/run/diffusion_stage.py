"""Runs the diffusion stage of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from underpaint.config.component import ComponentConfig
from underpaint.config.diffusion import DiffusionConfig
from underpaint.config.schema import Recipe
from underpaint.data.latents import LatentCache
from underpaint.data.loader import Batch
from underpaint.data.order import Blocks
from underpaint.data.transforms import to_tensor
from underpaint.diffusion.guidance import check_guidance, null_condition
from underpaint.errors import DataError
from underpaint.evaluation.measure import check_patch, check_sampling
from underpaint.interfaces.backbone import Backbone
from underpaint.interfaces.encoder import Encoder
from underpaint.interfaces.loss import StepSizes
from underpaint.models.build import build_generator_parts
from underpaint.models.folders import copy_generator, save_generator
from underpaint.models.fp8 import check_fp8, find_fp8, train_fp8
from underpaint.models.generator import Generator, SamplingSettings
from underpaint.models.tokenizer import Tokenizer
from underpaint.registration.manager import manager
from underpaint.run.data import RunData
from underpaint.run.joint_stage import take_denoiser
from underpaint.run.session import Session
from underpaint.run.training import StagePlan, train_stage
from underpaint.training.diffusion_stage import (
    LEARNING,
    DiffusionModule,
    StepNoise,
    check_companion,
    check_losses,
    diffusion_losses,
)
from underpaint.training.engine import Engine, check_parts
from underpaint.training.flops import count_flops
from underpaint.training.latent_batches import LatentBatch, latent_batches
from underpaint.training.loop import LoopResult
from underpaint.training.ranks import Ranks
from underpaint.weights import tensor_hash

__all__ = ["check_diffusion", "latent_images", "run_diffusion_stage"]

_PARTS = ("backbone.", "conditioner.")


def check_diffusion(recipe: Recipe, tokenizer: Tokenizer, data: RunData, device: torch.device) -> None:
    """Refuse a diffusion model that cannot be made for this tokenizer and data, before hours go into the tokenizer.

    Raises:
        ConfigError: Backbone, conditioner, losses, companion, optimizer, guidance, sampler, metrics of samples and
            latents do not fit each other, or the device cannot compute as the recipe asks.
        DataError: The conditioner needs captions, and there are none to train on or to sample for; or a part needs
            files that are not there.
    """
    config, guidance = recipe.diffusion, recipe.evaluation.guidance
    assert config is not None
    check_guidance(guidance, tokenizer.latent_channels)
    check_parts(config.optimizer, LEARNING, "diffusion.optimizer")
    image = (data.config.height, data.config.width)
    grid = tokenizer.grid(*image)
    # On the meta device it takes no memory for weights.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone, conditioner = build_generator_parts(
            config, tokenizer, grid=grid, classes=len(data.classes), has_text=data.train.has_text, seed=0
        )
    if conditioner.accepts == "text" and not data.validation.has_text:
        raise DataError(
            f"The conditioner '{config.conditioner.name}' needs captions, and the validation set, for whose captions "
            "samples are drawn, has none; give data.validation with texts."
        )
    if guidance.scale != 1.0 and guidance.weak is None and conditioner.accepts == "label":
        # That of a text is the empty one, for which the encoder would have to be read.
        null_condition(conditioner, 1, torch.device("meta"))
    sizes = StepSizes(image=image, latent_channels=tokenizer.latent_channels, grid=grid, hidden_width=backbone.width)
    _check_learning(config, backbone, sizes)
    check_sampling(recipe.evaluation, device, backbone)
    if config.time.shift in ("tokens", "flux"):
        check_patch("diffusion.time", config.time.patch, str(config.time.shift), backbone)
    if recipe.engine.precision == "fp8":
        check_fp8(device, train=True)


def _check_learning(config: DiffusionConfig, backbone: Backbone, sizes: StepSizes) -> None:
    cpu = torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        check_companion(config.backbone.name, backbone, _companion(config.companion, cpu), sizes.image)
        losses = diffusion_losses(config, cpu, sizes)
        check_losses(losses, config, backbone, sizes)


def run_diffusion_stage(session: Session, tokenizer: Tokenizer, cache: LatentCache) -> LoopResult:
    """Train the diffusion model on a latent cache and export the generator.

    Args:
        session: The run.
        tokenizer: With its statistics, on the CPU.
        cache: Its latents.

    Raises:
        ConfigError: Losses, backbone and companion do not fit each other.
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
    # Here, where the latents are known, it also compares the weaker model's with them.
    generator.protocol()
    image = (session.data.config.height, session.data.config.width)
    companion = _companion(config.companion, ranks.device)
    check_companion(config.backbone.name, backbone, companion, image)
    sizes = StepSizes(
        image=image,
        latent_channels=shape[0],
        grid=grid,
        hidden_width=backbone.width,
    )
    losses = diffusion_losses(config, ranks.device, sizes)
    module = DiffusionModule(backbone, conditioner, losses, path=config.path, predicts=config.predicts).to(ranks.device)
    if config.start is not None:
        take_denoiser(session, config.start, module)
    noise = StepNoise(config, shape, seed, ranks.device, backbone.companion)
    with_images = companion is not None or "inputs" in losses.needs
    black = torch.zeros((1, *image, 3), dtype=torch.uint8) if with_images else None
    one = LatentBatch(torch.zeros(1, *shape), _first_input(conditioner.accepts), slice(0, 1), black)
    flops = count_flops(module, lambda: _call(module, one, noise, companion, 0, ranks.device)[0])
    if recipe.engine.precision == "fp8":
        units = backbone.blocks() or [backbone]
        fitting = find_fp8(units, lambda: _call(module, one, noise, companion, 0, ranks.device), train=True)
        train_fp8(units, fitting)
    samples = session.data.train_indices[cache.positions]
    latents = recipe.latents
    blocks = Blocks(latents.block, latents.window) if latents.read == "sequential" else None

    def batches(start: int, micro_batches: int) -> Iterator[LatentBatch]:
        images = None
        if with_images:
            images = latent_images(session.data, samples, config.batch, seed, start, micro_batches, ranks, blocks)
        return latent_batches(
            cache,
            accepts=conditioner.accepts,
            batch=config.batch,
            accumulation=micro_batches,
            ranks=ranks,
            seed=seed,
            start=start,
            blocks=blocks,
            images=images,
            samples=samples,
        )

    def forward(engine: Engine, batch: LatentBatch, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor], None]:
        return (*_call(engine, batch, noise, companion, step, ranks.device), None)

    def export(state: dict[str, Tensor]) -> None:
        own = {name: tensor for name, tensor in state.items() if name.startswith(_PARTS)}
        save_generator(copy_generator(generator, own), session.folder.generator)

    return train_stage(
        session,
        StagePlan(
            name="diffusion",
            module=module,
            compiled=[*(backbone.blocks() or [backbone]), *losses.units()],
            parts=dict(zip(LEARNING, (backbone, conditioner, module.losses), strict=True)),
            optimizer=config.optimizer,
            steps=config.steps,
            batch=config.batch,
            ema=config.ema,
            flops=flops,
            batches=batches,
            forward=forward,
            export=export,
            origin=losses.hashes()
            | ({} if companion is None else {"companion": tensor_hash(companion.state_dict())})
            | {"tokenizer": cache.identity.tokenizer, "set of training images": cache.identity.data},
        ),
    )


def _call(
    module: Any, batch: LatentBatch, noise: StepNoise, companion: Encoder | None, step: int, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    epsilon, t, drop = noise.rows(step, batch.rows)
    images = None if batch.images is None else to_tensor(batch.images.to(device, non_blocking=True))
    pair = None
    if companion is not None:
        assert images is not None
        with torch.no_grad():
            pooled = companion(images).pooled
        assert pooled is not None
        pair = (pooled.float(), noise.companion(step, batch.rows))
    x0 = batch.latents.to(device, non_blocking=True)
    # Labels stay on the CPU: the conditioner checks their range there without waiting for the device.
    loss, terms = module(x0, batch.inputs, epsilon, t, drop, step, images=images, companion=pair)
    return loss, terms


def _companion(config: ComponentConfig | None, device: torch.device) -> Encoder | None:
    if config is None:
        return None
    encoder = manager().create("encoder", config.name, **config.options)
    assert isinstance(encoder, Encoder)
    return encoder.to(device).eval().requires_grad_(False)


def latent_images(
    data: RunData,
    samples: NDArray[np.int64],
    batch: int,
    seed: int,
    start: int,
    accumulation: int,
    ranks: Ranks,
    blocks: Blocks | None = None,
) -> Iterator[Batch]:
    """Return the images of the latents, as they were encoded.

    The readers shuffle as `latent_batches` does: by an `Order` of as many samples, the same seed and the same blocks.
    """
    plain = attrs.evolve(data.config, crop="center", resize=None, flip=False)
    same = attrs.evolve(data, config=plain, train_indices=samples)
    return same.train_batches(batch, seed=seed, start=start, accumulation=accumulation, ranks=ranks, blocks=blocks)


def _first_input(accepts: str) -> Tensor | list[str]:
    return [""] if accepts == "text" else torch.zeros(1, dtype=torch.int64)


def _facts(session: Session) -> dict[str, Any]:
    recipe = session.recipe
    config = recipe.diffusion
    assert config is not None
    origin = "" if config.start is None else f", from where stage {config.start} left it"
    return {
        "title": f"{recipe.name}: generator",
        "facts": [f"{config.backbone.name} trained for {config.steps} steps of {config.batch}{origin}."],
    }

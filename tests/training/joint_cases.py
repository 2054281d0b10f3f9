"""A tiny tokenizer and a tiny diffusion model that train together, for one process or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from stage_cases import ENCODER, SIZE, make_stage, make_tokenizer, pixels, share
from torch import Tensor

from underpaint.config.diffusion import DiffusionConfig
from underpaint.config.engine import EngineConfig, OptimizerConfig
from underpaint.config.stages import DenoiserConfig
from underpaint.config.structure import structure
from underpaint.models.build import build_generator_parts
from underpaint.training.diffusion_stage import DiffusionModule, StepNoise, diffusion_losses
from underpaint.training.engine import Engine
from underpaint.training.joint_stage import JointModule, LatentNorm
from underpaint.training.ranks import Ranks
from underpaint.training.tokenizer_stage import TokenizerModule, tokenizer_losses, tokenizer_sizes

BATCH = 4
REPA: dict[str, Any] = {
    "name": "repa",
    "weight": 0.5,
    "encoder": "tiny/vit@random",
    "options": ENCODER,
    "layer": 1,
    "projector": 16,
}


def settings(losses: Sequence[Any] = ("velocity", REPA), **options: Any) -> DiffusionConfig:
    backbone = {"name": "sit/S-1", "width": 32, "depth": 3, "heads": 2, **options}
    plain = {"backbone": backbone, "conditioner": "labels", "losses": list(losses), "dropout": 0.5}
    stage = attrs.evolve(make_stage(["l1"]), denoiser=structure(plain, DenoiserConfig, "denoiser"), batch=BATCH)
    return stage.diffusion()


def make_joint(
    *,
    losses: Sequence[Any] = ("velocity", REPA),
    alignment: float = 1.5,
    average: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    **options: Any,
) -> JointModule:
    tokenizer, config = make_tokenizer(), settings(losses, **options)
    sizes = tokenizer_sizes(tokenizer, SIZE, SIZE)
    device = torch.device("cpu")
    backbone, conditioner = build_generator_parts(config, tokenizer, grid=sizes.grid, classes=3, has_text=False, seed=5)
    # New blocks pass their input on, and gradients with it, past attention and MLP.
    for parameter in (p for p in backbone.parameters() if not p.any()):
        torch.nn.init.normal_(parameter, std=0.05)
    made = diffusion_losses(config, device, attrs.evolve(sizes, hidden_width=backbone.width), "denoiser")
    learner = TokenizerModule(
        tokenizer,
        ("encoder", "adapter", "decoder"),
        tokenizer_losses(make_stage(["l1"]), 0, device, sizes, average=average),
        also=frozenset({"latents"}),
    )
    denoiser = DiffusionModule(backbone, conditioner, made)
    return JointModule(learner, denoiser, LatentNorm(4, average=average), alignment=alignment)


def given(step: int = 0, rows: slice = slice(0, BATCH)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    noise = StepNoise(settings(), (4, SIZE // 8, SIZE // 8), 11, torch.device("cpu"))
    labels = torch.tensor([0, 1, 2, 1])
    return (labels[rows], *noise.rows(step, rows))


def joint_steps(ranks: Ranks) -> dict[int, Any]:
    """Train three steps at ZeRO 0 to 2."""
    results = {}
    size = BATCH // ranks.world_size
    rows = slice(ranks.rank * size, (ranks.rank + 1) * size)
    for zero in (0, 1, 2):
        module = make_joint(average=ranks.average)
        engine = Engine(
            module,
            parts=module.learning,
            optimizer=OptimizerConfig(lr=1e-3),
            config=EngineConfig(device="cpu", zero=zero),
            steps=20,
            micro_batch=size,
            ema=None,
            ranks=ranks,
        )
        found = []
        for step in range(3):
            loss, terms, _ = engine(share(pixels(seed=step), ranks), step, None, *given(step, rows))
            engine.backward(loss)
            norm = float(engine.step().grad_norm)
            values = torch.stack([loss.detach(), terms["alignment"], terms["repa"], terms["velocity"]])
            found.append([norm, *ranks.average(values).tolist()])
        results[zero] = (found, engine.state("raw"))
        engine.close()
    return results

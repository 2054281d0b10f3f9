"""What the tests of tokenizer stages share: a tiny tokenizer, its module, the plain way of balancing, several ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from underpaint.config.engine import EngineConfig, OptimizerConfig
from underpaint.config.losses import LossConfig
from underpaint.config.stages import EquivarianceConfig, GuardConfig, LoraConfig, StageConfig
from underpaint.config.structure import structure
from underpaint.config.tokenizer import TokenizerConfig
from underpaint.data.transforms import to_tensor
from underpaint.interfaces.decoder import Reconstruction
from underpaint.interfaces.loss import AdversarialLoss, StepTensors
from underpaint.models.build import build_tokenizer
from underpaint.models.tokenizer import Tokenizer
from underpaint.training.critics import CriticTrainer
from underpaint.training.engine import Engine
from underpaint.training.lora import merged
from underpaint.training.ranks import Ranks
from underpaint.training.terms import WeightedLosses
from underpaint.training.tokenizer_stage import TokenizerModule, tokenizer_losses, tokenizer_sizes

SIZE = 16
ENCODER = {"width": 48, "depth": 2, "heads": 2}
DECODER = {"base": 8, "blocks": 1, "multipliers": [1, 1, 1, 2]}
PATCHGAN = {"name": "critics/patchgan", "channels": 4, "layers": 2}
# Normalised sample by sample, so that a batch may be divided among ranks.
ALONE = {"name": "critics/multiscale", "channels": 4, "layers": 2, "scales": 1, "virtual_batch": 1}


def make_tokenizer(
    decoder: Mapping[str, Any] | None = None, adapter: Any = "aligntok/mlp", encoder: Mapping[str, Any] | None = None
) -> Tokenizer:
    plain = {
        "encoder": {"name": "tiny/vit@random", **ENCODER} if encoder is None else encoder,
        "adapter": adapter,
        "decoder": {"name": "ldm/decoder", **DECODER} if decoder is None else decoder,
        "latent_channels": 4,
    }
    return build_tokenizer(structure(plain, TokenizerConfig, "tokenizer"), seed=0)


def make_stage(losses: Sequence[Any], trains: Sequence[str] = ("encoder", "adapter", "decoder")) -> StageConfig:
    configs = tuple(structure(loss, LossConfig, "losses") for loss in losses)
    return StageConfig(name="one", trains=tuple(trains), losses=configs, steps=10)


def make_module(
    losses: Sequence[Any],
    trains: Sequence[str] = ("encoder", "adapter", "decoder"),
    *,
    size: tuple[int, int] = (SIZE, SIZE),
    tokenizer: Tokenizer | None = None,
    teacher: Tokenizer | None = None,
    equivariance: EquivarianceConfig | None = None,
    average: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> tuple[TokenizerModule, WeightedLosses]:
    model = make_tokenizer() if tokenizer is None else tokenizer
    torch.manual_seed(1)
    sizes = tokenizer_sizes(model, *size)
    made = tokenizer_losses(make_stage(losses, trains), 0, torch.device("cpu"), sizes, average=average)
    return TokenizerModule(model, trains, made, teacher, equivariance), made


def pixels(count: int = 4, height: int = SIZE, width: int = SIZE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def plainly(
    module: TokenizerModule, losses: WeightedLosses, shown: Tensor, step: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Balance as VQGAN's paper has it: differentiate each loss at the last layer, and weigh the losses themselves."""
    images = to_tensor(shown)
    features = module.encoder(images.to(next(module.parameters()).dtype))
    posterior = module.adapter(features)
    latents = posterior.sample()
    made = module.decoder(latents)
    tensors = StepTensors(
        step=step,
        inputs=images,
        images=images,
        encoder=module.encoder,
        features=features,
        posterior=posterior,
        latents=latents.float(),
        reconstruction=Reconstruction(made.image.float(), tuple(image.float() for image in made.pyramid)),
    )
    items = [item for item in losses.items if item.counts(step)]
    values = {item.key: sum(item.loss(tensors).values()) for item in items}

    def norm(value: Tensor, part: str) -> Tensor:
        return torch.autograd.grad(value, getattr(module, part).last_layer(), retain_graph=True)[0].norm()

    fixed = [i for i in items if i.config.adaptive is None and not isinstance(i.loss, AdversarialLoss)]
    image_losses = [i for i in fixed if i.key in ("l1", "mse", "ssim", "vfmvae_pyramid")]
    total, factors = torch.zeros(()), {}
    for item in items:
        weight: Any = item.config.weight
        adaptive = item.config.adaptive
        if adaptive is not None:
            reference = sum(i.config.weight * values[i.key] for i in image_losses)
            ratio = norm(reference, adaptive.at) / (norm(values[item.key], adaptive.at) + adaptive.eps)
            factors[item.key] = ratio.clamp(max=adaptive.limit).detach()
            weight = weight * factors[item.key] if adaptive.apply else weight
        total = total + weight * values[item.key]
    return total, factors


def gradients(module: TokenizerModule) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def make_engine(module: TokenizerModule, ranks: Ranks, *, zero: int = 0, batch: int = 4, **options: Any) -> Engine:
    return Engine(
        module,
        parts=module.learning,
        optimizer=OptimizerConfig(lr=1e-3),
        config=EngineConfig(
            device="cpu",
            zero=zero,
            accumulation=options.pop("accumulation", 1),
            precision=options.pop("precision", "fp32"),
        ),
        steps=20,
        micro_batch=batch // ranks.world_size,
        ema=options.pop("ema", None),
        ranks=ranks,
        **options,
    )


def make_critic(
    losses: WeightedLosses,
    ranks: Ranks,
    *,
    zero: int = 0,
    batch: int = 4,
    lr: float = 1e-3,
    guard: GuardConfig | None = None,
) -> Any:
    return CriticTrainer(
        losses.adversaries[0],
        optimizer=OptimizerConfig(lr=lr),
        config=EngineConfig(device="cpu", zero=zero),
        steps=20,
        micro_batch=batch // ranks.world_size,
        ranks=ranks,
        guard=guard,
    )


# ------------------------------------------------------------------------------------------ on several ranks


BALANCED = (
    {"name": "l1", "weight": 2.0},
    {"name": "mse", "weight": 0.5, "adaptive": "decoder"},
    {"name": "vf", "weight": 0.3, "adaptive": "adapter"},
)


def share(whole: Tensor, ranks: Ranks) -> Tensor:
    return whole.chunk(ranks.world_size)[ranks.rank]


def balanced_steps(ranks: Ranks) -> dict[int, Any]:
    """Train three steps with adaptive weights at ZeRO 0 to 2."""
    results = {}
    for zero in (0, 1, 2):
        module, _ = make_module(BALANCED, average=ranks.average)
        engine = make_engine(module, ranks, zero=zero)
        rows = []
        for step in range(3):
            loss, terms, _ = engine(share(pixels(seed=step), ranks), step)
            engine.backward(loss)
            norm = float(engine.step().grad_norm)
            rows.append((loss.item(), norm, *(float(terms[f"factor_{key}"]) for key in ("mse", "vf"))))
        results[zero] = (rows, engine.state("raw"))
        engine.close()
    return results


def critic_steps(ranks: Ranks) -> dict[int, Any]:
    """Train model and critic for three steps at ZeRO 0 to 2."""
    results = {}
    for zero in (0, 1, 2):
        module, losses = make_module(["l1", {**ALONE, "adaptive": "decoder"}], average=ranks.average)
        critic = make_critic(losses, ranks, zero=zero)
        engine = make_engine(module, ranks, zero=zero)
        rows = []
        for step in range(3):
            loss, terms, shown = engine(share(pixels(seed=step), ranks), step)
            engine.backward(loss)
            engine.step()
            judged = critic.step(shown)
            rows.append([loss.item(), float(terms["adversarial"]), *(float(judged[k]) for k in sorted(judged))])
        own = {name: p.detach().clone() for name, p in losses.adversaries[0].loss.critic.named_parameters()}
        results[zero] = (rows, own)
        critic.close()
        engine.close()
    return results


def lora_engine(ranks: Ranks, zero: int, **options: Any) -> tuple[Engine, dict[str, Tensor]]:
    """Make an engine whose encoder has low-rank pairs, one of its weights large enough for ZeRO 3 to partition.

    Returns:
        The engine, and the encoder's weights before.
    """
    plain = {"name": "tiny/vit@random", "width": 192, "depth": 1, "heads": 2}
    tokenizer = make_tokenizer(encoder=plain)
    frozen = {f"encoder.{name}": value.clone() for name, value in tokenizer.encoder.state_dict().items()}
    module, _ = make_module(["l1"], tokenizer=tokenizer)
    torch.manual_seed(5)
    module.add_lora(LoraConfig(rank=3, alpha=6.0))
    return make_engine(module, ranks, zero=zero, ema=0.5, **options), frozen


def lora_steps(engine: Engine, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        loss, _, _ = engine(share(pixels(seed=step), engine.ranks), step)
        engine.backward(loss)
        assert engine.step().applied


def lora_stages(ranks: Ranks) -> dict[int, Any]:
    """Train three steps with low-rank pairs at ZeRO 0 to 3; the plain weights of the encoder's average."""
    results = {}
    for zero in range(4):
        engine, _ = lora_engine(ranks, zero)
        lora_steps(engine, 0, 3)
        state = engine.state("ema")
        plain = merged(engine.module, state) if ranks.is_main else {}
        results[zero] = {name: value for name, value in plain.items() if name.startswith("encoder.")}
        engine.close()
    return results


JUMPS = {2: 100.0, 4: 8.0, 5: 70.0, 7: 100.0, 8: 100.0}
"""Factor of the loss in some steps. From 8 to 70 is less than ten times; from 70 to 1 to 100 and on is one jump."""


def jumping(losses: WeightedLosses, ranks: Ranks) -> None:
    """Multiply the first loss in the steps of `JUMPS`; those by 100 on the last rank alone."""
    real = losses.items[0].loss.forward

    def forward(step: StepTensors) -> dict[str, Tensor]:
        factor = JUMPS.get(step.step, 1.0)
        if factor == 100.0 and ranks.rank != ranks.world_size - 1:
            factor = 1.0
        return {name: value * factor for name, value in real(step).items()}

    losses.items[0].loss.forward = forward


def guarded_engine(ranks: Ranks, zero: int, after: int = 0) -> tuple[Engine, Callable[[int], Tensor]]:
    module, losses = make_module(["l1"])
    jumping(losses, ranks)
    keep = module.add_guard(GuardConfig(after=after), ranks.average)
    assert keep is not None
    return make_engine(module, ranks, zero=zero, ema=0.5), keep


def guarded_steps(engine: Engine, keep: Callable[[int], Tensor] | None, steps: Sequence[int]) -> list[bool | None]:
    """Train some steps; with a guard, return which it dropped."""
    dropped = []
    for step in steps:
        torch.manual_seed(step)
        loss, _, _ = engine(share(pixels(seed=step), engine.ranks), step)
        engine.backward(loss, None if keep is None else keep(step))
        result = engine.step()
        assert result.skipped == bool(result.dropped)
        dropped.append(result.dropped)
    return dropped


def guarded_stages(ranks: Ranks) -> dict[int, Any]:
    """Train nine steps with a guard at ZeRO 0 to 3, and those that it should not drop without one."""
    results = {}
    for zero in range(4):
        engine, keep = guarded_engine(ranks, zero)
        dropped = guarded_steps(engine, keep, range(9))
        found = engine.state("raw"), engine.state("ema"), engine.train_state
        engine.close()
        engine, _ = guarded_engine(ranks, zero)
        nothing = guarded_steps(engine, None, [0, 1, 3, 4, 5, 6, 8])
        results[zero] = dropped, nothing, found, (engine.state("raw"), engine.state("ema"), engine.train_state)
        engine.close()
    return results

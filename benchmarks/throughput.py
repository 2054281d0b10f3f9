"""Training steps of the real sizes on one GPU: images per second, MFU and memory, beside a plain PyTorch loop.

    python benchmarks/throughput.py --out benchmarks/results/NAME.json

Each case runs the module that the recipes train, through the DeepSpeed engine that trains them, on random images or
latents. The baseline is the same module with torch's own fused AdamW, autocast and a foreach EMA, in the same process.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from underpaint.config.component import ComponentConfig
from underpaint.config.diffusion import DiffusionConfig
from underpaint.config.engine import EngineConfig, OptimizerConfig
from underpaint.config.losses import LossConfig
from underpaint.config.stages import StageConfig
from underpaint.config.tokenizer import TokenizerConfig
from underpaint.interfaces.loss import StepSizes
from underpaint.models.build import build_generator_parts, build_tokenizer
from underpaint.models.tokenizer import Tokenizer
from underpaint.training.diffusion_stage import DiffusionModule, StepNoise, diffusion_losses
from underpaint.training.engine import Engine
from underpaint.training.flops import count_flops, peak_flops
from underpaint.training.ranks import Ranks
from underpaint.training.tokenizer_stage import TokenizerModule, tokenizer_losses, tokenizer_sizes

Step = Callable[[Any, int], Tensor]


@attrs.frozen(kw_only=True)
class Case:
    name: str
    batch: int
    sweep: bool = False
    make: Callable[[torch.device, int], tuple[nn.Module, list[nn.Module], Step]]


def tokenizer_config(encoder: str, base: int) -> TokenizerConfig:
    return TokenizerConfig(
        encoder=ComponentConfig(name=encoder),
        adapter=ComponentConfig(name="aligntok/mlp"),
        decoder=ComponentConfig(name="ldm/decoder", options={"base": base}),
        latent_channels=32,
    )


def tokenizer_case(stage: StageConfig, encoder: str, base: int, size: int) -> Callable[..., Any]:
    def make(device: torch.device, batch: int) -> tuple[nn.Module, list[nn.Module], Step]:
        tokenizer = build_tokenizer(tokenizer_config(encoder, base), 0)
        teacher = None
        if stage.teacher is not None:
            teacher = Tokenizer(*(copy.deepcopy(getattr(tokenizer, n)) for n in ("encoder", "adapter", "decoder")))
            teacher = teacher.to(device)
        losses = tokenizer_losses(stage, 0, device, tokenizer_sizes(tokenizer, size, size))
        module = TokenizerModule(tokenizer.to(device), stage.trains, losses, teacher)
        images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)

        def step(call: Any, index: int) -> Tensor:
            loss: Tensor = call(images, index)[0]
            return loss

        return module, [module.encoder, module.decoder], step

    return make


def diffusion_case(backbone: str, grid: int, **options: Any) -> Callable[..., Any]:
    def make(device: torch.device, batch: int) -> tuple[nn.Module, list[nn.Module], Step]:
        config = DiffusionConfig(
            backbone=ComponentConfig(name=backbone, options=options),
            conditioner=ComponentConfig(name="labels"),
            steps=1000,
            batch=batch,
        )
        tokenizer = build_tokenizer(tokenizer_config("timm/test_vit@random", 32), 0)
        shape = (grid, grid)
        net, conditioner = build_generator_parts(config, tokenizer, grid=shape, classes=1000, has_text=False, seed=0)
        sizes = StepSizes(image=(grid * 16, grid * 16), latent_channels=32, grid=shape, hidden_width=net.width)
        module = DiffusionModule(net, conditioner, diffusion_losses(config, device, sizes)).to(device)
        latents = torch.randn(batch, 32, *shape, device=device)
        labels = torch.randint(0, 1000, (batch,), device=device)
        noise = StepNoise(config, (32, *shape), 0, device)

        def step(call: Any, index: int) -> Tensor:
            epsilon, t, drop = noise.rows(index, slice(0, batch))
            loss: Tensor = call(latents, labels, epsilon, t, drop, index)[0]
            return loss

        return module, net.blocks(), step

    return make


def l1_stage(name: str, trains: tuple[Any, ...], teacher: str | None = None) -> StageConfig:
    losses = (LossConfig(name="l1"), *((LossConfig(name="aligntok/semantic"),) if teacher else ()))
    return StageConfig(name=name, trains=trains, losses=losses, steps=1000, teacher=teacher)


def cases(tiny: bool) -> list[Case]:
    encoder, base, size = (
        ("timm/vit_large_patch14_dinov2@random", 128, 256) if not tiny else ("timm/test_vit@random", 32, 64)
    )
    align = l1_stage("align", ("adapter", "decoder"))
    perceive = l1_stage("perceive", ("encoder", "adapter", "decoder"), teacher="align")
    batch = 32 if not tiny else 2
    sit = diffusion_case("sit/XL-1", 16) if not tiny else diffusion_case("sit/S-1", 4, depth=2, width=64, heads=4)
    return [
        Case(
            name="AlignTok stage 1: DINOv2-L frozen, 41 M decoder, 256 px",
            batch=batch,
            make=tokenizer_case(align, encoder, base, size),
        ),
        Case(
            name="AlignTok stage 2: DINOv2-L trained, teacher, 256 px",
            batch=batch,
            make=tokenizer_case(perceive, encoder, base, size),
        ),
        Case(name="SiT-XL/1 on 16×16×32 latents", batch=128 if not tiny else 4, sweep=True, make=sit),
    ]


def timed(run: Callable[[int], None], device: torch.device, steps: int, warm: int) -> dict[str, float]:
    for index in range(warm):
        run(index)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for index in range(steps):
        start = time.perf_counter()
        run(warm + index)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "memory_gib": memory}


def plain_loop(case: Case, device: torch.device, *, compiled: bool, steps: int, warm: int) -> dict[str, float]:
    module, blocks, step = case.make(device, case.batch)
    if compiled:
        for block in blocks:
            block.compile()
    params = [p for p in module.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in params]
    adam = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda")

    def run(index: int) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = step(module, index)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 1e-4)

    return timed(run, device, steps, warm)


def engine_loop(case: Case, ranks: Ranks, *, zero: Any, compiled: bool, steps: int, warm: int) -> dict[str, float]:
    module, blocks, step = case.make(ranks.device, case.batch)
    if compiled:
        for block in blocks:
            block.compile()
    engine = Engine(
        module,
        parts={},
        optimizer=OptimizerConfig(),
        config=EngineConfig(zero=zero, precision="bf16"),
        steps=1000,
        micro_batch=case.batch,
        ema=0.9999,
        ranks=ranks,
    )

    def run(index: int) -> None:
        engine.backward(step(engine, index))
        engine.step()

    result = timed(run, ranks.device, steps, warm)
    engine.close()
    return result


def variants(
    case: Case, ranks: Ranks, arguments: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], tuple[dict[str, float], float]]]]:
    flops = flops_per_image(case, ranks.device)
    for compiled in (False, True) if not arguments.tiny else (False,):
        label = "compiled" if compiled else "eager"
        common = {"compiled": compiled, "steps": arguments.steps, "warm": arguments.warm}
        if case.sweep or not compiled:
            yield f"plain torch, {label}", lambda c=common: (plain_loop(case, ranks.device, **c), flops)
        for zero in (0, 1) if case.sweep else (0,):
            yield (
                f"engine ZeRO-{zero}, {label}",
                lambda z=zero, c=common: (engine_loop(case, ranks, zero=z, **c), flops),
            )


def flops_per_image(case: Case, device: torch.device) -> float:
    module, _, step = case.make(device, 1)
    return count_flops(module, lambda: step(module, 0))


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    libraries = ("torch", "deepspeed", "timm", "underpaint")
    return {"device": name, "python": platform.python_version(), **{lib: version(lib) for lib in libraries}}


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the script on a CPU")
    parser.add_argument("--only", help="run only the cases whose name contains this")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    with Ranks("auto") as ranks:
        peak, source = peak_flops(ranks.device, "bf16")
        record: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(ranks.device),
            "peak": {"flops": peak, "source": source},
            "convention": "FLOP = 2 multiply-adds, forward and backward counted; recomputation not counted",
            "precision": "bf16 autocast; fp32 master weights, AdamW and EMA in the step; gradients clipped",
            "steps": arguments.steps,
            "warm": arguments.warm,
            "rows": [],
        }
        for case in cases(arguments.tiny):
            if arguments.only and arguments.only not in case.name:
                continue
            baseline = None
            for label, run in variants(case, ranks, arguments):
                row: dict[str, Any] = {"case": case.name, "variant": label, "batch": case.batch}
                try:
                    result, flops = run()
                except torch.OutOfMemoryError:
                    row["failed"] = "out of memory"
                else:
                    rate = case.batch / result["median_s"]
                    baseline = baseline or rate
                    row["images_per_second"] = round(rate, 1)
                    row["ratio_to_plain_eager"] = round(rate / baseline, 3)
                    row["mfu"] = round(rate * flops / peak, 4)
                    row["gflop_per_image"] = round(flops / 1e9, 1)
                    row |= {key: round(value, 4) for key, value in result.items()}
                torch._dynamo.reset()
                if ranks.device.type == "cuda":
                    torch.cuda.empty_cache()
                record["rows"].append(row)
                # Rewritten after every row, so that a run cut short keeps what it measured.
                arguments.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                print(
                    f"{case.name:56s} {label:28s} {row.get('images_per_second', row.get('failed'))!s:>14} img/s "
                    f"MFU {row.get('mfu', float('nan')):6.1%} {row.get('memory_gib', float('nan')):6.1f} GiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()

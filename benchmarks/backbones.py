"""Training steps of any registered backbone on one device, beside LightningDiT's own code.

    python benchmarks/backbones.py --backbone lightningdit/XL-1 --batch 128 256 --out benchmarks/results/NAME.json

Our step: bf16 weights with fp32 masters, blocks compiled, AdamW and EMA in one pass over flat buffers. Levers to
compare: `--attention` (backend and padded head channels, such as ``cudnn:96``), `--memory-budget`, `--mode`, `--tune`
and the backbone's own options (``-o recompute=true``). `--attention-only` times attention alone.

Where the folder `.peers/lightningdit` holds a clone of hustvl/LightningDiT, its model of the same size is timed in the
same process, as published and with torch's fused AdamW and a foreach EMA. Both learn from random latents of one shape,
with the same loss, and one group of steps runs without a word to the host, as a training does.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
import yaml
from throughput import commit, machine
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import underpaint
from underpaint.training.flops import count_flops, peak_flops

CLASSES = 1000
RATE, BETAS, EPSILON, DECAY = 2e-4, (0.9, 0.95), 1e-8, 0.9999
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@attrs.frozen(kw_only=True)
class Shape:
    batch: int
    channels: int
    grid: tuple[int, int]
    device: torch.device


# ------------------------------------------------------------------------------------------------------- our step


class OnePass:
    """AdamW without decay, EMA and rounding to bf16, in one pass over flat buffers with fp32 masters."""

    def __init__(self, params: list[nn.Parameter], compiled: bool) -> None:
        # Weights start at multiples of 128 bytes, as matrix kernels want them.
        starts = [0]
        for p in params:
            starts.append(starts[-1] + -(-p.numel() // 64) * 64)
        device = params[0].device
        self.masters = torch.zeros(starts[-1], device=device)
        self.weights, self.grads = (torch.zeros_like(self.masters, dtype=torch.bfloat16) for _ in range(2))
        for p, start in zip(params, starts, strict=False):
            part = slice(start, start + p.numel())
            self.masters[part].copy_(p.detach().flatten())
            p.data = self.weights[part].view(p.shape)
            p.grad = self.grads[part].view(p.shape)
        self.weights.copy_(self.masters)
        self.first, self.second = torch.zeros_like(self.masters), torch.zeros_like(self.masters)
        self.average = self.masters.clone()
        self.powers = torch.ones(2, device=device)
        self.betas = torch.tensor(BETAS, device=device)
        self._update = torch.compile(one_pass) if compiled else one_pass

    def step(self) -> None:
        self.powers.mul_(self.betas)
        self._update(self.masters, self.weights, self.grads, self.first, self.second, self.average, 1.0 - self.powers)


@torch.no_grad()
def one_pass(
    masters: Tensor, weights: Tensor, grads: Tensor, first: Tensor, second: Tensor, average: Tensor, corrections: Tensor
) -> None:
    gradient = grads.float()
    first.lerp_(gradient, 1.0 - BETAS[0])
    second.lerp_(gradient.square(), 1.0 - BETAS[1])
    masters.sub_(RATE * (first / corrections[0]) / ((second / corrections[1]).sqrt() + EPSILON))
    average.lerp_(masters, 1.0 - DECAY)
    weights.copy_(masters)
    grads.zero_()


def noisy(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_t, t and noise in our direction of time."""
    t = torch.sigmoid(torch.randn(len(latents), device=latents.device))
    noise = torch.randn_like(latents)
    return torch.lerp(latents, noise, t.view(-1, 1, 1, 1)), t, noise


def build(name: str, options: dict[str, Any], shape: Shape) -> tuple[Any, Any]:
    width = underpaint.registry().config("backbone", name, options).width
    conditioner = underpaint.create("conditioner", "labels", width=width, classes=CLASSES)
    context = {"latent_channels": shape.channels, "grid": shape.grid, "pooled_dim": width, "token_dim": 0}
    return underpaint.create("backbone", name, **context, **options), conditioner


def our_step(name: str, options: dict[str, Any], shape: Shape, arguments: argparse.Namespace) -> Callable[[], None]:
    model = nn.ModuleList(build(name, options, shape)).to(shape.device).train()
    backbone, conditioner = model
    if arguments.compile:
        for block in backbone.blocks():
            block.compile(mode=arguments.mode)
    optimizer = OnePass([p for p in model.parameters() if p.requires_grad], arguments.compile)
    latents = torch.randn(shape.batch, shape.channels, *shape.grid, device=shape.device)
    labels = torch.randint(0, CLASSES, (shape.batch,), device=shape.device)

    def step() -> None:
        x_t, t, noise = noisy(latents)
        drop = torch.rand(shape.batch, device=shape.device) < 0.1
        with torch.autocast(shape.device.type, torch.bfloat16):
            velocity = backbone(x_t, t, conditioner(labels, drop)).velocity
        F.mse_loss(velocity.float(), noise - latents).backward()
        optimizer.step()

    return step


def forward_backward_flops(name: str, options: dict[str, Any], shape: Shape) -> float:
    one = attrs.evolve(shape, batch=1, device=torch.device("meta"))
    with one.device, sdpa_kernel(SDPBackend.MATH):
        backbone, conditioner = build(name, options, one)
        x, t = torch.empty(1, one.channels, *one.grid), torch.empty(1)
        labels = torch.zeros(1, dtype=torch.long)
        return count_flops(backbone, lambda: backbone(x, t, conditioner(labels)).velocity.sum())


# ----------------------------------------------------------------------------------------------------- their step


def peer_model(folder: Path, name: str, options: dict[str, Any], shape: Shape) -> nn.Module:
    """Make LightningDiT's own model of the size of one of our names."""
    # Their file of norms imports parts of fairscale that it does not use.
    for module in ("", ".nn", ".nn.model_parallel", ".nn.model_parallel.initialize", ".nn.model_parallel.layers"):
        sys.modules.setdefault(f"fairscale{module}", types.ModuleType(f"fairscale{module}"))
    layers: Any = sys.modules["fairscale.nn.model_parallel.layers"]
    layers.ColumnParallelLinear = layers.ParallelEmbedding = layers.RowParallelLinear = None
    sys.path.insert(0, str(folder))
    from models.lightningdit import LightningDiT

    config = underpaint.registry().config("backbone", name, options)
    return LightningDiT(
        input_size=shape.grid[0],
        patch_size=config.patch,
        in_channels=shape.channels,
        hidden_size=config.width,
        depth=config.depth,
        num_heads=config.heads,
        num_classes=CLASSES,
        use_qknorm=config.qk_norm,
        use_swiglu=True,
        use_rope=True,
        use_rmsnorm=True,
        wo_shift=not config.shift,
    )


def peer_step(folder: Path, name: str, options: dict[str, Any], shape: Shape, *, tuned: bool) -> Callable[[], None]:
    model = peer_model(folder, name, options, shape).to(shape.device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in model.parameters()]
    fused = tuned and shape.device.type == "cuda"
    adam = torch.optim.AdamW(trained, lr=RATE, betas=BETAS, weight_decay=0.0, fused=fused or None)
    latents = torch.randn(shape.batch, shape.channels, *shape.grid, device=shape.device)
    labels = torch.randint(0, CLASSES, (shape.batch,), device=shape.device)

    def step() -> None:
        x_t, t, noise = noisy(latents)
        with torch.autocast(shape.device.type, torch.bfloat16):
            # Their time and their velocity run the other way.
            velocity = model(x_t, 1.0 - t, labels)
        F.mse_loss(velocity.float(), latents - noise).backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            if tuned:
                torch._foreach_lerp_(average, list(model.parameters()), 1.0 - DECAY)
            else:
                for mean, p in zip(average, model.parameters(), strict=True):
                    mean.mul_(DECAY).add_(p, alpha=1.0 - DECAY)

    return step


# ------------------------------------------------------------------------------------------------------ attention


def padded_attention(channels: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return an attention over B×N×heads×c that runs with so many channels a head, the added ones zero."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = q.shape[-1]
        q, k, v = (F.pad(x, (0, channels - own)).transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=own**-0.5)
        return mixed.transpose(1, 2)[..., :own].flatten(2)

    return attend


@contextlib.contextmanager
def attention(choice: str | None) -> Iterator[None]:
    """Choose ``BACKEND`` or ``BACKEND:CHANNELS``; channels are padded in LightningDiT's and DiT^DH's blocks only."""
    if choice is None:
        yield
        return
    from underpaint_lightningdit import block

    backend, _, channels = choice.partition(":")
    own = block.attend
    if channels:
        block.attend = padded_attention(int(channels))
    try:
        with sdpa_kernel(BACKENDS[backend]):
            yield
    finally:
        block.attend = own


def attention_step(choice: str, heads: int, channels: int, tokens: int, shape: Shape) -> Callable[[], None]:
    def fresh() -> Tensor:
        shapes = (shape.batch, tokens, 3, heads, channels)
        return torch.randn(shapes, device=shape.device, dtype=torch.bfloat16, requires_grad=True)

    qkv, given = fresh(), torch.randn(shape.batch, tokens, heads * channels, device=shape.device, dtype=torch.bfloat16)
    _, _, wide = choice.partition(":")
    attend = padded_attention(int(wide) if wide else channels)
    if shape.device.type == "cuda":
        attend = torch.compile(attend)

    def step() -> None:
        attend(*qkv.unbind(2)).backward(given)
        qkv.grad = None

    return step


# --------------------------------------------------------------------------------------------------------- timing


def timed(step: Callable[[], None], shape: Shape, steps: int, warm: int) -> dict[str, float]:
    cuda = shape.device.type == "cuda"
    for _ in range(warm):
        step()
    seconds = []
    for _ in range(3):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / steps)
    result = {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
    if cuda:
        result["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def clear(device: torch.device) -> None:
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Record:
    """Rows of a run. Written after every one, so that a run cut short keeps what it measured."""

    def __init__(self, head: dict[str, Any], out: Path | None) -> None:
        self.content = {**head, "rows": []}
        self._out = out
        self._peer = 0.0

    def measure(
        self,
        variant: str,
        make: Callable[[], Callable[[], None]],
        shape: Shape,
        arguments: argparse.Namespace,
        flops: float = 0.0,
    ) -> None:
        clear(shape.device)
        row: dict[str, Any] = {"variant": variant, "batch": shape.batch}
        try:
            result = timed(make(), shape, arguments.steps, arguments.warm)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            # A backend that cannot run a shape says so with a RuntimeError; the other rows are still wanted.
            row["failed"] = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)[:200]
        else:
            rate = shape.batch / result["median_s"]
            row |= {"images_per_second": round(rate, 1), **{key: round(x, 5) for key, x in result.items()}}
            if flops:
                row["mfu"] = round(rate * flops / self.content["peak"]["flops"], 4)
            if variant.startswith("peer, as published"):
                self._peer = max(self._peer, rate)
            if self._peer:
                row["ratio_to_peer"] = round(rate / self._peer, 3)
        self.content["rows"].append(row)
        if self._out is not None:
            self._out.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        said = row.get("failed") or f"{row['images_per_second']:10.1f} img/s  {1e3 * row['median_s']:9.2f} ms"
        said += "".join(f"  {key} {row[key]:.3f}" for key in ("mfu", "ratio_to_peer", "memory_gib") if key in row)
        print(f"{variant:64s} batch {shape.batch:5d}  {said}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="lightningdit/XL-1")
    parser.add_argument("-o", "--option", action="append", default=[], metavar="KEY=VALUE", help="of the backbone")
    parser.add_argument("--channels", type=int, default=32, help="of the latent")
    parser.add_argument("--grid", type=int, nargs=2, default=(16, 16), help="of the latent")
    parser.add_argument("--batch", type=int, nargs="+", default=[128])
    parser.add_argument("--steps", type=int, default=20, help="in each of three groups")
    parser.add_argument("--warm", type=int, default=8)
    parser.add_argument("--attention", nargs="+", default=[None], metavar="BACKEND[:CHANNELS]")
    parser.add_argument("--attention-only", action="store_true", help="time attention alone, of the backbone's shape")
    parser.add_argument("--memory-budget", type=float, help="share of activations that compiled blocks may keep")
    parser.add_argument("--mode", help="torch.compile's, such as max-autotune-no-cudagraphs")
    parser.add_argument("--tune", action="store_true", help="coordinate descent over the compiled kernels' tiles")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--peers", type=Path, default=Path(".peers"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    for choice in arguments.attention:
        if choice is not None and choice.partition(":")[0] not in BACKENDS:
            parser.error(f"'{choice}' is no attention; backends are {', '.join(BACKENDS)}")
    return arguments


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    options = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in arguments.option)}
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if arguments.memory_budget is not None:
        torch._functorch.config.activation_memory_budget = arguments.memory_budget
    torch._inductor.config.coordinate_descent_tuning = arguments.tune
    peak, source = peak_flops(device, "bf16")
    shapes = [
        Shape(batch=batch, channels=arguments.channels, grid=tuple(arguments.grid), device=device)
        for batch in arguments.batch
    ]
    flops = forward_backward_flops(arguments.backbone, options, shapes[0])
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    record = Record(
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(device),
            "peak": {"flops": peak, "source": source},
            "convention": "FLOP = 2 multiply-adds, forward and backward counted; recomputation not counted",
            "gflop_per_image": round(flops / 1e9, 2),
            "settings": settings,
        },
        arguments.out,
    )
    config = underpaint.registry().config("backbone", arguments.backbone, options)
    label = f"{arguments.backbone} {' '.join(arguments.option)}".strip()
    if arguments.attention_only:
        tokens = arguments.grid[0] * arguments.grid[1] // getattr(config, "patch", 1) ** 2
        for shape in shapes:
            for choice in arguments.attention:
                chosen = choice or "flash"
                with sdpa_kernel(BACKENDS[chosen.partition(":")[0]]):
                    record.measure(
                        f"attention {chosen}, {config.heads} heads of {config.width // config.heads}, {tokens} tokens",
                        lambda c=chosen, s=shape: attention_step(
                            c, config.heads, config.width // config.heads, tokens, s
                        ),
                        shape,
                        arguments,
                    )
        return
    folder = arguments.peers / "lightningdit"
    has_peer = folder.is_dir() and arguments.backbone.startswith("lightningdit/")
    if not has_peer:
        print("No peer is timed: there is no folder", folder, "or the backbone is none of its.", flush=True)
    for shape in shapes:
        for tuned in (False, True) if has_peer else ():
            record.measure(
                f"peer, {'fused AdamW, foreach EMA' if tuned else 'as published'}, {label}",
                lambda s=shape, u=tuned: peer_step(folder, arguments.backbone, options, s, tuned=u),
                shape,
                arguments,
                flops,
            )
    for shape in shapes:
        for choice in arguments.attention:
            with attention(choice):
                record.measure(
                    f"ours, {label}" + (f", attention {choice}" if choice else ""),
                    lambda s=shape: our_step(arguments.backbone, options, s, arguments),
                    shape,
                    arguments,
                    flops,
                )


if __name__ == "__main__":
    main()

"""Training steps and forward passes of any registered backbone on one GPU, beside LightningDiT's own code.

    python benchmarks/backbones.py --backbone lightningdit/XL-1 -o qk_norm=false --batch 128 256 --out NAME.json

Our step is what a training does: the module of the diffusion stage, its blocks compiled, through the DeepSpeed engine
with fp32 masters, AdamW and EMA. `plain` is the same module with torch's fused AdamW, autocast and a foreach
EMA in its place. Forward passes are those of sampling: no gradients, bf16 weights, half of a batch without its label.
`--profile` says which kinds of kernels a step spends its time on.

Where the folder `.peers/lightningdit` holds a clone of hustvl/LightningDiT, its model of the same size is timed in the
same process, as published and with torch's fused AdamW and a foreach EMA, on latents of the same shape with the same
loss.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import lightningdit_peer
import torch
import torch._functorch.config
import yaml
from record import Record, fast_matrices, kernel_times, timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from underpaint.config.component import ComponentConfig
from underpaint.config.diffusion import DiffusionConfig
from underpaint.config.engine import EngineConfig, OptimizerConfig
from underpaint.config.tokenizer import TokenizerConfig
from underpaint.interfaces.loss import StepSizes
from underpaint.models.build import build_generator_parts, build_tokenizer
from underpaint.models.fp8 import find_fp8, freeze_fp8, train_fp8
from underpaint.training.compilation import compile_modules
from underpaint.training.diffusion_stage import DiffusionModule, StepNoise, diffusion_losses
from underpaint.training.engine import Engine
from underpaint.training.flops import count_flops
from underpaint.training.ranks import Ranks

CLASSES, DECAY = 1000, 0.9999
OPTIMIZER = OptimizerConfig(lr=2e-4, betas=(0.9, 0.95), clip=None)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@attrs.frozen(kw_only=True)
class Shape:
    backbone: str
    options: dict[str, Any]
    channels: int
    grid: tuple[int, int]


def build(shape: Shape, batch: int, device: torch.device) -> tuple[DiffusionModule, Callable[[Any, int], Tensor]]:
    """Make the module of a diffusion stage, and its loss on random latents by step."""
    config = DiffusionConfig(
        backbone=ComponentConfig(name=shape.backbone, options=shape.options),
        conditioner=ComponentConfig(name="labels"),
        steps=1000,
        batch=batch,
        optimizer=OPTIMIZER,
    )
    tokenizer = build_tokenizer(
        TokenizerConfig(
            encoder=ComponentConfig(name="timm/test_vit@random"),
            adapter=ComponentConfig(name="aligntok/mlp"),
            decoder=ComponentConfig(name="ldm/decoder", options={"base": 32}),
            latent_channels=shape.channels,
        ),
        0,
    )
    # Weights are made where they are used: on the host they take longer than what is measured.
    with device:
        net, conditioner = build_generator_parts(
            config, tokenizer, grid=shape.grid, classes=CLASSES, has_text=False, seed=0
        )
    sizes = StepSizes(image=(16, 16), latent_channels=shape.channels, grid=shape.grid, hidden_width=net.width)
    module = DiffusionModule(net, conditioner, diffusion_losses(config, device, sizes)).to(device)
    latents = torch.randn(batch, shape.channels, *shape.grid, device=device)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    noise = StepNoise(config, (shape.channels, *shape.grid), 0, device)

    def loss(call: Any, index: int) -> Tensor:
        epsilon, t, drop = noise.rows(index, slice(0, batch))
        value: Tensor = call(latents, labels, epsilon, t, drop, index)[0]
        return value

    return module, loss


def engine_step(
    module: DiffusionModule, loss: Callable[[Any, int], Tensor], batch: int, ranks: Ranks
) -> Callable[[int], None]:
    engine = Engine(
        module,
        parts={},
        optimizer=OPTIMIZER,
        config=EngineConfig(precision="bf16"),
        steps=1000,
        micro_batch=batch,
        ema=DECAY,
        ranks=ranks,
    )

    def step(index: int) -> None:
        engine.backward(loss(engine, index))
        engine.step()

    return step


def plain_step(
    module: DiffusionModule, loss: Callable[[Any, int], Tensor], device: torch.device
) -> Callable[[int], None]:
    params = [p for p in module.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in params]
    adam = torch.optim.AdamW(
        params, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, weight_decay=0.0, fused=device.type == "cuda"
    )

    def step(index: int) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(module, index)
        torch.autograd.backward(value)
        adam.step()
        adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 1.0 - DECAY)

    return step


def forward_pass(module: DiffusionModule, shape: Shape, batch: int, device: torch.device) -> Callable[[int], None]:
    """Return the pass that a step of sampling with guidance takes, of `batch` latents in all."""
    backbone = module.backbone
    x = torch.randn(batch, shape.channels, *shape.grid, device=device, dtype=torch.bfloat16)
    t = torch.rand(1, device=device).expand(batch)
    drop = torch.arange(batch, device=device) >= batch // 2
    with torch.no_grad():
        condition = module.conditioner(torch.randint(0, CLASSES, (batch,), device=device), drop)

    def run(index: int) -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            backbone(x, t, condition)

    return run


@contextlib.contextmanager
def attention(choice: str | None) -> Iterator[None]:
    """Let torch's attention use this backend, or the one it chooses."""
    with sdpa_kernel(BACKENDS[choice]) if choice else contextlib.nullcontext():
        yield


def attention_alone(shape: Shape, config: Any, batch: int, device: torch.device) -> Callable[[int], None]:
    """Return forward and backward of one layer's attention, its queries and keys turned by their positions."""
    from underpaint_lightningdit.block import attend
    from underpaint_lightningdit.kernels import rotated_heads
    from underpaint_lightningdit.positions import grid_rotations

    rows, columns = (side // config.patch for side in shape.grid)
    rotation = grid_rotations(rows, columns, config.width // config.heads).to(device, torch.float32)
    qkv = torch.randn(batch, rows * columns, 3 * config.width, device=device, dtype=torch.bfloat16, requires_grad=True)
    given = torch.randn(batch, rows * columns, config.width, device=device, dtype=torch.bfloat16)

    def mix(qkv: Tensor) -> Tensor:
        return attend(*rotated_heads(qkv, None, rotation))

    call = torch.compile(mix, dynamic=False) if device.type == "cuda" else mix

    def step(index: int) -> None:
        call(qkv).backward(given)
        qkv.grad = None

    return step


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="lightningdit/XL-1")
    parser.add_argument("-o", "--option", action="append", default=[], metavar="KEY=VALUE", help="of the backbone")
    parser.add_argument("--channels", type=int, default=32, help="of the latent")
    parser.add_argument("--grid", type=int, nargs=2, default=(16, 16), help="of the latent")
    parser.add_argument("--batch", type=int, nargs="*", default=[128], help="of training steps")
    parser.add_argument("--forward", type=int, nargs="*", default=[], metavar="BATCH", help="also time forward passes")
    parser.add_argument("--steps", type=int, default=20, help="in each of three groups")
    parser.add_argument("--warm", type=int, default=8)
    parser.add_argument("--attention", nargs="+", default=[None], choices=[*BACKENDS])
    parser.add_argument("--precision", nargs="+", choices=["bf16", "fp8"], default=["bf16"])
    parser.add_argument("--attention-only", action="store_true", help="time a layer's attention alone")
    parser.add_argument("--plain", action="store_true", help="also time our module without the engine")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--memory-budget", type=float, help="share of activations that compiled blocks may keep")
    parser.add_argument("--tune", action="store_true", help="coordinate descent over the compiled kernels' tiles")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--peers", type=Path, default=Path(".peers"))
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


class Bench:
    """The rows of one run."""

    def __init__(self, arguments: argparse.Namespace, ranks: Ranks) -> None:
        options = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in arguments.option)}
        self.shape = Shape(
            backbone=arguments.backbone, options=options, channels=arguments.channels, grid=tuple(arguments.grid)
        )
        self.arguments, self.ranks, self.device = arguments, ranks, ranks.device
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        self.record = Record(ranks.device, arguments.out, settings=settings)
        self.flops = 0.0
        self.peer: dict[str, float] = {}
        self.precision = "bf16"

    def row(self, what: str, variant: str, batch: int, make: Callable[[], Callable[[int], Any]]) -> None:
        """Time `what`, a step or a forward pass, as `make` gives it."""
        flops = {"step": self.flops, "forward": self.flops / 3}.get(what, 0.0)

        def measured() -> tuple[dict[str, float], float]:
            # Compiled code does not ask which attention is chosen: that of the row before would be run again.
            torch.compiler.reset()
            run = make()
            result = timed(run, self.device, self.arguments.steps, self.arguments.warm)
            if self.arguments.profile:
                spent.update(kernel_times(run, self.device))
            return result, flops

        spent: dict[str, Any] = {}
        row = self.record.measure(measured, variant=variant, what=what, batch=batch)
        if row is not None:
            rate = row["images_per_second"]
            if variant == "peer, as published":
                self.peer[what] = max(self.peer.get(what, 0.0), rate)
            if what in self.peer:
                row["ratio_to_peer"] = round(rate / self.peer[what], 3)
            row |= spent
        self.record.write()

    def count(self) -> None:
        """Count the arithmetic of an image, with attention as matrix products."""
        with sdpa_kernel(SDPBackend.MATH):
            module, loss = build(self.shape, 1, self.device)
            self.flops = count_flops(module, lambda: loss(module, 0))

    def ours(self, batch: int, *, train: bool = True) -> tuple[DiffusionModule, Callable[[Any, int], Tensor]]:
        """Make our module as it is trained, or as it samples, and its loss."""
        module, loss = build(self.shape, batch, self.device)
        backbone, blocks = module.backbone, module.backbone.blocks()
        fitting = find_fp8(blocks, lambda: self.one(module), train=train) if self.precision == "fp8" else set()
        if train and fitting:
            train_fp8(blocks, fitting)
        if not train:
            backbone.eval().to(torch.bfloat16)
            freeze_fp8(blocks, fitting)
        if self.arguments.compile:
            compile_modules(blocks, differentiated_again=False)
        return module, loss

    def one(self, module: DiffusionModule) -> None:
        """Run the backbone on one latent."""
        x, t = torch.zeros(1, self.shape.channels, *self.shape.grid), torch.zeros(1)
        label = torch.zeros(1, dtype=torch.long)
        module.backbone(x.to(self.device), t.to(self.device), module.conditioner(label.to(self.device)))

    def alone(self) -> None:
        """Time attention alone."""
        import underpaint

        config = underpaint.registry().config("backbone", self.shape.backbone, self.shape.options)
        for batch in self.arguments.batch:
            for choice in self.arguments.attention:
                with attention(choice):
                    self.row(
                        "attention",
                        choice or "as torch chooses",
                        batch,
                        lambda b=batch: attention_alone(self.shape, config, b, self.device),
                    )

    def peers(self) -> None:
        """Time LightningDiT's own code."""
        folder = self.arguments.peers / "lightningdit"
        if not folder.is_dir() or not self.shape.backbone.startswith("lightningdit/"):
            print("No peer is timed: there is no folder", folder, "or the backbone is none of its.", flush=True)
            return
        make = lightningdit_peer.maker(folder, self.shape, CLASSES, self.device)
        for batch in self.arguments.batch:
            for tuned in (False, True):
                name = "peer, fused AdamW and foreach EMA" if tuned else "peer, as published"
                self.row("step", name, batch, lambda b=batch, u=tuned: make.step(b, OPTIMIZER, DECAY, tuned=u))
        for batch in self.arguments.forward:
            self.row("forward", "peer, as published", batch, lambda b=batch: make.forward(b))

    def run(self) -> None:
        """Time everything that was asked for."""
        if self.arguments.attention_only:
            self.alone()
            return
        self.count()
        self.peers()
        for precision, choice in itertools.product(self.arguments.precision, self.arguments.attention):
            self.precision = precision
            name = f"ours, {precision}" + (f", attention {choice}" if choice else "")
            with attention(choice):
                for batch in self.arguments.batch:
                    self.row("step", name, batch, lambda b=batch: engine_step(*self.ours(b), b, self.ranks))
                    if self.arguments.plain:
                        self.row(
                            "step", f"{name}, plain", batch, lambda b=batch: plain_step(*self.ours(b), self.device)
                        )
                for batch in self.arguments.forward:
                    self.row(
                        "forward",
                        name,
                        batch,
                        lambda b=batch: forward_pass(self.ours(b, train=False)[0], self.shape, b, self.device),
                    )


def main() -> None:
    """Parse and run."""
    arguments = parse()
    fast_matrices()
    # Its entries do not know which attention was chosen.
    torch._functorch.config.enable_autograd_cache = False
    if arguments.memory_budget is not None:
        torch._functorch.config.activation_memory_budget = arguments.memory_budget
    torch._inductor.config.coordinate_descent_tuning = arguments.tune
    with Ranks("auto") as ranks:
        Bench(arguments, ranks).run()


if __name__ == "__main__":
    main()

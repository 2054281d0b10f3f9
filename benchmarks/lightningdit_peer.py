"""LightningDiT's own model, from a clone of its repository, on latents like ours."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import underpaint
from underpaint.config.engine import OptimizerConfig

__all__ = ["Maker", "maker"]


def maker(folder: Path, shape: Any, classes: int, device: torch.device) -> Maker:
    """Import the clone in `folder`."""
    # Their file of norms imports parts of fairscale that it does not use.
    for module in ("", ".nn", ".nn.model_parallel", ".nn.model_parallel.initialize", ".nn.model_parallel.layers"):
        sys.modules.setdefault(f"fairscale{module}", types.ModuleType(f"fairscale{module}"))
    layers: Any = sys.modules["fairscale.nn.model_parallel.layers"]
    layers.ColumnParallelLinear = layers.ParallelEmbedding = layers.RowParallelLinear = None
    sys.path.insert(0, str(folder))
    from models.lightningdit import LightningDiT

    return Maker(LightningDiT, shape, classes, device)


class Maker:
    """Makes steps and forward passes of the model whose size one of our names has."""

    def __init__(self, network: Any, shape: Any, classes: int, device: torch.device) -> None:
        self._network, self._shape, self._classes, self._device = network, shape, classes, device

    def _model(self) -> nn.Module:
        shape = self._shape
        config = underpaint.registry().config("backbone", shape.backbone, shape.options)
        with self._device:
            model: nn.Module = self._network(
                input_size=shape.grid[0],
                patch_size=config.patch,
                in_channels=shape.channels,
                hidden_size=config.width,
                depth=config.depth,
                num_heads=config.heads,
                num_classes=self._classes,
                use_qknorm=config.qk_norm,
                use_swiglu=True,
                use_rope=True,
                use_rmsnorm=True,
                wo_shift=not config.shift,
            )
        return model.to(self._device)

    def step(self, batch: int, optimizer: OptimizerConfig, decay: float, *, tuned: bool) -> Callable[[int], None]:
        """Return a training step: bf16 autocast, AdamW and EMA as published, or fused and foreach where `tuned`."""
        model = self._model().train()
        params = [p for p in model.parameters() if p.requires_grad]
        average = [p.detach().clone() for p in model.parameters()]
        fused = tuned and self._device.type == "cuda"
        adam = torch.optim.AdamW(params, lr=optimizer.lr, betas=optimizer.betas, weight_decay=0.0, fused=fused or None)
        latents = torch.randn(batch, self._shape.channels, *self._shape.grid, device=self._device)
        labels = torch.randint(0, self._classes, (batch,), device=self._device)

        def run(index: int) -> None:
            # Their time and their velocity run the other way.
            t = torch.sigmoid(torch.randn(batch, device=self._device))
            noise = torch.randn_like(latents)
            x_t = torch.lerp(noise, latents, t.view(-1, 1, 1, 1))
            with torch.autocast(self._device.type, torch.bfloat16):
                velocity = model(x_t, t, labels)
            F.mse_loss(velocity.float(), latents - noise).backward()
            adam.step()
            adam.zero_grad(set_to_none=True)
            with torch.no_grad():
                if tuned:
                    torch._foreach_lerp_(average, list(model.parameters()), 1.0 - decay)
                else:
                    for mean, p in zip(average, model.parameters(), strict=True):
                        mean.mul_(decay).add_(p, alpha=1.0 - decay)

        return run

    def forward(self, batch: int) -> Callable[[int], None]:
        """Return a forward pass without gradients under bf16 autocast, as its sampling runs it."""
        model = self._model().eval()
        x = torch.randn(batch, self._shape.channels, *self._shape.grid, device=self._device)
        labels = torch.randint(0, self._classes, (batch,), device=self._device)
        t = torch.rand(batch, device=self._device)

        def run(index: int) -> None:
            with torch.no_grad(), torch.autocast(self._device.type, torch.bfloat16):
                model(x, t, labels)

        return run

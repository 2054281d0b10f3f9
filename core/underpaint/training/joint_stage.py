"""A tokenizer and a diffusion model that train together (Leng et al. 2025, REPA-E).

The diffusion loss alone, let into the tokenizer, makes latents that are easy to denoise and say little. So its gradient
stops at the latent, and the alignment of the diffusion model's hidden states with an encoder is what reaches the
tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from underpaint.interfaces.loss import StepTensors
from underpaint.models.tokenizer import LatentStatistics
from underpaint.training.diffusion_stage import LEARNING, DiffusionModule
from underpaint.training.tokenizer_stage import TokenizerModule, shown

__all__ = ["JointModule", "LatentNorm", "running_statistics"]

_EPS = 1e-4


class LatentNorm(nn.Module):
    """Standardises latents that change while they are learned from: batch normalisation without learned scale.

    In training each channel is standardised by the mean and variance of the micro-batch, over all ranks, and these
    move a running mean and variance along, which `running` uses. The first batch sets them. A batch that is not
    finite leaves them alone.

    Args:
        channels: Channels d of the latents.
        momentum: Share of the newest batch in the running moments.
        average: Averages a tensor over the ranks, whose batches are of one size.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(
        self, channels: int, *, momentum: float = 0.1, average: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> None:
        super().__init__()
        self._momentum = momentum
        self._average = average
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LatentNorm:
        """Move the moments to another device, in the type they have: half of it would round each small change away."""
        before = (self.mean, self.variance)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.mean, self.variance = (
            old.to(new.device) for old, new in zip(before, (self.mean, self.variance), strict=True)
        )
        return self

    def forward(self, latents: Tensor) -> Tensor:
        """Standardise B×d×h×w latents: by their own moments in training, by the running ones in evaluation."""
        if not self.training:
            return self.running(latents)
        with torch.no_grad():
            mean = self._average(latents.mean((0, 2, 3)))
            variance = self._average((latents - _spread(mean)).square().mean((0, 2, 3)))
            self._follow(mean, variance)
        return _standard(latents, mean, variance)

    def running(self, latents: Tensor) -> Tensor:
        """Standardise B×d×h×w latents by the running moments."""
        return _standard(latents, self.mean, self.variance)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        # Decided on the device: the moments are the same on all ranks, and nobody waits for the answer.
        good = mean.isfinite().all() & variance.isfinite().all()
        share = torch.where(self.batches == 0, 1.0, self._momentum)
        for kept, new in ((self.mean, mean), (self.variance, variance)):
            kept.copy_(torch.where(good, torch.lerp(kept, new.to(kept.dtype), share.to(kept.dtype)), kept))
        self.batches += good


def _spread(moments: Tensor) -> Tensor:
    return moments.view(1, -1, 1, 1)


def _standard(latents: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return (latents - _spread(mean)) * _spread((variance + _EPS).rsqrt())


def running_statistics(mean: Tensor, variance: Tensor) -> LatentStatistics:
    """Return running moments as a tokenizer keeps them."""
    std = (variance.double() + _EPS).sqrt()
    return LatentStatistics(mean=tuple(mean.double().tolist()), std=tuple(std.tolist()), count=0, data="")


class JointModule(nn.Module):
    """What the engine trains: a tokenizer with its losses, and a diffusion model on its latents.

    One step has three parts, of one image batch, one draw of latents, times and noise:

    1. The tokenizer's losses, as in any stage.
    2. The alignments, computed from latents that are standardised by the running moments, with every condition kept.
       Their gradient at the latent, times `alignment`, goes on into the tokenizer; the diffusion model gets none.
    3. The diffusion model's losses, from detached latents that are standardised by the moments of the batch.

    Args:
        tokenizer: The tokenizer's module, which was made with ``also={"latents"}``.
        denoiser: The diffusion model's module.
        norm: Standardises the latents.
        alignment: Weight of the alignments for the tokenizer.
    """

    def __init__(
        self, tokenizer: TokenizerModule, denoiser: DiffusionModule, norm: LatentNorm, *, alignment: float
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.denoiser = denoiser
        self.norm = norm
        self._alignment = alignment

    @property
    def learning(self) -> dict[str, nn.Module]:
        """The modules that learn, by their names in ``optimizer.parts``; ``losses`` holds the heads of both sides."""
        heads = nn.ModuleList([self.tokenizer.losses, self.denoiser.losses])
        sides = dict(zip(LEARNING, (self.denoiser.backbone, self.denoiser.conditioner, heads), strict=True))
        return {**self.tokenizer.learning, **sides}

    def forward(
        self,
        pixels: Tensor,
        step: int,
        labels: Tensor | None,
        inputs: Tensor | Sequence[str],
        noise: Tensor,
        t: Tensor,
        drop: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor], StepTensors]:
        """Compute the loss of B×H×W×3 uint8 images.

        Args:
            pixels: The images.
            step: Optimizer step.
            labels: B labels on the images' device, for the tokenizer's losses, or None.
            inputs: B labels or texts, as the conditioner accepts.
            noise: B×d×h×w.
            t: B noise fractions.
            drop: B booleans, True for the null condition in the third part.

        Returns:
            The weighted loss; its terms, with the sum of the alignments of the second part as ``alignment``; what
            critics judge, detached.
        """
        total, terms, tensors = self.tokenizer.judge(pixels, step, labels)
        assert tensors.latents is not None
        assert tensors.inputs is not None
        x0 = self.norm(tensors.latents.detach())
        aligned = self._align(tensors.latents, inputs, noise, t, step, tensors.inputs)
        diffusion, others = self.denoiser(x0, inputs, noise, t, drop, step, images=tensors.inputs)
        total = total + diffusion
        terms |= {name if name not in terms else f"{name}_denoiser": value for name, value in others.items()}
        if aligned is not None:
            value, carrier = aligned
            total = total + self._alignment * value + (carrier - carrier.detach())
            terms["alignment"] = value
        return total, terms, shown(tensors)

    def _align(self, latents: Tensor, *rest: Any) -> tuple[Tensor, Tensor] | None:
        """Return the alignments' sum, and a scalar whose gradient at the latents is the weighted one of that sum.

        The graph through the diffusion model is differentiated here, at the latents alone, and let go before that of
        the third part is made: its weights get no gradient, and no hook of the engine sees this pass.
        """
        start = self.norm.running(latents.detach()).requires_grad_(True)
        # A view of the leaf: the FLOP counter hooks what modules are given, and autograd.grad refuses hooks on leaves.
        value = self.denoiser.alignment(start.view_as(start), *rest)
        if value is None:
            return None
        (gradient,) = torch.autograd.grad(self._alignment * value, start)
        return value.detach(), (self.norm.running(latents) * gradient).sum()

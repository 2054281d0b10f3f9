"""What all adversarial losses share: the two sides, and the gradient penalty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from underpaint import AdversarialLoss, StepTensors
from underpaint_critics.config import Objective
from underpaint_critics.objectives import critic_terms, model_term

__all__ = ["Adversary", "Judgement"]

Judgement = list[list[Tensor]]
"""For each scale of a critic its maps, shallow to deep; the last of each are the logits, with the batch first."""


class _Options(Protocol):
    @property
    def objective(self) -> Objective: ...
    @property
    def r1(self) -> float: ...
    @property
    def r1_interval(self) -> int: ...


class Adversary(AdversarialLoss):
    """An adversarial loss around a critic that turns what `look` gives into a `Judgement`.

    The model's term is ``adversarial``. The critic's are ``critic_real`` and ``critic_fake``, each times `share`, and
    ``critic_r1``, which is 0 in the steps between two penalties.

    Attributes:
        share: Factor of the critic's two terms. Adam does not feel it, and published codes differ.
    """

    needs = frozenset({"images", "reconstruction"})
    share: ClassVar[float] = 0.5

    def __init__(self, config: _Options, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic
        self._objective = config.objective
        self._r1 = config.r1
        self._interval = config.r1_interval

    def units(self) -> Sequence[nn.Module]:
        """Return what the loss holds, unless R1 differentiates through it a second time: no compiled graph can be."""
        return () if self._r1 else self.held

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return the model's terms; gradients reach the reconstruction alone, and the critic is left as it is."""
        assert step.reconstruction is not None
        fake = self.judge(self.look(step.reconstruction.image))
        return {"adversarial": model_term(self._objective, _logits(fake)), **self.further_terms(fake, step)}

    def criticise(self, step: StepTensors) -> dict[str, Tensor]:
        """Return the critic's terms; gradients reach the critic alone."""
        assert step.images is not None
        assert step.reconstruction is not None
        images = step.images.detach()
        shown = self.as_shown(step.reconstruction.image.detach().to(images.dtype))
        with torch.no_grad():
            seen = self.look(torch.cat((images, shown)))
        real: Judgement = self.critic(tuple(part[: len(images)] for part in seen))
        fake: Judgement = self.critic(tuple(part[len(images) :] for part in seen))
        on_real, on_fake = critic_terms(self._objective, _logits(real), _logits(fake))
        terms = {"critic_real": self.share * on_real, "critic_fake": self.share * on_fake}
        if self._r1:
            due = step.step % self._interval == 0
            terms["critic_r1"] = self._interval * self._penalty(images) if due else torch.zeros_like(on_real)
        return terms

    def look(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return what the critic is given of B×3×H×W images in [-1, 1], batch first; differentiable."""
        return (images,)

    def as_shown(self, reconstruction: Tensor) -> Tensor:
        """Return the reconstruction as the critic learns on it."""
        return reconstruction

    def further_terms(self, fake: Judgement, step: StepTensors) -> dict[str, Tensor]:
        """Return terms of the model beside ``adversarial``, from the judgement of the reconstruction."""
        return {}

    def judge(self, seen: tuple[Tensor, ...]) -> Judgement:
        """Ask the critic without touching it."""
        # Detached copies stand in for its parameters: these get no gradient, and what an engine hooked onto them is
        # not called. Its buffers are copied because those of a spectral norm change with every pass.
        state = {name: parameter.detach() for name, parameter in self.critic.named_parameters()}
        state |= {name: buffer.detach().clone() for name, buffer in self.critic.named_buffers()}
        judgement: Judgement = functional_call(self.critic, state, (seen,))
        return judgement

    def _penalty(self, images: Tensor) -> Tensor:
        """Return γ/2 of the mean over images of ‖∇ₓD(x)‖², where D(x) is the mean of an image's logits."""
        x = images.clone().requires_grad_(True)
        # Fused attention has no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            judgement: Judgement = self.critic(self.look(x))
            verdict = torch.stack([value.float().flatten(1).mean(1) for value in _logits(judgement)]).mean(0)
            (slope,) = torch.autograd.grad(verdict.sum(), x, create_graph=True)
        return 0.5 * self._r1 * slope.float().square().flatten(1).sum(1).mean()


def _logits(judgement: Judgement) -> list[Tensor]:
    return [maps[-1] for maps in judgement]

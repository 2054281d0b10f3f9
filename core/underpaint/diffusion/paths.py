"""Paths between data and noise, what a network can predict on them, and how one is read as another.

On every path x_t = α(t)·x0 + σ(t)·ε, and t runs from 0 (data) to 1 (noise). Samplers know the linear path alone; a
network of another path is asked at the time of the same signal-to-noise ratio, for the state rescaled to that path.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal

import attrs
import torch
from torch import Tensor

from underpaint.config.diffusion import PathName, Predicts
from underpaint.diffusion.companion import network
from underpaint.interfaces.backbone import Backbone
from underpaint.interfaces.conditioner import Condition

__all__ = ["PATHS", "Coefficients", "Path", "Quantity", "Velocity", "linear_velocity"]

Quantity = Predicts | Literal["score"]

Velocity = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t of the linear path, t, condition) to the linear path's velocity ε − x0, and what `network` puts below it."""

# Where α or σ vanishes, one of data and noise cannot be told from the other: they are not divided by less than this.
_SMALLEST = 1e-3
# A network's error is divided as well. DDPM's last step has an α of 0.0063, and no published sampler goes below it.
_KNOWN = 6e-3


@attrs.frozen
class Coefficients:
    """α, σ and their derivatives with respect to t, at B times."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    def for_latents(self, like: Tensor) -> Coefficients:
        """Return them shaped to multiply B×d×h×w latents."""
        shape = (-1, *[1] * (like.ndim - 1))
        return Coefficients(*(value.reshape(shape) for value in attrs.astuple(self, recurse=False)))


class Path(ABC):
    """α(t) and σ(t)."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """Return α, σ, α', σ' at noise fractions of any shape."""

    @abstractmethod
    def time(self, linear: Tensor) -> Tensor:
        """Return the time at which this path has the signal-to-noise ratio that the linear path has at `linear`."""

    def mix(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t for B×d×h×w latents, or B×C vectors, and noise of their shape at B times."""
        c = self.coefficients(t).for_latents(x0)
        return c.alpha * x0 + c.sigma * noise

    def quantity(self, of: Quantity, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what a perfect network would predict, in the shape of x0.

        ``velocity`` is dx_t/dt = α'·x0 + σ'·ε; ``noise`` is ε; ``data`` is x0; ``score`` is −ε/σ, the gradient of the
        log-density of x_t given x0.
        """
        if of == "noise":
            return noise
        if of == "data":
            return x0
        c = self.coefficients(t).for_latents(x0)
        if of == "score":
            return -noise / c.sigma.clamp(min=_SMALLEST)
        return c.d_alpha * x0 + c.d_sigma * noise

    def split(self, given: Quantity, value: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return data and noise, each B×d×h×w, from one prediction and the state it was made for.

        Exact where neither has to be divided by an α or σ below 0.006. There the one that cannot be known is taken as
        zero, the mean of standardised latents and of noise: the division would leave little but the error of `value`,
        hundreds of times as large.
        """
        c = self.coefficients(t).for_latents(x_t)
        if given == "data":
            return value, _quotient(x_t - c.alpha * value, c.sigma)
        if given == "velocity":
            determinant = c.alpha * c.d_sigma - c.d_alpha * c.sigma
            return (
                (c.d_sigma * x_t - c.sigma * value) / determinant,
                (c.alpha * value - c.d_alpha * x_t) / determinant,
            )
        noise = value if given == "noise" else -c.sigma.clamp(min=_SMALLEST) * value
        return _quotient(x_t - c.sigma * noise, c.alpha), noise


def _quotient(dividend: Tensor, divisor: Tensor) -> Tensor:
    known = divisor >= _KNOWN
    return torch.where(known, dividend / torch.where(known, divisor, 1.0), 0.0)


class Linear(Path):
    """α = 1 − t, σ = t: rectified flow."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return α, σ, α', σ'."""
        one = torch.ones_like(t)
        return Coefficients(1.0 - t, t, -one, one)

    def time(self, linear: Tensor) -> Tensor:
        """Return `linear`."""
        return linear


class Cosine(Path):
    """α = cos(πt/2), σ = sin(πt/2): the trigonometric path (GVP in SiT)."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return α, σ, α', σ'."""
        half = math.pi / 2
        alpha, sigma = torch.cos(half * t), torch.sin(half * t)
        return Coefficients(alpha, sigma, -half * sigma, half * alpha)

    def time(self, linear: Tensor) -> Tensor:
        """Return (2/π)·atan(t/(1 − t))."""
        return torch.atan2(linear, 1.0 - linear) * (2 / math.pi)


class VariancePreserving(Path):
    """α = exp(−t²(β1 − β0)/4 − tβ0/2), σ² = 1 − α², with β from 0.1 to 20 (Song et al. 2021, appendix C).

    Data are not wholly gone at t = 1: α is 0.0066 there. Noisier states of the linear path are taken as those of t = 1.
    """

    _low = 0.1
    _high = 20.0

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return α, σ, α', σ'; σ', which is infinite at t = 0, as at σ = 10⁻³ below that."""
        slope = self._high - self._low
        log_alpha = -0.25 * slope * t.square() - 0.5 * self._low * t
        alpha = torch.exp(log_alpha)
        sigma = torch.sqrt(-torch.expm1(2.0 * log_alpha))
        d_alpha = -0.5 * (self._low + slope * t) * alpha
        return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma.clamp(min=_SMALLEST))

    def time(self, linear: Tensor) -> Tensor:
        """Solve α/σ = (1 − t)/t, a quadratic in the time of this path."""
        slope = self._high - self._low
        decay = 0.5 * torch.log1p((linear / (1.0 - linear)).square())
        decay = decay.clamp(max=0.25 * slope + 0.5 * self._low)
        return 2.0 * decay / (0.5 * self._low + torch.sqrt(0.25 * self._low**2 + slope * decay))


PATHS: Mapping[PathName, Path] = {"linear": Linear(), "cosine": Cosine(), "vp": VariancePreserving()}


def linear_velocity(backbone: Backbone, path: PathName, predicts: Predicts) -> Velocity:
    """Return the linear path's velocity by a backbone that was trained for `predicts` on `path`.

    The backbone's output stands in `Prediction.velocity`, whatever it was trained to be. Where it has a companion, x_t
    and the velocity are latent and vector as one tensor (`join`); where it has learned a variance, that stands in as
    many channels below the velocity (`network`).
    """
    run = network(backbone)
    if path == "linear" and predicts == "velocity":
        return run
    own = PATHS[path]

    def velocity(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        time = own.time(t)
        c = own.coefficients(time)
        # The lengths of (α, σ): their ratio is α'/α of the two paths, and stays right where VP has no such ratio.
        scale = torch.hypot(c.alpha, c.sigma) / torch.hypot(1.0 - t, t)
        state = x_t * scale.reshape(-1, *[1] * (x_t.ndim - 1)).to(x_t.dtype)
        output = run(state, time, condition).to(x_t.dtype)
        predicted, rest = output[:, : x_t.shape[1]], output[:, x_t.shape[1] :]
        x0, noise = own.split(predicts, predicted, state, time)
        return torch.cat((noise - x0, rest), dim=1) if backbone.variance else noise - x0

    return velocity

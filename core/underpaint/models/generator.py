"""The generator: tokenizer, backbone, conditioner and how to sample from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from underpaint.config.schema import ComponentConfig, GuidanceConfig
from underpaint.diffusion.guidance import guided_field
from underpaint.errors import DataError
from underpaint.interfaces.backbone import Backbone
from underpaint.interfaces.conditioner import Conditioner
from underpaint.models.tokenizer import Tokenizer
from underpaint.registration.manager import manager

__all__ = ["Generator", "SamplingSettings"]


@attrs.frozen(kw_only=True)
class SamplingSettings:
    """How samples are drawn.

    Attributes:
        sampler: Solver.
        guidance: Classifier-free guidance.
    """

    sampler: ComponentConfig = attrs.field(factory=lambda: ComponentConfig(name="euler"))
    guidance: GuidanceConfig = attrs.field(factory=GuidanceConfig)


class Generator(nn.Module):
    """Labels or texts to images.

    Attributes:
        tokenizer: Decodes the latents; its statistics undo the standardisation.
        backbone: Predicts the velocity.
        conditioner: Makes conditions.
        grid: Height and width of the latents it was trained on.
        classes: Name of each label, or empty.
        settings: How to sample unless asked otherwise.
        about: Plain facts about how it was made.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        backbone: Backbone,
        conditioner: Conditioner,
        *,
        grid: tuple[int, int],
        classes: Sequence[str] = (),
        settings: SamplingSettings | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.backbone = backbone
        self.conditioner = conditioner
        self.grid = grid
        self.classes = tuple(classes)
        self.settings = settings or SamplingSettings()
        self.about: dict[str, Any] = dict(about or {})

    @torch.no_grad()
    def latents(
        self,
        inputs: Tensor | Sequence[str],
        *,
        seeds: Sequence[int],
        settings: SamplingSettings | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Sample standardised latents.

        Args:
            inputs: B labels (integer tensor) or B texts, as the conditioner accepts.
            seeds: B seeds; each sample's noise depends on its own seed only, not on the batch.
            settings: Solver and guidance, instead of the generator's own.
            grid: Height and width of the latents, instead of the trained ones.

        Returns:
            B×d×h×w.
        """
        settings = settings or self.settings
        device = next(self.backbone.parameters()).device
        if len(seeds) != len(inputs):
            raise DataError(f"{len(seeds)} seeds were given for {len(inputs)} samples; give one seed each.")
        shape = (self.tokenizer.latent_channels, *(grid or self.grid))
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(device)
        condition = self.conditioner(inputs)
        null = self.conditioner.null(len(seeds), device)
        field = guided_field(self.backbone, condition, null, settings.guidance)
        sampler = manager().create("sampler", settings.sampler.name, **settings.sampler.options)
        generator = torch.Generator(device=device).manual_seed(seeds[0])
        latents: Tensor = sampler.sample(field, noise, generator)
        return latents

    @torch.no_grad()
    def sample(
        self,
        inputs: Tensor | Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        settings: SamplingSettings | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Sample images, B×3×H×W in [-1, 1]; see `latents` for the arguments. Seeds default to 0, 1, 2 and so on."""
        seeds = range(len(inputs)) if seeds is None else seeds
        return self.tokenizer.decode(
            self.tokenizer.restore(self.latents(inputs, seeds=seeds, settings=settings, grid=grid))
        )

    def batches(self, count: int, batch: int, labels: str, seed: int) -> Iterator[tuple[Tensor, range]]:
        """Yield labels and seeds for `count` class-conditional samples.

        Args:
            count: Samples in all.
            batch: Samples at once.
            labels: ``balanced`` gives every class equally often (to within one), ``random`` draws uniformly.
            seed: Seed of the first sample and of random labels.
        """
        classes = max(len(self.classes), 1)
        if labels == "balanced":
            every = torch.arange(count) % classes
        else:
            every = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
        for start in range(0, count, batch):
            end = min(start + batch, count)
            yield every[start:end], range(seed + start, seed + end)

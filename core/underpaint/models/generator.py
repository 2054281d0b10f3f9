"""The generator: tokenizer, backbone, conditioner and how to sample from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from underpaint.config.component import ComponentConfig
from underpaint.config.diffusion import GuidanceConfig, PathName, Predicts
from underpaint.config.engine import Precision
from underpaint.diffusion.companion import companion_maps, join, network, separate
from underpaint.diffusion.guidance import check_guidance, guided_field, null_condition
from underpaint.diffusion.paths import Velocity, linear_velocity
from underpaint.errors import ConfigError, DataError
from underpaint.interfaces.backbone import Backbone
from underpaint.interfaces.conditioner import Condition, Conditioner
from underpaint.interfaces.sampler import Sampler, VelocityField
from underpaint.models.fp8 import check_fp8, find_fp8, freeze_fp8
from underpaint.models.tokenizer import Tokenizer
from underpaint.registration.manager import manager
from underpaint.weights import tensor_hash

__all__ = ["Generator", "SamplingSettings", "load_weaker"]


@attrs.frozen(kw_only=True)
class SamplingSettings:
    """How samples are drawn.

    Attributes:
        sampler: Solver.
        guidance: Guidance by the null condition or by a weaker model.
    """

    sampler: ComponentConfig = attrs.field(factory=lambda: ComponentConfig(name="euler"))
    guidance: GuidanceConfig = attrs.field(factory=GuidanceConfig)


class Generator(nn.Module):
    """Labels or texts to images.

    Attributes:
        tokenizer: Decodes the latents; its statistics undo the standardisation.
        backbone: Predicts `predicts` on `path`.
        conditioner: Makes conditions.
        grid: Height and width of the latents it was trained on.
        classes: Name of each label, or empty where no names are known.
        settings: How to sample unless asked otherwise.
        about: Plain facts about how it was made.
        path: Path between data and noise that the backbone was trained on.
        predicts: What its output is.
        precision: What the backbone computes in; see `prepare`.

    Raises:
        ConfigError: The settings do not fit the latents.
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
        path: PathName = "linear",
        predicts: Predicts = "velocity",
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.backbone = backbone
        self.conditioner = conditioner
        self.grid = grid
        self.classes = tuple(classes)
        self.settings = settings or SamplingSettings()
        self.about: dict[str, Any] = dict(about or {})
        self.path = path
        self.predicts = predicts
        self.precision: Precision = "fp32"
        self._compiled = False
        # The weaker model last used, by location. In a dict, so that it is no submodule.
        self._weak: dict[str, Generator] = {}
        self._weak_hash = ""
        check_guidance(self.settings.guidance, tokenizer.latent_channels)

    @property
    def labels(self) -> int:
        """How many labels its conditioner knows; 0 where it knows none. Published models have no names for theirs."""
        return int(self.conditioner.spec.context.get("classes", len(self.classes)))

    def prepare(self, *, precision: Precision = "fp32", compile: bool = False) -> None:
        """Make the backbone fast, for drawing many samples; latents and solver stay in fp32.

        Its weights are rounded in place: load the generator again to have them as they were.

        Args:
            precision: ``bf16`` computes with bf16 weights under autocast, ``fp8`` also multiplies in 8 bits.
            compile: Compile its blocks; the first samples of each batch size then take longer.

        Raises:
            ConfigError: ``fp8`` on a device without it; or it has been prepared already.
        """
        if self.precision != "fp32" or self._compiled:
            raise ConfigError(
                f"The generator is prepared already, in {self.precision}; load it again to prepare it otherwise."
            )
        blocks = self.backbone.blocks() or [self.backbone]
        layers: set[nn.Linear] = set()
        if precision == "fp8":
            check_fp8(next(self.backbone.parameters()).device)
            layers = find_fp8(blocks, self._try)
        if precision != "fp32":
            self.backbone.to(torch.bfloat16)
        freeze_fp8(blocks, layers)
        if compile:
            for block in blocks:
                block.compile(dynamic=False)
        self.precision, self._compiled = precision, compile

    def _try(self) -> Tensor:
        device = next(self.backbone.parameters()).device
        some = [""] if self.conditioner.accepts == "text" else torch.zeros(1, dtype=torch.long)
        condition = self.conditioner(some)
        x = torch.zeros(1, self.tokenizer.latent_channels + self.backbone.companion, *self.grid, device=device)
        return network(self.backbone)(x, torch.zeros(1, device=device), condition)

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
            seeds: B seeds; a sample depends on its own seed only, not on the batch. The noise that it starts from and
                what stochastic samplers add on the way come from one sequence.
            settings: Solver and guidance, instead of the generator's own.
            grid: Height and width of the latents, instead of the trained ones.

        Returns:
            B×d×h×w.

        Raises:
            ConfigError: The settings do not fit the model, or ask for what it lacks.
            DataError: The inputs are not what the conditioner accepts, or the samples are not finite.
        """
        settings = settings or self.settings
        device = next(self.backbone.parameters()).device
        self._check_inputs(inputs)
        if len(seeds) != len(inputs):
            raise DataError(f"{len(seeds)} seeds were given for {len(inputs)} samples; give one seed each.")
        sampler = _sampler(settings)
        grid = grid or self.grid
        field = self._field(inputs, settings.guidance, device, grid)
        # On the host, so that a seed gives one sample on every device; it draws while the device computes a step.
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]

        def fresh() -> Tensor:
            return torch.stack([self._noise(source, grid) for source in sources]).to(device)

        latents = sampler.sample(field, fresh(), fresh)
        if self.backbone.companion:
            latents, _ = separate(latents, self.backbone.companion)
        if not bool(torch.isfinite(latents).all()):
            raise DataError(
                "The sampled latents are not finite; look for a diverged model in the training log, or sample with a "
                "smaller guidance scale."
            )
        return latents

    def protocol(self, settings: SamplingSettings | None = None) -> dict[str, Any]:
        """Return solver and guidance as plain values, for the protocol of a number; a weaker model by its hash."""
        settings = settings or self.settings
        check_guidance(settings.guidance, self.tokenizer.latent_channels)
        guidance = attrs.asdict(settings.guidance)
        if settings.guidance.scale == 1.0:
            # No guidance: the weaker model is not asked.
            guidance["weak"] = None
        elif settings.guidance.weak is not None:
            weak = self._weaker(settings.guidance.weak)
            guidance["weak"] = {
                "backbone": weak.backbone.spec.name,
                "path": weak.path,
                "predicts": weak.predicts,
                "weights": self._weak_hash,
            }
        return {"sampler": dict(_sampler(settings).protocol()), "guidance": guidance, "precision": self.precision}

    def _noise(self, source: torch.Generator, grid: tuple[int, int]) -> Tensor:
        """Draw noise for one sample: for the latent, then for the companion, if there is one, in maps below it."""
        noise = torch.randn((self.tokenizer.latent_channels, *grid), generator=source)
        if not self.backbone.companion:
            return noise
        vector = torch.randn((1, self.backbone.companion), generator=source)
        return join(noise[None], vector)[0]

    def _field(
        self, inputs: Tensor | Sequence[str], guidance: GuidanceConfig, device: torch.device, grid: tuple[int, int]
    ) -> VelocityField:
        check_guidance(guidance, self.tokenizer.latent_channels)
        velocity = self._velocity()
        condition = self.conditioner(inputs)
        companion, variance = companion_maps(self.backbone.companion, grid), self.backbone.variance
        if guidance.scale == 1.0:
            return guided_field(velocity, condition, guidance, variance=variance)
        if guidance.weak is None:
            null = null_condition(self.conditioner, len(inputs), device)
            return guided_field(velocity, condition, guidance, null=null, companion=companion, variance=variance)
        weaker = self._weaker(guidance.weak)
        weaker.backbone.to(device)
        weaker.conditioner.to(device)
        if weaker.precision != self.precision:
            weaker.prepare(precision=self.precision, compile=self._compiled)
        weak = weaker._field(inputs, GuidanceConfig(), device, grid)
        return guided_field(velocity, condition, guidance, weak=weak, companion=companion, variance=variance)

    def _velocity(self) -> Velocity:
        velocity = linear_velocity(self.backbone, self.path, self.predicts)
        if self.precision == "fp32":
            return velocity

        def rounded(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            with torch.autocast(x_t.device.type, torch.bfloat16):
                return velocity(x_t, t, condition).float()

        return rounded

    def _weaker(self, location: str) -> Generator:
        """Load the model that is guided away from; its latents must be ours.

        Raises:
            ConfigError: The folder holds no generator, or one for other latents or inputs.
        """
        if location not in self._weak:
            weak = load_weaker(location)
            if not _same_latents(weak.tokenizer, self.tokenizer):
                raise ConfigError(
                    f"guidance.weak is '{location}', whose latents are another tokenizer's or standardised by other "
                    "statistics; name a generator that was trained on the latents of this one."
                )
            made = [(g.conditioner.accepts, g.labels, g.classes) for g in (weak, self)]
            if made[0] != made[1]:
                raise ConfigError(
                    f"guidance.weak is '{location}', which was trained on other classes or captions; name a generator "
                    "that was trained on the data of this one."
                )
            if weak.backbone.companion != self.backbone.companion:
                sizes = [f"{g.backbone.companion} channels" if g.backbone.companion else "none" for g in (weak, self)]
                raise ConfigError(
                    f"guidance.weak is '{location}', whose companion vector has {sizes[0]} where this generator's has "
                    f"{sizes[1]}; name a generator whose backbone has the same companion."
                )
            self._weak = {location: weak}
            # Here, since drawing samples rounds its weights to the precision of this one.
            parts = nn.ModuleDict({"backbone": weak.backbone, "conditioner": weak.conditioner})
            self._weak_hash = tensor_hash(parts.state_dict())[:32]
        return self._weak[location]

    def _check_inputs(self, inputs: Tensor | Sequence[str]) -> None:
        wants, given = self.conditioner.accepts, _kind(inputs)
        if wants != given:
            forms = {
                "label": "a tensor of integers, torch.tensor([0, 1])",
                "text": "a list of strings, ['a red boat']",
            }
            what = f"{given}s" if given else "something else"
            raise DataError(
                f"The conditioner '{self.conditioner.spec.name}' takes {wants}s, and was given {what}; give "
                f"{forms[wants]} for instance."
            )
        if isinstance(inputs, Tensor) and self.labels:
            wrong = inputs[(inputs < 0) | (inputs >= self.labels)]
            if wrong.numel():
                raise DataError(
                    f"The label {int(wrong[0])} was given to a generator of {self.labels} classes; "
                    f"labels are 0 to {self.labels - 1}."
                )

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
        self._check_inputs(inputs)
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
        classes = max(self.labels, 1)
        if labels == "balanced":
            every = torch.arange(count) % classes
        else:
            every = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
        for start in range(0, count, batch):
            end = min(start + batch, count)
            yield every[start:end], range(seed + start, seed + end)


def load_weaker(location: str) -> Generator:
    """Load the generator that `GuidanceConfig.weak` names.

    Raises:
        ConfigError: The folder holds no generator.
        NotFoundError: There is no such folder.
    """
    from underpaint.models.folders import load_folder

    weak = load_folder(location)
    if not isinstance(weak, Generator):
        what = type(weak).__name__.lower()
        raise ConfigError(f"guidance.weak is '{location}', which holds a {what}; name a generator's folder.")
    return weak


def _kind(inputs: Any) -> str:
    """Return what inputs are, ``label`` or ``text``; empty where they are neither."""
    if isinstance(inputs, Tensor):
        whole = not (inputs.is_floating_point() or inputs.is_complex() or inputs.dtype == torch.bool)
        return "label" if inputs.ndim == 1 and len(inputs) and whole else ""
    several = isinstance(inputs, Sequence) and not isinstance(inputs, str) and len(inputs) > 0
    return "text" if several and all(isinstance(item, str) for item in inputs) else ""


def _sampler(settings: SamplingSettings) -> Sampler:
    sampler = manager().create("sampler", settings.sampler.name, **settings.sampler.options)
    assert isinstance(sampler, Sampler)
    return sampler


def _same_latents(a: Tokenizer, b: Tokenizer) -> bool:
    moments = [None if t.statistics is None else (t.statistics.mean, t.statistics.std) for t in (a, b)]
    return moments[0] == moments[1] and a.fingerprint() == b.fingerprint()

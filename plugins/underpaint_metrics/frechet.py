"""Fréchet distances: two sets of images as Gaussians in a feature space."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from underpaint import ConfigError, DataError, Encoder, Metric, create, is_location, tensor_hash
from underpaint_metrics.config import FrechetConfig
from underpaint_metrics.gaussian import Gaussian, fit, frechet_distance, read_gaussian
from underpaint_metrics.images import LEVELS, to_levels

__all__ = ["EncoderFrechet", "FrechetMetric"]


class FrechetMetric(Metric):
    """Fréchet distance in the feature space of a network.

    Per side, the state is the number of images, the sum of their features and the sum of their outer
    products, in float64; it is summed across ranks, so no order of images changes the value by more than
    rounding.

    Args:
        network: Feature extractor, owned by this metric. It is frozen, follows the metric to its device,
            and is neither a submodule nor part of the metric's state or precision.
        dimension: Number D of features.
        reference: File of reference statistics, in place of reference images.

    Attributes:
        needs_references: Whether reference images must be given; False when `reference` is.
    """

    paired = False
    higher_is_better = False

    def __init__(self, network: nn.Module, dimension: int, reference: str | None) -> None:
        super().__init__()
        # A tuple hides the network from nn.Module: no state_dict, no train(), no optimizer gets hold of it.
        self._held = (network.eval().requires_grad_(False),)
        self.dimension = dimension
        self.needs_references = reference is None
        self._reference = None if reference is None else read_gaussian(reference, dimension)
        for side in ("images", "references"):
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state(f"{side}_total", torch.zeros(dimension, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(
                f"{side}_outer", torch.zeros(dimension, dimension, dtype=torch.float64), dist_reduce_fx="sum"
            )
        self._sizes: set[tuple[int, int]] = set()
        self._counts: tuple[int, int | None] | None = None

    @property
    def network(self) -> nn.Module:
        """The feature extractor."""
        return self._held[0]

    @abstractmethod
    def features(self, levels: Tensor) -> Tensor:
        """Return B×D features of B×3×H×W uint8 levels on the metric's device."""

    @property
    @abstractmethod
    def value_name(self) -> str:
        """Name that the value is reported under."""

    def update(self, images: Tensor | None, references: Tensor | None) -> None:
        """Add images to either side or both.

        Args:
            images: B×3×H×W in [-1, 1], or None.
            references: The same; the two need not have the same B.

        Raises:
            DataError: The shape is wrong, a value is not finite, or reference images are given although the
                option `reference` names a file.
        """
        if references is not None and self._reference is not None:
            raise DataError(
                f"The metric '{self.value_name}' has its reference statistics from a file, and reference images were "
                "given too; pass references=None or remove the option 'reference'."
            )
        given = {"images": images, "references": references}
        levels = {side: to_levels(batch.to(self.device)) for side, batch in given.items() if batch is not None}
        for side, batch in levels.items():
            self._add(side, batch)

    def _add(self, side: str, levels: Tensor) -> None:
        if not len(levels):
            return
        self._sizes.add((levels.shape[2], levels.shape[3]))
        # A caller's autocast region would quietly change the features.
        with torch.no_grad(), torch.autocast(levels.device.type, enabled=False):
            features = self.features(levels).double()
        assert features.shape == (len(levels), self.dimension)
        for key, value in (("count", len(levels)), ("total", features.sum(0)), ("outer", features.T @ features)):
            setattr(self, f"{side}_{key}", getattr(self, f"{side}_{key}") + value)

    def compute(self) -> dict[str, float]:
        """Return the distance over everything added on all ranks.

        Raises:
            DataError: A side has fewer than two images.
        """
        reference = self._reference
        if reference is None:
            reference = self._fit("references")
        images = self._fit("images")
        assert images.count is not None
        self._counts = (images.count, reference.count)
        return {self.value_name: frechet_distance(images, reference)}

    def _fit(self, side: str) -> Gaussian:
        count = int(getattr(self, f"{side}_count"))
        if count < 2:
            raise DataError(
                f"The metric '{self.value_name}' was given {count} {side}; a covariance needs at least 2 images a side."
            )
        return fit(count, getattr(self, f"{side}_total"), getattr(self, f"{side}_outer"))

    def reset(self) -> None:
        """Forget all images; reference statistics from a file stay."""
        super().reset()
        self._sizes = set()
        self._counts = None

    def protocol(self) -> Mapping[str, Any]:
        """Return how it was measured; counts are those of the last `compute` (None before it).

        ``rank_deficient`` says that a side has too few images for a covariance of full rank: such a distance
        is biased strongly, and comparable at best to one of as many images.
        """
        images, references = self._counts or (None, None)
        counts = [count for count in (images, references) if count is not None]
        return {
            "levels": LEVELS,
            "image_size": [f"{height}x{width}" for height, width in sorted(self._sizes)],
            "images": images,
            "references": references,
            "reference_file": self._reference.digest[:16] if self._reference is not None else None,
            "dimension": self.dimension,
            "covariance": "unbiased",
            "rank_deficient": bool(counts) and min(counts) <= self.dimension,
        }

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> nn.Module:
        moved: nn.Module = super()._apply(fn, exclude_state)
        for network in self._held:
            network.to(self.device)
        return moved


class EncoderFrechet(FrechetMetric):
    """Fréchet distance on the features of a registered encoder.

    The value is named ``frechet_distance[ENCODER]``: on other features than Inception's it is no FID.

    Args:
        config: Options.

    Raises:
        UnderpaintError: The encoder cannot be made or has no pooled features, or the reference file is wrong.
    """

    def __init__(self, config: FrechetConfig) -> None:
        encoder = _create(config)
        self._features = config.features
        super().__init__(encoder, _dimension(encoder, config), config.reference)
        self._weights = tensor_hash(encoder.state_dict())[:16]

    @property
    def encoder(self) -> Encoder:
        """The encoder whose features are compared."""
        assert isinstance(self.network, Encoder)
        return self.network

    @property
    def value_name(self) -> str:
        """Name that the value is reported under."""
        base, _, weights = self.encoder.spec.name.partition("@")
        # The place of a file says nothing on another machine; its tensors do.
        tag = self._weights[:8] if is_location(weights) else weights
        return f"frechet_distance[{base}@{tag}]" if tag else f"frechet_distance[{base}]"

    def features(self, levels: Tensor) -> Tensor:
        """Return B×D features of B×3×H×W uint8 levels."""
        self.encoder.grid(levels.shape[2], levels.shape[3])
        return _pick(self.encoder, levels.float() / 127.5 - 1.0, self._features)

    def protocol(self) -> Mapping[str, Any]:
        """Return how it was measured; counts are those of the last `compute` (None before it)."""
        spec = self.encoder.spec
        return {
            "metric": "frechet_distance",
            "extractor": self.value_name.removeprefix("frechet_distance[").removesuffix("]"),
            "extractor_options": dict(spec.options),
            "weights": self._weights,
            "random_features": "random initialisation" in self.encoder.info.source.lower(),
            "features": self._features,
            "resize": "by the encoder",
            **super().protocol(),
        }


def _create(config: FrechetConfig) -> Encoder:
    # Random weights must be the same on every rank and in every run, or sums and values would mix feature spaces.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return create("encoder", config.encoder, **config.options)


def _pick(encoder: nn.Module, images: Tensor, features: str) -> Tensor:
    found = encoder(images)
    picked: Tensor | None = found.pooled if features == "pooled" else found.maps[-1].mean(dim=(2, 3))
    if picked is None:
        raise ConfigError("The encoder of 'frechet' has no pooled features; set 'features: mean'.")
    return picked


@torch.no_grad()
def _dimension(encoder: Encoder, config: FrechetConfig) -> int:
    # States need their shape before the first image: a rank without images takes part in the reduction too.
    stride = encoder.info.stride
    height, width = (max(stride, side // stride * stride) for side in encoder.info.native_size)
    return _pick(encoder.eval(), torch.zeros(1, 3, height, width), config.features).shape[1]

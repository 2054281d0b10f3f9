"""Runs metrics over reconstructions and samples, each number with its protocol."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from underpaint.config.component import ComponentConfig
from underpaint.config.evaluation import EvaluationConfig
from underpaint.data.loader import Batch
from underpaint.data.transforms import to_tensor, to_uint8
from underpaint.errors import ConfigError, DataError
from underpaint.evaluation.protocol import Number
from underpaint.interfaces.backbone import Backbone
from underpaint.interfaces.metric import Metric
from underpaint.interfaces.sampler import Sampler
from underpaint.models.fp8 import check_fp8
from underpaint.models.generator import Generator, SamplingSettings, load_weaker
from underpaint.models.tokenizer import Tokenizer
from underpaint.registration.manager import manager

__all__ = ["Shown", "check_patch", "check_sampling", "make_metrics", "measure_generation", "measure_reconstruction"]


@attrs.define(eq=False)
class Shown:
    """The first pictures of an evaluation, for grids.

    Attributes:
        originals: N×H×W×3 uint8, or None.
        images: N×H×W×3 uint8: reconstructions or samples.
        latents: N×d×h×w float32, or None.
        labels: N class indices, or None.
        captions: N texts that samples were drawn for, or None.
    """

    images: NDArray[np.uint8]
    originals: NDArray[np.uint8] | None = None
    latents: NDArray[np.float32] | None = None
    labels: NDArray[np.int64] | None = None
    captions: list[str] | None = None


def make_metrics(configs: Sequence[ComponentConfig], device: torch.device) -> list[Metric]:
    """Make metrics on a device. What one of them lacks (weights, say) is said before anything is measured."""
    metrics = []
    for config in configs:
        metric = manager().create("metric", config.name, **config.options)
        assert isinstance(metric, Metric)
        metrics.append(metric.to(device))
    return metrics


def check_sampling(config: EvaluationConfig, device: torch.device, backbone: Backbone) -> None:
    """Refuse settings by which no sample could be drawn or measured, before hours go into the generator.

    Args:
        config: The settings.
        device: Where samples will be drawn.
        backbone: What will be sampled.

    Raises:
        ConfigError: Of the sampler, a metric or the weaker model.
        DataError: A metric needs files that are not there.
    """
    sampler = manager().create("sampler", config.sampler.name, **config.sampler.options)
    assert isinstance(sampler, Sampler)
    if sampler.needs_variance and not backbone.variance:
        raise ConfigError(
            f"The sampler '{config.sampler.name}' needs a variance that the backbone has learned, and this one has "
            "none (those of DiT have); set its option variance to 'posterior'."
        )
    protocol = sampler.protocol()
    check_patch("evaluation.sampler", protocol.get("patch"), config.sampler.name, backbone)
    if backbone.companion and protocol.get("shift") == "latent":
        raise ConfigError(
            f"The sampler '{config.sampler.name}' has shift 'latent', which would count the {backbone.companion} "
            "channels of the companion too; give the number √(d·h·w / 4096) of the latents alone."
        )
    if config.precision == "fp8":
        check_fp8(device)
    _check_unpaired(make_metrics(config.generation, torch.device("cpu")))
    if config.guidance.scale != 1.0 and config.guidance.weak is not None:
        load_weaker(config.guidance.weak)


def check_patch(where: str, patch: int | None, name: str, backbone: Backbone) -> None:
    """Refuse a shift by the number of tokens that counts tokens of another size than the backbone's.

    Args:
        where: Section of the recipe that says how many latent cells a token has per side.
        patch: What it says; None where nothing is counted.
        name: What counts them.
        backbone: What takes the tokens.

    Raises:
        ConfigError: They differ.
    """
    if patch is not None and patch != backbone.patch:
        raise ConfigError(
            f"{where}: '{name}' shifts by the number of tokens and takes patches of {patch} for one, and the backbone "
            f"'{backbone.spec.name}' takes patches of {backbone.patch}; set {where}.patch to {backbone.patch}."
        )


def _check_unpaired(metrics: Sequence[Metric]) -> None:
    for metric in metrics:
        if metric.paired:
            raise ConfigError(
                f"The metric '{metric.spec.name}' compares image by image and cannot measure samples; "
                "move it to evaluation.reconstruction."
            )


@torch.inference_mode()
def measure_reconstruction(
    tokenizer: Tokenizer,
    images: Iterable[Batch],
    metrics: Sequence[Metric],
    *,
    facts: Mapping[str, Any],
    show: int,
) -> tuple[list[Number], Shown]:
    """Compare reconstructions with their originals.

    Reconstructions are rounded to 8 bit, as files would hold them.

    Args:
        tokenizer: On its device, in evaluation mode.
        images: This rank's images.
        metrics: Paired ones and distances between the two sets.
        facts: What the protocol says of the images: data set, its hash, crop.
        show: Pictures to return.

    Returns:
        The numbers over all ranks, and this rank's first pictures.

    Raises:
        DataError: A reconstruction is not finite.
    """
    device = next(tokenizer.parameters()).device
    originals: list[NDArray[np.uint8]] = []
    decoded: list[NDArray[np.uint8]] = []
    latents: list[NDArray[np.float32]] = []
    shown = 0
    for batch in images:
        reference = to_tensor(batch.images.to(device))
        z = tokenizer.encode(reference)
        made = tokenizer.decode(z)
        if not bool(made.isfinite().all()):
            raise DataError(
                "The reconstructions are not finite; look for weights that are not finite, or for a diverged stage in "
                "the training log."
            )
        pixels = to_uint8(made)
        image = to_tensor(pixels)
        for metric in metrics:
            metric.update(image, reference if metric.needs_references else None)
        if shown < show:
            take = min(show - shown, len(batch))
            originals.append(batch.images[:take].numpy())
            decoded.append(pixels[:take].cpu().numpy())
            latents.append(z[:take].float().cpu().numpy())
            shown += take
    numbers = _numbers(metrics, {**facts, "compared": "reconstructions with their originals"}, "r")
    if not shown:
        # Of this rank: there may be fewer images than ranks.
        empty = np.zeros((0, 1, 1, 3), np.uint8)
        return numbers, Shown(empty, empty, np.zeros((0, 1, 1, 1), np.float32))
    return numbers, Shown(np.concatenate(decoded), np.concatenate(originals), np.concatenate(latents))


@torch.inference_mode()
def measure_generation(
    generator: Generator,
    references: Iterable[Batch],
    metrics: Sequence[Metric],
    config: EvaluationConfig,
    *,
    count: int,
    facts: Mapping[str, Any],
    rank: int = 0,
    world_size: int = 1,
) -> tuple[list[Number], Shown]:
    """Compare samples with reference images as two sets.

    A generator of texts draws one sample for the caption of each reference.

    Args:
        generator: On its device, in evaluation mode.
        references: This rank's reference images.
        metrics: Distances between sets.
        config: Sampler, guidance, labels, seed, batch.
        count: Samples in all; for a generator of texts, the number of the references.
        facts: What the protocol says of the references.
        rank: Each rank draws its share of the batches.
        world_size: Number of ranks.

    Returns:
        The numbers over all ranks, and this rank's first samples.

    Raises:
        ConfigError: A metric compares image by image, which samples have no originals for.
        DataError: The generator takes texts, and the references have no captions.
    """
    _check_unpaired(metrics)
    device = next(generator.backbone.parameters()).device
    settings = SamplingSettings(sampler=config.sampler, guidance=config.guidance)
    by_text = generator.conditioner.accepts == "text"
    # Before anything is drawn: what is wrong with the settings is said at once.
    protocol = {
        **facts,
        "compared": "samples with images",
        "samples": count,
        **generator.protocol(settings),
        **({"captions": "those of the images"} if by_text else {"labels": config.labels}),
        "seed": config.seed,
    }
    images: list[NDArray[np.uint8]] = []
    asked: list[Any] = []
    rest = iter(references)
    for inputs, seeds, batch in _draws(generator, rest, config, count, rank, world_size):
        pixels = to_uint8(generator.sample(inputs, seeds=seeds, settings=settings))
        for metric in metrics:
            metric.update(to_tensor(pixels), None)
        if batch is not None:
            _refer(metrics, batch, device)
        take = min(config.show - len(asked), len(pixels))
        if take > 0:
            images.append(pixels[:take].cpu().numpy())
            asked += inputs[:take].tolist() if isinstance(inputs, Tensor) else inputs[:take]
    for batch in rest:
        _refer(metrics, batch, device)
    found = Shown(
        np.concatenate(images) if images else np.zeros((0, 1, 1, 3), np.uint8),
        labels=None if by_text else np.array(asked, dtype=np.int64),
        captions=asked if by_text else None,
    )
    return _numbers(metrics, protocol, "g"), found


def _draws(
    generator: Generator, references: Iterator[Batch], config: EvaluationConfig, count: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor | Sequence[str], Sequence[int], Batch | None]]:
    """Yield inputs and seeds of this rank's samples, with the references that the inputs are the captions of."""
    if generator.conditioner.accepts == "label":
        for index, (labels, seeds) in enumerate(generator.batches(count, config.batch, config.labels, config.seed)):
            if index % world_size == rank:
                yield labels, seeds, None
        return
    for batch in references:
        if batch.texts is None:
            raise DataError(
                "The generator takes captions, and the images to compare its samples with have none; give data with "
                "texts."
            )
        # By the image's place in the data set, so that ranks and broken images make no difference.
        yield batch.texts, [config.seed + index for index in batch.indices.tolist()], batch


def _refer(metrics: Sequence[Metric], batch: Batch, device: torch.device) -> None:
    for metric in metrics:
        if metric.needs_references:
            metric.update(None, to_tensor(batch.images.to(device)))


def _numbers(metrics: Sequence[Metric], facts: Mapping[str, Any], side: str) -> list[Number]:
    # r and g as in rFID and gFID: one distance, of reconstructions and of generated images.
    numbers = []
    for metric in metrics:
        with warnings.catch_warnings():
            # A rank may have had none of the images; a metric that was given none on any refuses that itself.
            warnings.filterwarnings("ignore", r"The ``compute`` method of metric \w+ was called before", UserWarning)
            values = metric.compute()
        for name, value in values.items():
            label = name if metric.paired else f"{side}{name[0].upper()}{name[1:]}" if name != "fid" else f"{side}FID"
            protocol = {**facts, **metric.protocol()}
            better = metric.higher_is_better
            numbers.append(Number(name=label, value=value, protocol=protocol, higher_is_better=better))
    return numbers

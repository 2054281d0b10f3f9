"""Measuring samples: every setting is in the protocol of the number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import attrs
import pytest
import torch
from tests.models.test_folders import make_generator, make_tokenizer
from torch import Tensor

from underpaint import ConfigError, DataError, Metric
from underpaint.config.component import ComponentConfig
from underpaint.config.diffusion import GuidanceConfig
from underpaint.config.evaluation import EvaluationConfig
from underpaint.data.loader import Batch
from underpaint.evaluation.measure import measure_generation, measure_reconstruction
from underpaint.evaluation.protocol import Number
from underpaint.models.generator import Generator


class Mean(Metric):
    """Mean of all pixels."""

    paired = False
    needs_references = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.total: Tensor

    def update(self, images: Tensor | None, references: Tensor | None) -> None:
        if images is not None:
            self.total += images.mean()

    def compute(self) -> dict[str, float]:
        return {"mean": float(self.total)}

    def protocol(self) -> Mapping[str, Any]:
        return {"metric": "mean"}


BASE = EvaluationConfig(batch=4, show=2, sampler=ComponentConfig(name="euler", options={"steps": 2}))


def measure(generator: Generator, config: EvaluationConfig, count: int = 5) -> Number:
    (number,), shown = measure_generation(
        generator, (), [Mean()], config, count=count, facts={"data": "none", "image_size": [32, 48]}
    )
    assert len(shown.images) == 2
    return number


def test_every_setting_changes_the_protocol() -> None:
    generator = make_generator()
    guided = GuidanceConfig(scale=2.0)
    changes: list[dict[str, Any]] = [
        {},
        {"sampler": ComponentConfig(name="euler", options={"steps": 3})},
        {"sampler": ComponentConfig(name="euler", options={"steps": 2, "shift": 2.0})},
        {"sampler": ComponentConfig(name="ab2", options={"steps": 2})},
        {"guidance": guided},
        {"guidance": attrs.evolve(guided, channels=3)},
        {"guidance": attrs.evolve(guided, interval=(0.2, 0.9))},
        {"labels": "random"},
        {"seed": 7},
    ]
    numbers = [measure(generator, attrs.evolve(BASE, **change)) for change in changes]
    numbers.append(measure(generator, BASE, count=6))
    assert len({number.id for number in numbers}) == len(numbers)
    assert numbers[0].name == "gMean"
    assert numbers[0].protocol == {
        "data": "none",
        "image_size": [32, 48],
        "compared": "samples with images",
        "samples": 5,
        "sampler": {"solver": "euler", "evaluations": 2, "grid_points": 3, "shift": 1.0},
        "guidance": {"scale": 1.0, "channels": None, "interval": [0.0, 1.0], "weak": None},
        "precision": "fp32",
        "labels": "balanced",
        "seed": 0,
        "metric": "mean",
    }


def test_batches_do_not_change_the_number() -> None:
    generator = make_generator()
    one, other = (measure(generator, attrs.evolve(BASE, batch=batch), count=4) for batch in (4, 2))
    assert one.id == other.id
    assert other.value == pytest.approx(2 * one.value, abs=1e-5)


def test_settings_that_do_not_fit_are_refused_before_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = make_generator()
    monkeypatch.setattr(generator, "sample", lambda *_, **__: pytest.fail("it sampled"))
    with pytest.raises(ConfigError, match=r"guidance\.channels is 9"):
        measure(generator, attrs.evolve(BASE, guidance=GuidanceConfig(scale=2.0, channels=9)))


@pytest.mark.parametrize("count", [6, 7])
def test_balanced_labels_are_as_even_as_can_be(count: int) -> None:
    labels = torch.cat([batch for batch, _ in make_generator().batches(count, 4, "balanced", 0)])
    counted = Counter(labels.tolist())
    assert len(labels) == count
    assert set(counted) == {0, 1, 2}
    assert max(counted.values()) - min(counted.values()) <= 1


def test_random_labels_follow_their_seed() -> None:
    def labels(seed: int) -> Tensor:
        return torch.cat([batch for batch, _ in make_generator().batches(300, 100, "random", seed)])

    assert torch.equal(labels(1), labels(1))
    assert not torch.equal(labels(1), labels(2))
    counted = Counter(labels(1).tolist())
    assert set(counted) == {0, 1, 2}
    assert len(set(counted.values())) > 1


def test_reconstructions_that_are_not_finite_are_no_number() -> None:
    tokenizer = make_tokenizer()
    with torch.no_grad():
        next(tokenizer.decoder.parameters()).fill_(float("nan"))
    black = torch.zeros(2, 32, 48, 3, dtype=torch.uint8)
    images = [Batch(images=black, labels=None, texts=None, keys=("a", "b"), indices=torch.arange(2))]
    with pytest.raises(DataError, match="reconstructions are not finite"):
        measure_reconstruction(tokenizer, images, [], facts={}, show=1)


def test_a_rank_without_images_measures_with_the_others() -> None:
    (number,), shown = measure_reconstruction(make_tokenizer(), (), [Mean()], facts={}, show=2)
    assert number.value == 0.0
    assert shown.originals is not None
    assert shown.latents is not None
    assert len(shown.images) == len(shown.originals) == len(shown.latents) == 0

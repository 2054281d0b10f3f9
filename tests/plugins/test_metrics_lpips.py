"""LPIPS as a metric."""

from __future__ import annotations

import pytest
import torch

import underpaint
from underpaint import DataError, Reconstruction, StepTensors


def pictures(count: int, seed: int) -> torch.Tensor:
    """Images on 8-bit levels, in [-1, 1]."""
    levels = torch.randint(0, 256, (count, 3, 32, 48), generator=torch.Generator().manual_seed(seed))
    return levels / 127.5 - 1.0


def test_mean_of_the_losss_distances_over_batches() -> None:
    metric = underpaint.create("metric", "lpips", weights="random")
    shown, wanted = pictures(5, 0), pictures(5, 1)
    (loss,) = metric._loss
    for part in (slice(0, 2), slice(2, 5)):
        metric.update(shown[part], wanted[part])
    values = [
        float(loss(StepTensors(step=0, images=b[None], reconstruction=Reconstruction(a[None])))["lpips"])
        for a, b in zip(shown, wanted, strict=True)
    ]
    assert metric.compute() == {"lpips": pytest.approx(sum(values) / 5, rel=1e-5)}
    assert len(set(values)) == 5


def test_equal_images_have_no_distance_and_less_is_better() -> None:
    metric = underpaint.create("metric", "lpips", weights="random")
    metric.update(pictures(2, 0), pictures(2, 0))
    assert metric.compute() == {"lpips": 0.0}
    assert metric.higher_is_better is False


def test_the_protocol_names_the_weights() -> None:
    torch.manual_seed(0)
    one = underpaint.create("metric", "lpips", weights="random")
    torch.manual_seed(1)
    other = underpaint.create("metric", "lpips", weights="random")
    assert one.protocol()["weights"] != other.protocol()["weights"]
    assert not one.state_dict()


def test_missing_weights_are_said_at_once(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(DataError, match="needs torchvision's VGG-16"):
        underpaint.create("metric", "lpips")

"""Samples streamed to one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from underpaint.evaluation.sample_file import SampleFile, holds_samples


def pictures(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_batches_become_one_array(tmp_path: Path) -> None:
    images, labels = pictures(11), np.arange(11)
    with SampleFile(tmp_path / "a.npz", 11, labels) as file:
        for part in images.split(3):
            file.add(part)
        assert not (tmp_path / "a.npz").exists()
    with np.load(tmp_path / "a.npz") as found:
        assert found.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(found["arr_0"], images.numpy())
        np.testing.assert_array_equal(found["arr_1"], labels)
        assert found["arr_0"].dtype == np.uint8
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_images_that_lie_in_another_order_of_memory(tmp_path: Path) -> None:
    images = pictures(4).permute(0, 2, 1, 3)
    with SampleFile(tmp_path / "a.npz", 4) as file:
        file.add(images)
    with np.load(tmp_path / "a.npz") as found:
        assert found.files == ["arr_0"]
        np.testing.assert_array_equal(found["arr_0"], images.numpy())


@pytest.mark.parametrize("drawn", [0, 2])
def test_an_interruption_leaves_the_earlier_file(tmp_path: Path, drawn: int) -> None:
    (tmp_path / "a.npz").write_bytes(b"earlier")
    with pytest.raises(KeyboardInterrupt), SampleFile(tmp_path / "a.npz", 4) as file:
        if drawn:
            file.add(pictures(drawn))
        raise KeyboardInterrupt
    assert (tmp_path / "a.npz").read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_full_disk_is_an_error_and_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.npz").write_bytes(b"earlier")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("underpaint.evaluation.sample_file._write", full)
    with pytest.raises(OSError, match="No space left"), SampleFile(tmp_path / "a.npz", 8) as file:
        for part in pictures(8).split(2):
            file.add(part)
    assert (tmp_path / "a.npz").read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_too_few_images_are_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), SampleFile(tmp_path / "a.npz", 4) as file:
        file.add(pictures(3))
    assert not list(tmp_path.iterdir())


def test_its_files_are_known_by_their_layout(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for labels in (None, np.arange(4)):
        with SampleFile(path, 4, labels) as file:
            file.add(pictures(4))
        assert holds_samples(path)
    images = pictures(4).numpy()
    for arrays in ({"images": images}, {"arr_0": images[0]}, {"arr_0": images.astype(np.float32)}, {}):
        np.savez(path, **arrays)  # type: ignore[arg-type]
        assert not holds_samples(path)
    path.write_bytes(b"mine")
    assert not holds_samples(path)
    assert not holds_samples(tmp_path)

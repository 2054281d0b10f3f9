"""The peak that a share is taken of."""

from __future__ import annotations

import pytest
import torch

from underpaint.training.flops import peak_flops


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        # From the vendor's datasheets, dense.
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "fp8", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 156e12),
        ("A card of tomorrow", "bf16", None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_datasheet(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: str, expected: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peak_flops(torch.device("cuda", 0), precision)
    assert (None if found is None else found[0]) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_of_a_cpu_none_is_known(precision: str) -> None:
    assert peak_flops(torch.device("cpu"), precision) is None

"""Arithmetic of a training step, and the peak of the device it runs on.

Conventions: a multiply-add counts as two operations. Model FLOP utilisation is the counted FLOPs of forward and
backward over the peak of dense matrix products; recomputation is not counted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops", "peak_flops"]

# Dense peaks in FLOP/s by a part of the device name: (bf16, TF32), from the vendors' datasheets.
_PEAKS = {
    "H100 PCIe": (756e12, 378e12),
    "H100": (989.4e12, 494.7e12),
    "H800": (989.4e12, 494.7e12),
    "H200": (989.4e12, 494.7e12),
    "A100": (312e12, 156e12),
    "A800": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "RTX 4090": (165.2e12, 82.6e12),
}


def count_flops(module: nn.Module, step: Callable[[], Tensor]) -> float:
    """Count the operations of one forward and backward pass; gradients are cleared afterwards.

    Args:
        module: Whose gradients are cleared.
        step: Computes the scalar loss of a batch of one.
    """
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(step())
    module.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def peak_flops(device: torch.device, precision: str) -> tuple[float, str] | None:
    """Return the peak of matrix products in FLOP/s, and where the figure comes from; None where no datasheet is known.

    Of fp8 training it is that of bf16, which part of the products still use. What a few products reach on an unknown
    device is no peak: others may be faster, and their share of it above 1.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, (bf16, tf32) in _PEAKS.items():
        if part in name:
            return (tf32, f"{name} datasheet, TF32") if precision == "fp32" else (bf16, f"{name} datasheet, dense bf16")
    return None

"""How fast a tokenizer encodes and decodes, as numbers with their protocol."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from underpaint.evaluation.protocol import Number
from underpaint.models.tokenizer import Tokenizer

__all__ = ["images_per_second", "tokenizer_speed"]

BATCH = 32
_WARM_UP = 3
_REPEATS = 20
_AT_LEAST = 3
_SECONDS = 10.0


def images_per_second(call: Callable[[], object], batch: int, device: torch.device) -> tuple[float, float]:
    """Time a call on a batch, up to 20 times within ten seconds and at least three, after three calls untimed.

    The device is waited for before and after every call.

    Returns:
        Median and standard deviation of the rates of the calls.
    """
    for _ in range(_WARM_UP):
        call()
    rates: list[float] = []
    begin = time.perf_counter()
    while len(rates) < _REPEATS and (len(rates) < _AT_LEAST or time.perf_counter() - begin < _SECONDS):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        rates.append(batch / (time.perf_counter() - start))
    return statistics.median(rates), statistics.stdev(rates)


@torch.inference_mode()
def tokenizer_speed(tokenizer: Tokenizer, height: int, width: int, *, batch: int = BATCH) -> list[Number]:
    """Time encoding and decoding, with bf16 autocast on a GPU and in fp32 on a CPU, not compiled.

    Args:
        tokenizer: On its device, in evaluation mode.
        height: Pixels of an image.
        width: Pixels of an image.
        batch: Images at once.

    Returns:
        ``encode img/s``, from images on the device to latents, and ``decode img/s``, back.
    """
    device = next(tokenizer.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand((batch, 3, height, width), generator=generator) * 2 - 1).to(device)
    half = device.type == "cuda"
    numbers = []
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        latents = tokenizer.encode(images)
        calls: dict[str, Callable[[], object]] = {
            "encode": lambda: tokenizer.encode(images),
            "decode": lambda: tokenizer.decode(latents),
        }
        for what, call in calls.items():
            protocol = {
                "measured": f"{what}, images and latents on the device",
                "image_size": [height, width],
                "batch": batch,
                "precision": "bf16 autocast" if half else "fp32",
                "compiled": False,
                "value": "median and standard deviation over batches, warm-up left out",
                "device": _name(device),
                "torch": torch.__version__,
            }
            rate, spread = images_per_second(call, batch, device)
            numbers.append(
                Number(name=f"{what} img/s", value=rate, std=spread, protocol=protocol, higher_is_better=True)
            )
    return numbers


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}, {torch.backends.cpu.get_cpu_capability()}"

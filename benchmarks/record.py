"""What the benchmarks share: the machine, timed steps, and a record that keeps what a run cut short has measured."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from underpaint.training.flops import peak_flops

# Kinds of kernels by parts of their names, looked for from the top.
KERNELS = {
    "changes of layout": ("nchwtonhwc", "nhwctonchw"),
    # The last two are cuDNN's, around its backward kernel.
    "attention": ("attention", "flash", "fmha", "sdpa", "dot_do_o", "convert_dq"),
    "fused elementwise": (
        "triton",
        "_swiglu_kernel",
        "_heads_kernel",
        "_norm_kernel",
        "_gate_kernel",
        "_round_rows_kernel",
    ),
    "convolutions": ("convolution", "convolve", "conv2d", "fprop", "dgrad", "wgrad", "implicit", "cudnn"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "_mm", "s16816", "cublas"),
    "AdamW, EMA, clipping, copies of weights": ("multi_tensor", "lerp", "adam", "_update_kernel", "memcpy", "memset"),
}
LIBRARIES = ("torch", "numpy", "deepspeed", "timm", "underpaint")


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Return what ran: processor, GPU, versions."""
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in facts.splitlines() if line.startswith("model name")]
    found: dict[str, Any] = {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }
    if device is not None and device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return {**found, "python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def commit() -> str:
    """Return the commit of the working tree, with ``-dirty`` where the tree has changes, or ``unknown``."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def fast_matrices() -> None:
    """Let fp32 matrix products use TF32, and cuDNN choose its kernels by trying them, as a training does."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def timed(run: Callable[[int], Any], device: torch.device, steps: int, warm: int) -> dict[str, float]:
    """Time three groups of steps; within a group nothing waits for the device but the step itself.

    Args:
        run: A step, given its index.
        device: Where it runs.
        steps: Steps of a group.
        warm: Steps before the first.

    Returns:
        ``median_s``, ``min_s`` and ``max_s`` of a step over the groups, and on a GPU ``memory_gib`` at its highest;
        ``warm_s``, what all steps before the first group took, and compiling in them.
    """
    cuda = device.type == "cuda"
    start = time.perf_counter()
    for index in range(warm):
        run(index)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    warm_s = time.perf_counter() - start
    seconds = []
    for group in range(3):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for index in range(steps):
            run(warm + group * steps + index)
        if cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / steps)
    result = {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds), "warm_s": warm_s}
    if cuda:
        result["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def kernel_times(run: Callable[[int], Any], device: torch.device, longest: int = 12) -> dict[str, Any]:
    """Return ``kernel_ms``, the milliseconds that a step's kernels take by kind, and ``longest_ms`` by name.

    On a GPU also ``idle_ms``, in which none runs, in all and by the kernel that is waited for.
    """
    cuda = device.type == "cuda"
    steps = 3
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        for index in range(steps):
            run(index)
        if cuda:
            torch.cuda.synchronize()
    kinds: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for event in recorded.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, parts in KERNELS.items() if any(part in name for part in parts)), "other")
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        kinds[kind] += spent
        names[event.key[:100]] += spent

    def milliseconds(times: Counter[str], most: int | None = None) -> dict[str, float]:
        return {key: round(value / steps / 1e3, 2) for key, value in times.most_common(most)}

    found: dict[str, Any] = {"kernel_ms": milliseconds(kinds), "longest_ms": milliseconds(names, longest)}
    if cuda:
        gaps: Counter[str] = Counter()
        ranges = [(e.time_range, e.name) for e in recorded.events() if e.device_type == DeviceType.CUDA]
        end = math.inf
        for time_range, name in sorted(ranges, key=lambda pair: pair[0].start):
            if time_range.start > end:
                gaps[name[:100]] += time_range.start - end
            end = time_range.end if end == math.inf else max(end, time_range.end)
        found["idle_ms"] = {"all": round(gaps.total() / steps / 1e3, 2), **milliseconds(gaps, longest)}
    return found


def clear(device: torch.device) -> None:
    """Forget compiled graphs and free the device's memory."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Record:
    """Rows of a run, written after every one.

    Args:
        device: Where it runs.
        out: JSON file, or None to print only.
        settings: What the rows have in common.
    """

    def __init__(self, device: torch.device, out: Path | None, **settings: Any) -> None:
        self._device = device
        self._out = out
        peak, source = peak_flops(device, "bf16") or (None, "not known")
        self._peak = peak
        self.content: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(device),
            "peak": {"flops": peak, "source": source},
            "convention": "FLOP = 2 multiply-adds, forward and backward counted; recomputation not counted",
            **settings,
            "rows": [],
        }

    def measure(
        self, make: Callable[[], tuple[dict[str, float], float]], *, batch: int, **label: Any
    ) -> dict[str, Any] | None:
        """Measure one row; `write` it when it is complete.

        Args:
            make: Returns what `timed` returned, and the FLOPs of an image or 0 where they are not counted.
            batch: Images of a step.
            label: What names the row.

        Returns:
            The row, to which the caller may add; None where memory or a kernel's limits did not allow it, which the row
            then says.
        """
        clear(self._device)
        row: dict[str, Any] = {**label, "batch": batch}
        try:
            result, flops = make()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            # A kernel that cannot run a shape says so with a RuntimeError; the other rows are still wanted.
            row["failed"] = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)[:200]
        else:
            rate = batch / result["median_s"]
            row |= {"images_per_second": round(rate, 1), **{key: round(value, 5) for key, value in result.items()}}
            if flops:
                row |= {"gflop_per_image": round(flops / 1e9, 1)}
                if self._peak is not None:
                    row |= {"mfu": round(rate * flops / self._peak, 4)}
        self.content["rows"].append(row)
        return None if "failed" in row else row

    def write(self) -> None:
        """Write the record and print its last row."""
        if self._out is not None:
            self._out.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if self.content["rows"]:
            print(*(f"{key}={value}" for key, value in self.content["rows"][-1].items()), flush=True)

"""``underpaint doctor``: what works on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from underpaint.cli.output import print_json, print_table
from underpaint.registration.manager import manager

__all__ = ["doctor"]

_LIBRARIES = (
    "torch",
    "deepspeed",
    "timm",
    "open_clip_torch",
    "torchmetrics",
    "clean-fid",
    "torchvision",
    "wandb",
    "s3fs",
)
_OPTIONAL = ("torchvision", "wandb", "s3fs")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Say what works on this machine. Exit code 1 when something that underpaint needs does not."""
    checks = [*_libraries(), *_torch(), _gloo(), *_plugins(), _disk()]
    if as_json:
        print_json(checks)
    else:
        print_table([[c["status"], c["what"], c["found"]] for c in checks], ["", "what", "found"])
    if any(check["status"] == "failed" for check in checks):
        raise click.exceptions.Exit(1)


def _check(status: str, what: str, found: str) -> dict[str, str]:
    return {"status": status, "what": what, "found": found}


def _libraries() -> list[dict[str, str]]:
    found = [_check("ok", "Python", f"{platform.python_version()} at {sys.executable}")]
    for name in _LIBRARIES:
        try:
            found.append(_check("ok", name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            optional = name in _OPTIONAL
            found.append(_check("absent" if optional else "failed", name, "optional" if optional else "not installed"))
    return found


def _torch() -> list[dict[str, str]]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [_check("failed", "import torch", str(error))]
    found = [_check("ok", "CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    if not torch.cuda.is_available():
        return [*found, _check("absent", "GPU", "torch sees none; training runs on the CPU")]
    for index in range(torch.cuda.device_count()):
        facts: Any = torch.cuda.get_device_properties(index)
        text = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, bf16 {torch.cuda.is_bf16_supported()}"
        found.append(_check("ok", f"GPU {index}", text))
    return found


def _gloo() -> dict[str, str]:
    try:
        from underpaint.training.ranks import Ranks

        with Ranks("cpu") as ranks:
            ranks.barrier()
    except Exception as error:
        return _check("failed", "training engine", f"{type(error).__name__}: {error}")
    return _check("ok", "training engine", "DeepSpeed with gloo starts")


def _plugins() -> list[dict[str, str]]:
    failed = [record for record in manager().records if record.status == "failed"]
    active = sum(record.status == "active" for record in manager().records)
    return [
        _check("ok", "plugins", f"{active} active"),
        *(_check("failed", f"plugin {record.name}", record.error) for record in failed),
    ]


def _disk() -> dict[str, str]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return _check("ok" if free > 1 else "failed", "disk", f"{free:.0f} GiB free here")

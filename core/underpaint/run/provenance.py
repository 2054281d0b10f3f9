"""What a run's numbers came from: versions, code state, plugins, data, machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from underpaint.config.recipe import write_atomically
from underpaint.errors import DataError
from underpaint.registration.manager import manager

__all__ = ["git_state", "record_start", "update"]

_LIBRARIES = (
    "underpaint",
    "torch",
    "deepspeed",
    "timm",
    "open_clip_torch",
    "numpy",
    "pillow",
    "torchmetrics",
    "clean-fid",
)


def record_start(path: Path, *, seed: int, command: list[str], data: dict[str, Any], ranks: int, device: str) -> None:
    """Write ``provenance.json`` at the start of a run, or add a session to it after a resume.

    Raises:
        DataError: The file of earlier sessions is damaged.
    """
    previous = _read(path)["sessions"] if path.exists() else []
    session = {"started": _now(), "command": command, "ranks": ranks, "device": device}
    record = {
        "versions": {name: _version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "machine": _machine(),
        "git": git_state(Path.cwd()),
        "plugins": [
            {"name": r.name, "distribution": r.distribution, "origin": r.origin, "status": r.status}
            for r in manager().records
        ],
        "seed": seed,
        "data": data,
        "sessions": [*previous, session],
    }
    write_atomically(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def update(path: Path, **facts: Any) -> None:
    """Set top-level facts, such as timings; the last session gets its end time.

    Raises:
        DataError: The file is damaged.
    """
    record = _read(path)
    record["sessions"][-1]["ended"] = _now()
    record.update(facts)
    write_atomically(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def git_state(folder: Path) -> dict[str, str | bool] | None:
    """Return commit and whether files differ from it, for the working folder; None outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(git("status", "--porcelain"))}


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("sessions"), list):
        raise DataError(
            f"'{path}' is damaged; delete it, which loses the record of earlier sessions and nothing else, and run the "
            "same command again."
        )
    return record


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts

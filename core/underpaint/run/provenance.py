"""What a run's numbers came from: versions, code state, plugins, data, machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from underpaint.config.recipe import write_atomically
from underpaint.errors import DataError
from underpaint.registration.manager import manager

__all__ = ["check_images", "git_state", "record_start", "seconds", "update"]

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

    The file holds every environment that a session ran in, and each session says which one was its own.

    Raises:
        DataError: The file of earlier sessions is damaged.
    """
    record = _read(path) if path.exists() else {"sessions": []}
    environment = {
        "versions": {name: _version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "machine": _machine(),
        "git": git_state(Path.cwd()),
        "plugins": [
            {"name": r.name, "distribution": r.distribution, "origin": r.origin, "status": r.status}
            for r in manager().records
        ],
    }
    known = record.setdefault("environments", [])
    if environment not in known:
        known.append(environment)
    session = {
        "started": _now(),
        "command": command,
        "ranks": ranks,
        "device": device,
        "environment": known.index(environment),
    }
    record |= {"seed": seed, "data": data, "sessions": [*record["sessions"], session]}
    write_atomically(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def check_images(path: Path, data: Mapping[str, Any]) -> None:
    """Refuse to go on with other training images than those of earlier sessions, if there were any.

    Raises:
        DataError: They are others, or the file is damaged.
    """
    before, now = _read(path).get("data", {}).get("train") if path.exists() else None, data["train"]
    if before is not None and before["hash"] != now["hash"]:
        raise DataError(
            f"The run in '{path.parent}' was begun on {_images(before)}, and data.train now has {_images(now)}; put "
            "the earlier files back, or choose another --out."
        )


def _images(facts: Mapping[str, Any]) -> str:
    return f"{facts['samples']} images of {facts['name']} (hash {facts['hash'][:12]})"


def update(path: Path, **facts: Any) -> None:
    """Set top-level facts, such as timings; the last session gets its end time.

    Raises:
        DataError: The file is damaged.
    """
    record = _read(path)
    record["sessions"][-1]["ended"] = _now()
    record.update(facts)
    write_atomically(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def seconds(path: Path) -> dict[str, float]:
    """Return how long steps took in earlier sessions, by name.

    Raises:
        DataError: The file is damaged.
    """
    return dict(_read(path).get("seconds", {}))


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

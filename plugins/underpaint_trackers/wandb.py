"""Weights & Biases."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from underpaint import Tracker
from underpaint_trackers.config import WandbConfig

__all__ = ["WeightsAndBiases"]


class WeightsAndBiases(Tracker):
    """Sends scalars and pictures to wandb, its files in the run folder.

    The id of the wandb run is kept in the folder, so that a resumed run goes on under it.
    """

    def __init__(self, config: WandbConfig, *, folder: Path, run: str) -> None:
        # Here and not above, so that the class can be documented and checked without its extra.
        import wandb

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            name=run,
            dir=str(folder),
            id=_identity(folder / "run_id"),
            resume="allow",
        )
        self._picture = wandb.Image
        # Steps begin anew in each stage, and wandb's own step may not go back.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record each number under its name."""
        self._run.log({**values, "step": step})

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Record an H×W×3 picture."""
        self._run.log({name: self._picture(image), "step": step})

    def close(self) -> None:
        """Send what is pending and end the wandb run."""
        self._run.finish()


def _identity(path: Path) -> str:
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()

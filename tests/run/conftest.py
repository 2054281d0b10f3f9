"""A whole run, as small as it can be, in this process or in others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from underpaint.config.recipe import apply_overrides, recipe_from_plain
from underpaint.config.schema import Recipe
from underpaint.run.pipeline import run_recipe

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"train": {"name": "scenes/shapes", "length": 40, "size": 32}, "size": 32, "workers": 0, "holdout": 0.2},
    "tokenizer": {
        "encoder": {"name": "tiny/vit@random", "width": 32, "depth": 2, "heads": 2},
        "adapter": "aligntok/mlp",
        "decoder": {"name": "ldm/decoder", "base": 8, "blocks": 1, "multipliers": [1, 1, 1, 2]},
        "latent_channels": 4,
    },
    "stages": [
        {"name": "align", "trains": ["adapter", "decoder"], "losses": ["l1"], "steps": 4, "batch": 8, "ema": 0.5},
        {
            "name": "perceive",
            "trains": ["encoder", "adapter", "decoder"],
            "losses": ["l1", {"name": "aligntok/semantic", "weight": 1.0}],
            "steps": 4,
            "batch": 8,
            "ema": 0.5,
            "teacher": "align",
        },
        {"name": "refine", "trains": ["decoder"], "losses": ["l1"], "steps": 3, "batch": 8, "ema": 0.5},
    ],
    "latents": {"shard": 10, "batch": 4},
    "diffusion": {
        "backbone": {"name": "sit/S-1", "width": 32, "depth": 2, "heads": 2},
        "conditioner": "labels",
        "steps": 5,
        "batch": 8,
        "ema": 0.5,
    },
    "evaluation": {
        "images": 6,
        "batch": 4,
        "show": 4,
        "generation": [{"name": "frechet", "encoder": "tiny/vit@random", "features": "mean"}],
        "sampler": {"name": "euler", "steps": 3},
    },
    "engine": {"device": "cpu", "log_every": 1, "checkpoint_every": 2},
}


def tiny_recipe(*overrides: str) -> Recipe:
    import copy

    return recipe_from_plain(apply_overrides(copy.deepcopy(TINY), overrides))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run. Tests read it and never write into it."""
    out = tmp_path_factory.mktemp("run") / "tiny run ü"
    run_recipe(tiny_recipe(), out)
    return out


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def recipe_file(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    left = [process for process in STARTED if process.poll() is None]
    STARTED.clear()
    for process in left:
        # A launcher that is killed leaves its ranks, which are of its session.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def train(
    recipe: Path,
    out: Path,
    *overrides: str,
    ranks: int = 1,
    until: str = "align",
    program: Sequence[str] = ("-m", "underpaint"),
    **environment: str,
) -> subprocess.Popen[str]:
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arguments = ["train", str(recipe), "--out", str(out), "--until", until, *overrides]
    process = subprocess.Popen(
        [sys.executable, *launcher, *program, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**ENVIRONMENT, **environment},
        start_new_session=True,
    )
    STARTED.append(process)
    return process


def finish(process: subprocess.Popen[str]) -> str:
    _, error = process.communicate(timeout=300)
    return error

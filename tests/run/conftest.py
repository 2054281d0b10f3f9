"""A whole run, as small as it can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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

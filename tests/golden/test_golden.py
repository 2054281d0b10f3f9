"""What earlier versions wrote is read, or refused with what to do; see `make`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import underpaint
from tests.golden import make
from underpaint.data.latents import LatentCache
from underpaint.errors import DataError
from underpaint.training.checkpoint import CheckpointStore
from underpaint.training.ranks import Ranks


def test_there_is_one_of_every_format() -> None:
    # A format that was raised needs a golden folder of its own, beside the older ones.
    for folder in (make.CHECKPOINT, make.CACHE, make.TOKENIZER):
        assert folder.is_dir(), f"run python -m tests.golden.make, which writes {folder.name}"


def test_the_checkpoint_is_read() -> None:
    with Ranks("cpu") as ranks:
        latest = CheckpointStore(make.CHECKPOINT, 2, ranks).latest(verify=True)
        assert latest is not None
        assert (latest.step, latest.world_size, latest.config_hash) == (4, 1, "hash")
        assert (latest.plugins, latest.extra) == ({"tiny": "1"}, {"a": 1})
        engine = make.make_engine(ranks)
        engine.load(latest.folder)
        assert engine.train_state == 4
        weight = engine.state("raw")["weight"]
        engine.close()
    # Adam with a constant gradient moves every weight by the learning rate in every step.
    start = torch.nn.Linear(3, 2)
    make.fill(start)
    torch.testing.assert_close(start.weight.detach() - weight, torch.full((2, 3), 4 * 1e-4), atol=1e-6, rtol=0)


def test_the_cache_is_read() -> None:
    cache = LatentCache(make.CACHE, make.IDENTITY)
    rows = np.array([2, 0])
    expected = make.latents()[rows]
    assert torch.equal(cache.read(rows), expected)
    assert torch.equal(cache.read(rows, np.array([True, False]))[0], expected[0].flip(2))
    assert cache.labels(rows).tolist() == [7, 5]
    assert cache.keys(rows) == ["é2", "é0"]
    assert cache.mean.flatten().tolist() == make.latents().mean((0, 2, 3)).tolist()


def test_the_tokenizer_is_read() -> None:
    tokenizer = underpaint.load(make.TOKENIZER)
    assert tokenizer.about == {"title": "kept for later versions"}
    for parameter, again in zip(tokenizer.parameters(), _filled(tokenizer), strict=True):
        assert torch.equal(parameter, again)
    with torch.no_grad():
        latent = tokenizer.encode(torch.zeros(1, 3, 4, 6))
        assert tokenizer.decode(latent).shape == (1, 3, 4, 6)


def _filled(tokenizer: torch.nn.Module) -> list[torch.Tensor]:
    other = torch.nn.ParameterList([torch.zeros_like(parameter) for parameter in tokenizer.parameters()])
    make.fill(other)
    return list(other)


@pytest.mark.parametrize(
    ("folder", "file", "pattern", "advice"),
    [
        (make.CHECKPOINT, "step-0000004/manifest.json", '"format": 1', "go on with the version that"),
        (make.CACHE, "index.json", '"format": 2', "delete the folder of this latent cache and encode the data again"),
        (make.TOKENIZER, "config.json", '"format": 1', "load it with the version that wrote it, or export it again"),
    ],
)
def test_another_format_is_refused_with_what_to_do(
    folder: Path, file: str, pattern: str, advice: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    text = (copy / file).read_text()
    assert text.count(pattern) == 1
    (copy / file).write_text(text.replace(pattern, '"format": 0'))
    assert json.loads((copy / file).read_text())
    with pytest.raises(DataError, match=re.escape(advice)), Ranks("cpu") as ranks:
        if folder == make.CHECKPOINT:
            CheckpointStore(copy, 2, ranks).latest()
        elif folder == make.CACHE:
            LatentCache(copy)
        else:
            underpaint.load(copy)

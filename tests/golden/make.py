"""Write one folder of each kind that outlives a version of underpaint, small enough to be kept with the tests.

Run as ``python -m tests.golden.make``; existing folders stay. When a format changes, keep the folders of the old one:
the tests then say what this version makes of them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import underpaint
from underpaint.config.engine import EngineConfig, OptimizerConfig
from underpaint.data.latent_writer import LatentCacheWriter
from underpaint.data.latents import FORMAT as CACHE_FORMAT
from underpaint.data.latents import CacheIdentity
from underpaint.models.folders import FORMAT as FOLDER_FORMAT
from underpaint.models.folders import save_tokenizer
from underpaint.models.tokenizer import Tokenizer
from underpaint.training.checkpoint import FORMAT as CHECKPOINT_FORMAT
from underpaint.training.checkpoint import CheckpointStore
from underpaint.training.engine import Engine
from underpaint.training.ranks import Ranks

HERE = Path(__file__).parent
CHECKPOINT, CACHE, TOKENIZER = (
    HERE / f"checkpoints-{CHECKPOINT_FORMAT}",
    HERE / f"latents-{CACHE_FORMAT}",
    HERE / f"tokenizer-{FOLDER_FORMAT}",
)
IDENTITY = CacheIdentity(
    tokenizer="tokenizer", data="data", height=4, width=6, crop="center", flip=True, dtype="float32", store="mode",
    shape=(2, 2, 3), count=3,
)  # fmt: skip


def fill(module: nn.Module) -> None:
    """Give every weight a value that no version of torch changes: multiples of 1/64, by position."""
    with torch.no_grad():
        for parameter in module.parameters():
            count = parameter.numel()
            parameter.copy_(((torch.arange(count) * 7 % 13 - 6) / 64.0).view_as(parameter))


def latents() -> torch.Tensor:
    """Return the latents of three images, exact in every type."""
    return torch.arange(36.0).view(3, 2, 2, 3) / 4.0


def make_engine(ranks: Ranks) -> Engine:
    module = nn.Linear(3, 2)
    fill(module)
    return Engine(
        module, parts={}, optimizer=OptimizerConfig(), config=EngineConfig(device="cpu"), steps=9, micro_batch=1,
        ema=0.5, ranks=ranks,
    )  # fmt: skip


def make_checkpoint(folder: Path) -> None:
    with Ranks("cpu") as ranks:
        engine = make_engine(ranks)
        for _ in range(4):
            engine.backward(engine(torch.ones(1, 3)).sum())
            engine.step()
        CheckpointStore(folder, 2, ranks, config_hash="hash", plugins={"tiny": "1"}).save(4, engine.save, {"a": 1})
        engine.close()


def make_cache(folder: Path) -> None:
    writer = LatentCacheWriter(folder, IDENTITY, shard_size=2)
    for shard in writer.missing_shards():
        rows = writer.positions(shard)
        part = latents()[rows.start : rows.stop]
        writer.write(
            shard, part, keys=[f"é{p}" for p in rows], labels=[p + 5 for p in rows], texts=None, flipped=part.flip(3)
        )
    writer.finish()


def make_tokenizer(folder: Path) -> None:
    parts = {
        "encoder": underpaint.create("encoder", "ldm/encoder", base=4, multipliers=(1, 1), blocks=1, attention=False),
        "adapter": underpaint.create("adapter", "aligntok/mlp", in_channels=(4,), latent_channels=2),
        "decoder": underpaint.create(
            "decoder", "rae/vit-b", latent_channels=2, stride=2, width=8, depth=1, heads=2, hidden=8
        ),
    }
    tokenizer = Tokenizer(**parts, about={"title": "kept for later versions"})
    fill(tokenizer)
    save_tokenizer(tokenizer, folder)


if __name__ == "__main__":
    for path, make in ((CHECKPOINT, make_checkpoint), (CACHE, make_cache), (TOKENIZER, make_tokenizer)):
        if not path.exists():
            make(path)

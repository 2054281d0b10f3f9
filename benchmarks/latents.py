"""Batches from a latent cache, at random and in blocks: samples and bytes per second, with one and more processes.

    python benchmarks/latents.py --out benchmarks/results/NAME.json

Writes synthetic latents as `underpaint encode` does, and reads batches of them with the code of diffusion training,
every process as one rank. ``cached`` latents lie in the page cache; ``cold`` ones have to come from the disk.
8 GPUs at 700 images per second each need 5,600 samples per second.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from record import commit, machine

from underpaint.data.latent_writer import LatentCacheWriter
from underpaint.data.latents import CacheIdentity, LatentCache
from underpaint.data.order import Blocks
from underpaint.training.latent_batches import latent_batches

TARGET = 8 * 700


def write(folder: Path, arguments: argparse.Namespace) -> None:
    identity = CacheIdentity(
        tokenizer="synthetic",
        data="synthetic",
        height=arguments.shape[1] * 16,
        width=arguments.shape[2] * 16,
        crop="center",
        flip=False,
        dtype=arguments.dtype,
        store=arguments.store,
        shape=tuple(arguments.shape),
        count=arguments.count,
    )
    writer = LatentCacheWriter(folder, identity, shard_size=arguments.shard)
    for shard in writer.missing_shards():
        span = writer.positions(shard)
        generator = torch.Generator().manual_seed(shard)
        latents = torch.randn(len(span), *identity.stored_shape, generator=generator)
        writer.write(shard, latents, keys=[str(i) for i in span], labels=[i % 1000 for i in span])
    writer.finish()


def read(
    folder: Path, rank: int, world_size: int, how: tuple[str, str], arguments: argparse.Namespace, start: Any, out: Any
) -> None:
    torch.set_num_threads(arguments.threads)
    cache = LatentCache(folder, statistics=arguments.statistics)
    order, state = how
    if state == "cached":
        for indices in np.array_split(np.arange(len(cache)), -(-len(cache) // 1024)):
            cache.read(indices, seeds=range(len(indices)))
    ranks: Any = SimpleNamespace(rank=rank, world_size=world_size)
    stream = latent_batches(
        cache,
        accepts="label",
        batch=arguments.batch * world_size,
        accumulation=1,
        ranks=ranks,
        seed=0,
        start=0,
        blocks=Blocks(arguments.block, arguments.window) if order == "sequential" else None,
    )
    start.wait()
    begin, worked, count = time.perf_counter(), time.process_time(), 0
    # One pass at most: what comes after it would be cached.
    most = len(cache) // world_size if state == "cold" else None
    while time.perf_counter() - begin < arguments.seconds and (most is None or count < most):
        count += len(next(stream).latents)
    out.put((count / (time.perf_counter() - begin), count / (time.process_time() - worked)))
    stream.close()  # type: ignore[attr-defined]


def measured(folder: Path, processes: int, how: tuple[str, str], arguments: argparse.Namespace) -> tuple[float, float]:
    """Return samples per second of some processes together, and per second of one core, whatever else it had to do."""
    if how[1] == "cold":
        for path in folder.iterdir():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(processes), context.Queue()
    readers = [
        context.Process(target=read, args=(folder, rank, processes, how, arguments, start, results))
        for rank in range(processes)
    ]
    for reader in readers:
        reader.start()
    rates = np.array([results.get(timeout=600) for _ in readers])
    for reader in readers:
        reader.join()
    return float(rates[:, 0].sum()), float(rates[:, 1].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100_000, help="latents to write")
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 16, 16), metavar=("D", "H", "W"))
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--store", choices=["mode", "posterior"], default="mode")
    parser.add_argument("--statistics", choices=["channel", "position"], default="channel")
    parser.add_argument("--shard", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=128, help="samples of a batch of one process")
    parser.add_argument("--block", type=int, default=1024, help="samples of a block, read in order")
    parser.add_argument("--window", type=int, default=16, help="blocks of a window, read in order")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to read, for each number of processes")
    parser.add_argument("--folder", type=Path, help="where to write the latents, about 16 KiB each; default: temporary")
    arguments = parser.parse_args()
    config = {name: value for name, value in vars(arguments).items() if name not in ("out", "folder", "processes")}
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "config": config,
        "target_samples_per_second": TARGET,
        "rows": [],
    }
    width = 2 if arguments.dtype == "bfloat16" else 4
    size = int(np.prod(arguments.shape)) * width * (2 if arguments.store == "posterior" else 1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        begin = time.perf_counter()
        write(Path(folder), arguments)
        record["write_samples_per_second"] = round(arguments.count / (time.perf_counter() - begin))
        orders = itertools.product(("random", "sequential"), ("cached", "cold"), arguments.processes)
        for order, state, processes in orders:
            rate, per_core = measured(Path(folder), processes, (order, state), arguments)
            row = {
                "order": order,
                "state": state,
                "processes": processes,
                "samples_per_second": round(rate),
                "gb_per_second": round(rate * size / 1e9, 3),
                "times_the_target": round(rate / TARGET, 2),
                "samples_per_core_second": round(per_core),
                "load": round(os.getloadavg()[0], 1),
            }
            record["rows"].append(row)
            print(
                f"{order}, {state}, {processes} processes: {row['samples_per_second']:,} samples/s, "
                f"{row['gb_per_second']} GB/s, {row['times_the_target']} times the target; "
                f"{row['samples_per_core_second']:,} per core second",
                flush=True,
            )
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

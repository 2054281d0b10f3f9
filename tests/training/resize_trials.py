"""Train over one number of ranks after another, with the loader that every stage reads with.

Run as a script: ``python resize_trials.py FOLDER``. The ranks are forked, so that torch is imported once.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import engine_cases as cases
import numpy as np
import torch
from processes import free_port

from underpaint import BrokenImageError, Dataset, Sample
from underpaint.data.loader import ImageLoader
from underpaint.data.transforms import Crop, to_tensor
from underpaint.training.checkpoint import CheckpointStore
from underpaint.training.ranks import Ranks

SESSIONS = [(4, 0, 5), (2, 5, 10), (1, 10, 15), (4, 15, 20)]


class Noise(Dataset):
    """Not as many as batches divide, so that epochs end within them; one is broken."""

    def __len__(self) -> int:
        return 45

    def __getitem__(self, index: int) -> Sample:
        if index == 7:
            raise BrokenImageError("n7", "it is torn")
        image = np.random.default_rng(index).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        return Sample(image=image, key=f"n{index}", label=index % 3, text=None)

    def fingerprint(self) -> str:
        return "noise"


def go_on(ranks: Ranks, folder: Path, first: int, last: int) -> dict[int, tuple[list[float], list[list[int]]]]:
    """Train from step `first`, where the newest checkpoint must be, to `last`, and save, at every ZeRO stage.

    Returns:
        Losses over all ranks and the samples of each global batch in their order, by stage.
    """
    results = {}
    for zero in (1, 2, 3):
        store = CheckpointStore(folder / str(zero), 2, ranks)
        engine = cases.make_engine(ranks, zero=zero)
        latest = store.latest(verify=True)
        if latest is not None:
            engine.load(latest.folder)
        assert engine.train_state == first
        loader = ImageLoader(
            Noise(),
            transform=Crop(8, 8, "random", flip=True),
            batch=cases.BATCH,
            seed=3,
            rank=ranks.rank,
            world_size=ranks.world_size,
            start_step=first,
            max_broken=0.5,
        )
        losses, samples = [], []
        for _ in range(first, last):
            batch = next(loader)
            x = to_tensor(batch.images).flatten(1)[:, :7]
            loss = cases.loss_of(engine(x), x[:, :3] * x[:, 3:6])
            engine.backward(loss)
            engine.step()
            reports = ranks.all_gather_object((loss.item(), batch.indices.tolist()))
            losses.append(sum(value for value, _ in reports) / ranks.world_size)
            samples.append([index for _, part in reports for index in part])
        assert store.save(last, engine.save, {}) is not None
        engine.close()
        results[zero] = (losses, samples)
    return results


def session(folder: Path, world_size: int, first: int, last: int) -> dict[str, tuple[list[float], list[list[int]]]]:
    """Go on over so many ranks, in processes of their own."""
    port, result = free_port(), folder.with_name(f"{folder.name}-{first}.json")
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                with Ranks("cpu", timeout=60.0) as ranks:
                    found = go_on(ranks, folder, first, last)
                if rank == 0:
                    result.write_text(json.dumps(found))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ended == [0] * world_size, ended
    return dict(json.loads(result.read_text()))


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    # What the engine imports, once for all.
    with Ranks("cpu") as ranks:
        cases.make_engine(ranks, zero=2).close()
    # In a child it would wait for threads of the process group, which are not forked.
    gc.collect()
    whole = session(folder / "whole", 1, 0, cases.STEPS)
    pieces = [session(folder / "pieces", *one) for one in SESSIONS]
    joined = {zero: [[x for piece in pieces for x in piece[zero][i]] for i in (0, 1)] for zero in whole}
    print(json.dumps({"whole": whole, "pieces": joined}))


if __name__ == "__main__":
    main()

"""Stands in for ``python -m`` in tests of the runner: a training, and what measures it, in a moment and without torch.

What it does is read from ``behaviour.json`` in the folder of the matrix, by the name of the cell.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import yaml

from underpaint.config.recipe import write_atomically
from underpaint.evaluation.protocol import Number, write_numbers


def train(folder: Path, name: str, config: dict, does: str) -> None:
    if does == "raise":
        raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")
    if does == "exit":
        print("a library said something")
        os._exit(7)
    if does == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if does in ("ranks", "ranks alone"):
        rank(folder, does)
    progress = folder / "progress"
    if does == "slow" and not progress.exists():
        signal.signal(signal.SIGTERM, lambda *_: (progress.write_text("half"), os._exit(143)))
        (folder / "ready").touch()
        time.sleep(60)
    images = config["evaluation"]["images"]
    value = float(len(name))
    protocol = {"metric": "psnr", "images": images, "data": "scenes"}
    numbers = [Number(name="psnr after align", value=value - 1, protocol=protocol, higher_is_better=True)]
    numbers += [Number(name="psnr after perceive", value=value, protocol=protocol, higher_is_better=True)]
    write_numbers(folder / "report" / "numbers.json", numbers)
    (folder / "report" / "index.html").write_text("<p>run</p>")
    (folder / "samples").mkdir(exist_ok=True)
    originals = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "samples" / "reconstructions.npz", originals=originals, reconstructions=originals // len(name))
    stage = folder / "stages" / "align"
    stage.mkdir(parents=True, exist_ok=True)
    row = {"loss": 0.5, "images_per_second": 10.0, "memory_gib": 2.0, "seconds": 4.0}
    (stage / "metrics.jsonl").write_text("".join(json.dumps({"step": i, **row}) + "\n" for i in (1, 2)))
    environment = {"versions": {"torch": "2.x", "underpaint": "0"}, "machine": {"cpu_cores": 2}}
    provenance: dict = {"environments": [environment], "sessions": [{"ranks": 1, "device": "cpu", "environment": 0}]}
    counts = {"train": 1900, "validation": 100}
    provenance["data"] = {part: {"name": "scenes", "samples": count} for part, count in counts.items()}
    (folder / "provenance.json").write_text(json.dumps(provenance))


def rank(folder: Path, does: str) -> None:
    """Be one of the processes of a launcher that takes a moment to save when it is asked to stop."""
    own = os.environ["RANK"]

    def save(*_: object) -> None:
        time.sleep(0.5)
        (folder / f"saved-{own}").touch()
        os._exit(143)

    signal.signal(signal.SIGTERM, save)
    write_atomically(folder / f"rank-{own}", str(os.getpid()))
    while len(list(folder.glob("rank-*"))) < 2:
        time.sleep(0.02)
    if does == "ranks alone" and own == "0":
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(100)


def measure(folder: Path, does: str) -> None:
    if does == "raise in measure":
        raise ValueError("no speed")
    numbers = [Number(name="encoder, M parameters", value=1.5, protocol={})]
    numbers += [Number(name="encode img/s", value=100.0, std=1.0, protocol={"batch": 32}, higher_is_better=True)]
    write_numbers(folder / "report" / "bench.json", numbers)


def main(arguments: list[str]) -> None:
    folder = Path(arguments[-1])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    top = folder.parents[1]
    name = config["name"]
    does = json.loads((top / "behaviour.json").read_text()).get(name, "ok")
    with (top / "calls.txt").open("a") as calls:
        calls.write(f"{'train' if arguments[0] == 'underpaint' else 'measure'} {name}\n")
    if arguments[0] == "underpaint":
        assert arguments[1:4] == ["train", str(folder / "config.yaml"), "--out"]
        train(folder, name, config, does)
    else:
        measure(folder, does)


if __name__ == "__main__":
    main(sys.argv[1:])

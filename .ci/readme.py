"""Run the commands of the README, one after the other, in the current folder, as a reader would type them."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

README = Path(__file__).parents[1] / "README.md"
# What a reader must bring: published weights, recipes of their own, GPUs, hours, an environment to install into.
NEEDS_MORE = ("my.yaml", "torchrun", "pip install -e", "underpaint import", "underpaint bench")


def commands() -> list[str]:
    """Return the command lines of the README's shell blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not any(word in line for word in NEEDS_MORE)]


def write_photos(folder: Path) -> None:
    """Write pictures of mixed sizes and forms, smooth as photographs are, in two classes."""
    random = np.random.default_rng(0)
    for index in range(60):
        place = folder / ("one" if index % 2 else "two") / f"{index:02}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        size = tuple(int(side) for side in random.integers(70, 300, 2))
        coarse.resize(size, Image.Resampling.BICUBIC).save(place, quality=90)


def main() -> int:
    """Run them; return how many failed."""
    write_photos(Path("photos"))
    failed = 0
    for line in commands():
        # The first command installs; that was done for this environment, not editable.
        line = line.removeprefix("pip install . && ").replace("PATH", "photos --out on-photos")
        start = time.perf_counter()
        code = subprocess.run(line, shell=True).returncode  # noqa: S602 - the README's own lines
        print(f"== {line}: exit {code} after {time.perf_counter() - start:.0f} s", flush=True)
        failed += code != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())

"""What a cell adds to its finished run, in a process of its own: sizes and speed of the models.

``python -m underpaint.bench.measure FOLDER`` writes ``report/bench.json`` into a run folder.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import torch
from torch import nn

from underpaint.bench.cells import MEASURED
from underpaint.bench.speed import tokenizer_speed
from underpaint.errors import UnderpaintError
from underpaint.evaluation.protocol import Number, write_numbers
from underpaint.models.folders import load_folder
from underpaint.models.generator import Generator
from underpaint.models.tokenizer import Tokenizer
from underpaint.run.recipes import load_recipe

__all__ = ["main", "measure_models"]


def measure_models(folder: Path) -> list[Number]:
    """Count the parameters of a run's models and time its tokenizer.

    A tokenizer that a generator's run has only loaded is not its own, and left out: timings of the same tokenizer in
    several lines of a table would differ by chance alone.

    Args:
        folder: Finished run folder.

    Raises:
        UnderpaintError: Its models cannot be loaded.
    """
    # Loads the plugins that the recipe names.
    recipe = load_recipe(str(folder / "config.yaml"))
    model = load_folder(folder)
    own = not isinstance(model, Generator) or recipe.tokenizer.load is None or bool(recipe.stages)
    tokenizer = model.tokenizer if isinstance(model, Generator) else model
    assert isinstance(tokenizer, Tokenizer)
    parts: dict[str, nn.Module] = {}
    if own:
        parts |= {name: getattr(tokenizer, name) for name in ("encoder", "adapter", "decoder")}
    if isinstance(model, Generator):
        parts |= {"backbone": model.backbone, "conditioner": model.conditioner}
    numbers = [
        Number(name=f"{name}, M parameters", value=sum(p.numel() for p in part.parameters()) / 1e6, protocol={})
        for name, part in parts.items()
    ]
    if not own:
        return numbers
    on_gpu = recipe.engine.device != "cpu" and torch.cuda.is_available()
    tokenizer.to("cuda" if on_gpu else "cpu")
    return numbers + tokenizer_speed(tokenizer, recipe.data.height, recipe.data.width)


def main(arguments: list[str]) -> int:
    """Measure the run folder that is named; return the exit code."""
    (name,) = arguments
    # By default Python would print a traceback for one of them, and nothing for the other.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    folder = Path(name)
    try:
        numbers = measure_models(folder)
        write_numbers(folder / MEASURED, numbers)
    except UnderpaintError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    for number in numbers:
        print(f"{number.name} {number.value:.4g}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

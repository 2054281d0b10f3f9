"""The folder of a run: where everything is, and whether it belongs to this recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from underpaint.config.recipe import dump_recipe, plain_recipe, read_yaml, recipe_from_plain, write_atomically
from underpaint.config.schema import Recipe
from underpaint.errors import ConfigError, DataError, NotFoundError

__all__ = ["RunFolder"]

# What may change between sessions of one run: it alters speed, logs and measurements, not the models.
_FREE = ("about", "engine", "evaluation", "trackers", "plugins", "data.workers", "data.max_broken", "data.enlarge")


@attrs.frozen
class RunFolder:
    """Paths inside a run folder."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.root / "config.yaml"

    @property
    def provenance(self) -> Path:
        """Versions, code state, plugins, data, sessions."""
        return self.root / "provenance.json"

    @property
    def small_images(self) -> Path:
        """Which training images are smaller than ``data.min_side``."""
        return self.root / "small_images.json"

    @property
    def tokenizer(self) -> Path:
        """The finished tokenizer."""
        return self.root / "tokenizer"

    @property
    def latents(self) -> Path:
        """The latent cache."""
        return self.root / "latents"

    @property
    def generator(self) -> Path:
        """The finished generator."""
        return self.root / "generator"

    @property
    def samples(self) -> Path:
        """Pictures of reconstructions and samples."""
        return self.root / "samples"

    @property
    def report(self) -> Path:
        """The report and its numbers."""
        return self.root / "report"

    def stage(self, name: str) -> Path:
        """Checkpoints, ``metrics.jsonl`` and result of a stage."""
        return self.root / "stages" / name

    def is_finished(self, stage: str) -> bool:
        """Whether a tokenizer stage has exported its result."""
        return (self.stage(stage) / "tokenizer" / "config.json").exists()

    @property
    def begun(self) -> bool:
        """Whether a step of a run has left something here."""
        return any((self.root / name).exists() for name in ("stages", "latents", "tokenizer", "generator"))

    def require(self) -> None:
        """Refuse a folder that no run has written; one whose files are damaged is taken.

        Raises:
            NotFoundError: There is no such folder.
            DataError: It is something else.
        """
        if not self.root.is_dir():
            raise NotFoundError(
                f"There is no run folder '{self.root}'; 'underpaint train' and 'underpaint quickstart' make one."
            )
        missing = [path.name for path in (self.config, self.provenance) if not path.is_file()]
        if missing:
            raise DataError(
                f"'{self.root}' is not the folder of a run, for it has no {missing[0]}; give the --out of an "
                "'underpaint train' or 'underpaint quickstart'."
            )

    def claim(self, recipe: Recipe) -> None:
        """Write the recipe into a new folder, or check that the folder holds a run of this recipe.

        Raises:
            ConfigError: The folder holds something else, or a run of another recipe; the message names the keys.
        """
        if not self.config.exists():
            strange = [path.name for path in self.root.iterdir() if not path.name.startswith((".", "run.lock"))]
            if strange:
                raise ConfigError(f"'{self.root}' holds '{sorted(strange)[0]}' and no run; choose another --out.")
            write_atomically(self.config, dump_recipe(recipe))
            return
        try:
            before = plain_recipe(recipe_from_plain(read_yaml(self.config)))
        except ConfigError as error:
            raise ConfigError(
                f"'{self.config}' is no recipe that this version of underpaint with its plugins reads: {error} Choose "
                "another --out."
            ) from error
        if not self.begun:
            # A recipe that was refused has left nothing behind that the mended one could not be run on.
            write_atomically(self.config, dump_recipe(recipe))
            return
        now = plain_recipe(recipe)
        different = [
            f"{path} was {old!r} and is {new!r}"
            for path, old, new in _differences(before, now, "")
            if not any(path == free or path.startswith(f"{free}.") for free in _FREE)
        ]
        if different:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise ConfigError(
                f"'{self.root}' holds a run of another recipe: {'; '.join(different[:3])}{more}. "
                "Choose another --out, or delete the folder to start anew."
            )
        if before != now:
            write_atomically(self.config, dump_recipe(recipe))


def _differences(old: Any, new: Any, path: str) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in {**old, **new}:
            inner = f"{path}.{key}" if path else str(key)
            found += _differences(old.get(key), new.get(key), inner)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in _differences(a, b, f"{path}[{i}]")]
    return [] if old == new else [(path, old, new)]

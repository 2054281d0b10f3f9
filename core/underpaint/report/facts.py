"""What a run has left in its folder, for the report. Whatever cannot be read is left out with a sentence."""

from __future__ import annotations

import itertools
import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from underpaint.config.recipe import read_yaml
from underpaint.errors import NotFoundError, UnderpaintError
from underpaint.evaluation.protocol import Number, read_numbers
from underpaint.training.log import read_rows

__all__ = ["RunFacts", "Speed", "StageFacts", "read_run"]

_NO_LOSS = {
    "step", "grad_norm", "images_per_second", "mfu", "data_wait", "memory_gib", "seconds", "eta", "skipped",
    "skipped_jump",
}  # fmt: skip


@attrs.frozen(kw_only=True)
class Speed:
    """How fast a stage ran; None where nothing was logged.

    Attributes:
        images_per_second: Median over the log rows, without the first, which holds the warm-up.
        mfu: Median share of the peak FLOP/s.
        data_wait: Median share of the time spent waiting for data.
        memory_gib: Largest memory use of a rank, in GiB.
        seconds: Wall time of all sessions of the stage.
    """

    images_per_second: float | None
    mfu: float | None
    data_wait: float | None
    memory_gib: float | None
    seconds: float | None


@attrs.frozen(kw_only=True)
class StageFacts:
    """One stage.

    Attributes:
        name: Its name.
        plan: Its part of the recipe; empty when the recipe cannot be read.
        rows: Log rows, ascending in step, at least one.
    """

    name: str
    plan: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def steps(self) -> list[float]:
        """The step of each row."""
        return [float(row["step"]) for row in self.rows]

    @property
    def losses(self) -> dict[str, tuple[list[float], list[float]]]:
        """Steps and values of the loss and of its terms, ``loss`` first; a term may be absent from some rows."""
        names = {name: None for row in self.rows for name in row if name not in _NO_LOSS and not name.startswith("lr")}
        curves = {}
        for name in sorted(names, key=lambda n: n != "loss"):
            rows = [row for row in self.rows if name in row]
            curves[name] = [float(row["step"]) for row in rows], [_number(row[name]) for row in rows]
        return curves

    @property
    def speed(self) -> Speed:
        """How fast it ran."""
        memory = self._finite("memory_gib", self.rows)
        later = self.rows[1:] or self.rows
        return Speed(
            images_per_second=_median(self._finite("images_per_second", later)),
            mfu=_median(self._finite("mfu", later)),
            data_wait=_median(self._finite("data_wait", later)),
            memory_gib=max(memory) if memory else None,
            seconds=_total(self._finite("seconds", self.rows)),
        )

    @staticmethod
    def _finite(name: str, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return [value for row in rows if math.isfinite(value := _number(row.get(name)))]


@attrs.frozen(kw_only=True, eq=False)
class RunFacts:
    """Everything that the report shows.

    Attributes:
        name: Name of the run.
        config: The recipe as plain values; empty when it cannot be read.
        config_text: The recipe as it is written.
        provenance: Versions, machine, sessions, …
        notes: Sentences that say what was trained on what.
        numbers: Measured numbers with their protocols.
        stages: Stages that have logged something, in the order of the recipe.
        reconstructions: N×H×W×3 uint8 images by what they are, ``original`` first; empty when there are none.
        latents: N×d×h×w latents of the originals, or None.
        samples: N×H×W×3 uint8 generated images, or None.
        sample_names: N class names or numbers of the samples; empty when they have none.
        missing: Sentences that say what is left out, and why.
    """

    name: str
    config: Mapping[str, Any]
    config_text: str
    provenance: Mapping[str, Any]
    notes: Sequence[str]
    numbers: Sequence[Number]
    stages: Sequence[StageFacts]
    reconstructions: Mapping[str, NDArray[np.uint8]]
    latents: NDArray[np.float32] | None
    samples: NDArray[np.uint8] | None
    sample_names: Sequence[str]
    missing: Sequence[str]


def read_run(run: Path) -> RunFacts:
    """Read a run folder.

    Raises:
        NotFoundError: There is no such folder.
    """
    if not run.is_dir():
        raise NotFoundError(f"There is no run folder '{run}'; 'underpaint train' and 'underpaint quickstart' make one.")
    reader = _Reader(run)
    config = reader.config()
    stages = reader.stages(config)
    pictures, latents = reader.reconstructions(stages)
    samples, names = reader.samples(config, stages)
    return RunFacts(
        name=str(config.get("name") or run.resolve().name),
        config=config,
        config_text=reader.text("config.yaml"),
        provenance=reader.provenance(),
        notes=reader.notes(),
        numbers=reader.numbers(),
        stages=stages,
        reconstructions=pictures,
        latents=latents,
        samples=samples,
        sample_names=names,
        missing=reader.missing,
    )


class _Reader:
    """Reads the files one by one and collects sentences about those that are not there."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.missing: list[str] = []

    def text(self, name: str) -> str:
        try:
            return (self.run / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def config(self) -> dict[str, Any]:
        try:
            return read_yaml(self.run / "config.yaml")
        except NotFoundError:
            self.missing.append("No recipe: the run folder has no config.yaml.")
        except UnderpaintError as error:
            self.missing.append(f"The recipe is left out: {error}")
        return {}

    def stages(self, config: Mapping[str, Any]) -> list[StageFacts]:
        listed = config.get("stages")
        plans = {str(s.get("name")): s for s in (listed if isinstance(listed, list) else []) if isinstance(s, dict)}
        diffusion = config.get("diffusion")
        plans["diffusion"] = diffusion if isinstance(diffusion, dict) else {}
        logged = sorted(path.parent.name for path in self.run.glob("stages/*/metrics.jsonl"))
        stages = []
        for name in [*plans, *(other for other in logged if other not in plans)]:
            rows = self._rows(name) if name in logged else []
            if rows:
                stages.append(StageFacts(name=name, plan=plans.get(name, {}), rows=rows))
        if not stages:
            self.missing.append("No loss curves: no stage has logged a step.")
        return stages

    def _rows(self, name: str) -> list[Mapping[str, Any]]:
        try:
            rows = read_rows(self.run / "stages" / name / "metrics.jsonl")
        except (OSError, ValueError) as error:
            self.missing.append(f"The log of stage {name} is left out: it cannot be read ({error}).")
            return []
        # After a resume a step may stand twice; the later row is the one that the model went on from.
        by_step = {_number(row.get("step")): row for row in rows if isinstance(row, dict)}
        return [by_step[step] for step in sorted(step for step in by_step if math.isfinite(step))]

    def reconstructions(
        self, stages: Sequence[StageFacts]
    ) -> tuple[dict[str, NDArray[np.uint8]], NDArray[np.float32] | None]:
        arrays = self._arrays("reconstructions", f"No reconstructions: {_ended(stages)}.")
        if arrays is None:
            return {}, None
        known = [f"reconstructions_{stage.name}" for stage in stages]
        others = sorted(name for name in arrays if name.startswith("reconstructions_") and name not in known)
        labels = {"originals": "original"}
        labels |= {key: f"after {key.removeprefix('reconstructions_')}" for key in [*known, *others]}
        labels["reconstructions"] = "reconstruction"
        pictures = {label: arrays[key] for key, label in labels.items() if key in arrays}
        if "original" not in pictures or not _are_images(*pictures.values()):
            self.missing.append(
                "The reconstructions are left out: samples/reconstructions.npz lacks 'originals', or holds something "
                "else than N×H×W×3 bytes."
            )
            return {}, None
        final = pictures.get("reconstruction", np.array([]))
        same = [label for label, a in pictures.items() if label.startswith("after ") and np.array_equal(a, final)]
        pictures = {label: images for label, images in pictures.items() if label not in same}
        latents = arrays.get("latents")
        if latents is None or latents.ndim != 4 or len(latents) != len(pictures["original"]):
            self.missing.append("No latent pictures: samples/reconstructions.npz holds no N×d×h×w 'latents'.")
            latents = None
        return pictures, latents

    def samples(
        self, config: Mapping[str, Any], stages: Sequence[StageFacts]
    ) -> tuple[NDArray[np.uint8] | None, list[str]]:
        reason = "the recipe ends with the tokenizer" if config and not config.get("diffusion") else _ended(stages)
        arrays = self._arrays("samples", f"No samples: {reason}.")
        if arrays is None:
            return None, []
        images = arrays.get("images")
        if images is None or not _are_images(images):
            self.missing.append("The samples are left out: samples/samples.npz holds no N×H×W×3 bytes named 'images'.")
            return None, []
        captions = arrays.get("captions")
        if captions is not None and captions.shape == (len(images),):
            return images, [str(text) for text in captions.tolist()]
        labels = arrays.get("labels")
        if labels is None or labels.shape != (len(images),):
            return images, []
        classes = arrays.get("classes", np.array([])).tolist()
        return images, [str(classes[i]) if 0 <= i < len(classes) else f"class {i}" for i in labels.tolist()]

    def _arrays(self, name: str, absent: str) -> dict[str, Any] | None:
        path = self.run / "samples" / f"{name}.npz"
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        except FileNotFoundError:
            self.missing.append(absent)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            self.missing.append(f"The {name} are left out: samples/{name}.npz cannot be read ({error}).")
        return None

    def numbers(self) -> list[Number]:
        path = self.run / "report" / "numbers.json"
        if not path.exists():
            self.missing.append("No numbers: nothing has been measured.")
            return []
        try:
            return read_numbers(path)
        except UnderpaintError as error:
            self.missing.append(f"The numbers are left out: {error}")
            return []

    def provenance(self) -> dict[str, Any]:
        value = self._json("provenance.json")
        if isinstance(value, dict):
            return value
        self.missing.append("No provenance: the run folder has no readable provenance.json.")
        return {}

    def notes(self) -> list[str]:
        value = self._json("report/notes.json")
        return [str(note) for note in value] if isinstance(value, list) else []

    def _json(self, name: str) -> Any:
        try:
            return json.loads(self.text(name))
        except ValueError:
            return None


def _ended(stages: Sequence[StageFacts]) -> str:
    return f"the run ended after stage {stages[-1].name}" if stages else "no stage has logged a step"


def _are_images(*arrays: NDArray[Any]) -> bool:
    first = arrays[0]
    return all(a.dtype == np.uint8 and a.ndim == 4 and a.shape == first.shape and a.size for a in arrays) and (
        first.shape[3] == 3
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _total(seconds: Sequence[float]) -> float | None:
    """Add up the sessions: the clock of a row starts anew at every resume."""
    if not seconds:
        return None
    ends = [now for now, later in itertools.pairwise(seconds) if later < now]
    return sum(ends) + seconds[-1]

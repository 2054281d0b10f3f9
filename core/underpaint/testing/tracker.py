"""Checks of trackers."""

from __future__ import annotations

import numpy as np

from underpaint.testing.kit import Subject, check, expect

__all__: list[str] = []

_PICTURE = np.zeros((8, 12, 3), dtype=np.uint8)


@check("tracker")
def writes_in_its_folder(subject: Subject) -> None:
    """Scalars and a picture end up in files below its folder, which it makes itself."""
    tracker = subject.make()
    tracker.scalars(1, {"loss": 0.5, "lr": 1e-4})
    tracker.image(1, "samples", _PICTURE)
    tracker.close()
    folder = subject.context["folder"]
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    expect(bool(files), "it wrote no file below its folder")
    others = [path.name for path in subject.folder.iterdir() if path != folder]
    expect(not others, f"it wrote outside its folder: {', '.join(others)}")


@check("tracker")
def close_is_repeatable(subject: Subject) -> None:
    """Closing it twice, or before anything was recorded, is fine."""
    tracker = subject.make()
    tracker.close()
    tracker.close()


@check("tracker")
def accepts_bad_numbers(subject: Subject) -> None:
    """Infinite values and those that are no numbers are recorded like others: they matter most."""
    tracker = subject.make()
    tracker.scalars(1, {"loss": float("nan"), "norm": float("inf")})
    tracker.close()


@check("tracker")
def continues_its_folder(subject: Subject) -> None:
    """A second tracker on the folder of the first, as after a resume, loses nothing of it."""
    first = subject.make()
    first.scalars(1, {"loss": 0.5})
    first.close()
    folder = subject.context["folder"]
    before = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    second = subject.make()
    second.scalars(2, {"loss": 0.4})
    second.close()
    after = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    expect(after > before, f"its files had {before} bytes before and have {after} after the second tracker")

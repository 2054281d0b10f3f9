"""Checks of data sets."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np

from underpaint.errors import BrokenImageError
from underpaint.interfaces.dataset import Dataset, Sample
from underpaint.testing.child import run_child
from underpaint.testing.kit import Subject, check, expect

__all__: list[str] = []

_FIRST = 16

_READ = """
import hashlib, pathlib, pickle
data = pickle.loads(pathlib.Path(arguments[0]).read_bytes())
sample = data[0]
print(json.dumps([sample.key, hashlib.sha256(sample.image.tobytes()).hexdigest(), data.fingerprint()]))
"""


def _first(data: Dataset) -> list[Sample]:
    found = []
    for index in range(min(_FIRST, len(data))):
        try:
            found.append(data[index])
        except BrokenImageError:
            continue
    expect(bool(found), f"none of the first {_FIRST} samples can be read")
    return found


@check("dataset")
def samples_as_declared(subject: Subject) -> None:
    """Samples are uint8 images of H×W×3, with labels within ``classes`` and texts as ``has_text`` says."""
    data = subject.make()
    expect(len(data) > 0, "it is empty")
    for sample in _first(data):
        image = sample.image
        expect(
            isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3,
            f"the image of '{sample.key}' is not a uint8 array of H×W×3",
        )
        label = sample.label
        fits = (label is None) if not data.classes else (type(label) is int and 0 <= label < len(data.classes))
        expect(fits, f"the label of '{sample.key}' is {label!r}, with {len(data.classes)} classes")
        fits = isinstance(sample.text, str) if data.has_text else sample.text is None
        expect(fits, f"the text of '{sample.key}' is {sample.text!r}, and has_text is {data.has_text}")


@check("dataset")
def sides_are_those_of_the_images(subject: Subject) -> None:
    """`short_side` of a position is that of the image there."""
    data = subject.make()
    for index in range(min(_FIRST, len(data))):
        try:
            image = data[index].image
        except BrokenImageError:
            continue
        side = data.short_side(index)
        expect(side == min(image.shape[:2]), f"short_side({index}) is {side!r}, and the image there {image.shape[:2]}")


@check("dataset")
def keys_are_unique(subject: Subject) -> None:
    """The keys of samples differ and are not empty."""
    keys = [sample.key for sample in _first(subject.make())]
    expect(all(isinstance(key, str) and key for key in keys), "a key is empty or not a text")
    expect(len(set(keys)) == len(keys), f"a key comes twice: {sorted(k for k in keys if keys.count(k) > 1)[:2]}")


@check("dataset")
def ends_with_index_error(subject: Subject) -> None:
    """A position behind the last sample raises IndexError."""
    data = subject.make()
    for index in (len(data), len(data) + 10):
        try:
            data[index]
        except IndexError:
            continue
        raise AssertionError(f"position {index} of {len(data)} samples was read")


@check("dataset")
def reads_repeat(subject: Subject) -> None:
    """A position always gives the same sample, in any order and in any instance."""
    data, other = subject.make(0), subject.make(1)
    for index in (len(data) - 1, 0, len(data) - 1):
        one, two = data[index], other[index]
        expect(
            one.key == two.key and one.label == two.label and np.array_equal(one.image, two.image),
            f"position {index} gave '{one.key}' and '{two.key}', or other pixels",
        )


@check("dataset")
def reads_elsewhere(subject: Subject) -> None:
    """Pickled into a fresh process, it reads the same, also after it was used."""
    data = subject.make()
    sample = data[0]
    parcel = subject.folder / "dataset.pickle"
    parcel.write_bytes(pickle.dumps(data))
    key, digest, fingerprint = run_child(_READ, subject.record, str(parcel))
    expect(key == sample.key, f"position 0 is '{sample.key}' here and '{key}' in another process")
    expect(digest == hashlib.sha256(sample.image.tobytes()).hexdigest(), "another process reads other pixels")
    expect(fingerprint == data.fingerprint(), "another process has another fingerprint")


@check("dataset")
def fingerprint_is_stable(subject: Subject) -> None:
    """The fingerprint is a text, equal for equal data sets, and reading does not change it."""
    data = subject.make()
    before = data.fingerprint()
    expect(isinstance(before, str) and bool(before), f"the fingerprint is {before!r}")
    _first(data)
    expect(before == data.fingerprint(), "the fingerprint changed by reading")
    expect(before == subject.make(1).fingerprint(), "two instances of one data set have different fingerprints")

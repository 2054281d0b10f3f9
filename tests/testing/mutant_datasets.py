"""The data sets behind ``mutants.py``; apart from the other classes, so that fresh processes need no torch."""

import random

import attrs
import numpy as np
from underpaint_demo_dataset.dataset import Gradients


class Floats(Gradients):
    """Gives float images."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return attrs.evolve(sample, image=sample.image / np.float32(255))


class LabelOutOfRange(Gradients):
    """Has a label too many."""

    def __getitem__(self, index):
        return attrs.evolve(super().__getitem__(index), label=2)


class Textless(Gradients):
    """Promises captions."""

    has_text = True


class Transposed(Gradients):
    """Takes the long side for the short one."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return attrs.evolve(sample, image=np.repeat(sample.image, 2, axis=0))

    def short_side(self, index):
        return self[index].image.shape[0]


class SameKey(Gradients):
    """Calls all samples the same."""

    def __getitem__(self, index):
        return attrs.evolve(super().__getitem__(index), key="sample")


class Endless(Gradients):
    """Starts again at the end."""

    def __getitem__(self, index):
        return super().__getitem__(index % len(self))


class Random(Gradients):
    """Adds noise at every reading."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        noise = np.array([random.randrange(100) for _ in range(sample.image.size)], dtype=np.uint8)
        return attrs.evolve(sample, image=sample.image // 2 + noise.reshape(sample.image.shape))


class LocalState(Gradients):
    """Depends on what this process did before."""

    made = 0

    def __init__(self, config):
        super().__init__(config)
        LocalState.made = 50

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return attrs.evolve(sample, image=np.full_like(sample.image, LocalState.made))


class FreshFingerprint(Gradients):
    """Has a new fingerprint each time."""

    def fingerprint(self):
        return str(random.random())

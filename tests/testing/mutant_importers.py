"""The importers behind ``mutants.py``, each with one thing wrong."""

import contextlib
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from underpaint_demo_importer.importer import Flat

from underpaint import DataError


class Inventive(Flat):
    """Makes a model of nothing where there is no file."""

    def read(self, source):
        return super().read(source) if Path(source).exists() else nn.Identity()


class Lenient(Flat):
    """Ignores tensors that it does not know."""

    def read(self, source):
        try:
            return super().read(source)
        except DataError as error:
            if "layout" in str(error):
                return nn.Identity()
            raise


class Raw(Flat):
    """Lets the exceptions of a library through."""

    def read(self, source):
        if source.endswith(".safetensors") and Path(source).exists():
            load_file(source)
        return super().read(source)


class Trusting(Flat):
    """Unpickles whatever it is given."""

    def read(self, source):
        if source.endswith(".pt"):
            with contextlib.suppress(pickle.UnpicklingError):
                torch.load(source, weights_only=False)
        return super().read(source)

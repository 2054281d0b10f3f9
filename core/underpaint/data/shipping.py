"""A data set on its way into a worker process."""

from __future__ import annotations

import pickle
from typing import Any

from underpaint.interfaces.dataset import Dataset
from underpaint.registration.manager import PluginManager, manager, reset_manager

__all__ = ["Shipped"]


class Shipped:
    """Holds a data set, and can be pickled into a process that has not loaded any plugin.

    A class from a single-file plugin exists only where the file was loaded, so the plugins of this process
    are loaded there before the data set is unpacked.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def get(self) -> Dataset:
        """Return the data set."""
        return self._dataset

    def __getstate__(self) -> dict[str, Any]:
        return {"data": pickle.dumps(self._dataset), "switches": manager().switches}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["switches"].extra:
            reset_manager(PluginManager(state["switches"]))
        self._dataset = pickle.loads(state["data"])  # noqa: S301 - written by our own parent process

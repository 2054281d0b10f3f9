"""Samples as they are drawn, streamed to one file."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["SampleFile", "holds_samples"]

_WAITING = 2
"""Batches that may wait to be written; more would only hold memory."""


class SampleFile:
    """An uncompressed .npz of images, in the layout that ADM's evaluation reads: ``arr_0`` is N×H×W×3 uint8.

    Images are copied from the device and written by a thread of their own, while the next ones are drawn. Entered as a
    context; the file appears under its name only when all images are in it, and an earlier one stays until then.

    Args:
        path: The file; its folder exists.
        count: Number of images, N.
        labels: N class indices, which become ``arr_1``, or None.
    """

    def __init__(self, path: Path, count: int, labels: NDArray[Any] | None = None) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}")
        self._count = count
        self._labels = labels
        self._added = 0
        self._waiting: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="samples")
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> SampleFile:
        # Whoever fails later cleans up what is opened here.
        self._raw: IO[bytes] = self._opened.enter_context(self._temporary.open("wb"))
        self._zip = self._opened.enter_context(zipfile.ZipFile(self._raw, "w", zipfile.ZIP_STORED))
        self._images: IO[bytes] | None = None
        return self

    def add(self, images: Tensor) -> None:
        """Take B×H×W×3 uint8 images on any device; returns before they are written.

        Raises:
            OSError: Earlier images could not be written.
        """
        assert images.dtype == torch.uint8, images.dtype
        self._added += len(images)
        assert self._added <= self._count, (self._added, self._count)
        if self._images is None:
            self._images = self._member("arr_0", (self._count, *images.shape[1:]), np.uint8)
        while len(self._waiting) >= _WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(_write, self._images, _to_host(images)))

    def _member(self, name: str, shape: tuple[int, ...], dtype: Any) -> IO[bytes]:
        # Closed before the zip file is, which refuses to close around it.
        member = self._opened.enter_context(self._zip.open(f"{name}.npy", "w", force_zip64=True))
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        return member

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._opened:
                try:
                    if kind is None:
                        self._finish()
                finally:
                    self._thread.shutdown(cancel_futures=True)
            if kind is None:
                self._temporary.replace(self._path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        assert self._added == self._count, (self._added, self._count)
        while self._waiting:
            self._waiting.popleft().result()
        if self._images is not None:
            self._images.close()
        if self._labels is not None:
            with self._member("arr_1", self._labels.shape, self._labels.dtype) as member:
                member.write(np.ascontiguousarray(self._labels).data)
        self._zip.close()
        self._raw.flush()
        os.fsync(self._raw.fileno())


def holds_samples(path: Path) -> bool:
    """Return whether a file is one that `SampleFile` wrote, as far as its layout tells."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.namelist() not in (["arr_0.npy"], ["arr_0.npy", "arr_1.npy"]):
                return False
            with file.open("arr_0.npy") as member:
                version = np.lib.format.read_magic(member)
                if version != (1, 0):
                    return False
                shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return dtype == np.uint8 and len(shape) == 4 and shape[-1] == 3


def _to_host(images: Tensor) -> Callable[[], NDArray[np.uint8]]:
    """Start the copy of images to the host; the result waits for it."""
    if images.device.type != "cuda":
        return images.contiguous().numpy
    host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
    host.copy_(images, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def wait() -> NDArray[np.uint8]:
        copied.synchronize()
        return host.numpy()

    return wait


def _write(file: IO[bytes], images: Callable[[], NDArray[np.uint8]]) -> None:
    file.write(images().data)

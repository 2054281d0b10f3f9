"""Fréchet Inception distance, on the Inception features and resize of clean-fid."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from underpaint import DataError
from underpaint_metrics.config import INCEPTION_FILE, FidConfig
from underpaint_metrics.frechet import FrechetMetric

__all__ = ["InceptionFID"]

DIMENSION = 2048
_RESIZE = {
    "clean": "clean-fid: antialiased bicubic to 299x299, in float",
    "legacy_tensorflow": "inside the Inception network, bilinear to 299x299",
}


class InceptionFID(FrechetMetric):
    """Fréchet Inception distance (Heusel et al. 2017) as clean-fid measures it, as ``fid``.

    clean-fid gives the resize and the Inception network; the distance is ours, because clean-fid's fails with
    recent SciPy.

    Args:
        config: Options.

    Raises:
        DataError: The Inception file is missing or cannot be read, or the reference file is wrong.
    """

    def __init__(self, config: FidConfig) -> None:
        self._mode = config.mode
        self._file = _inception_file(config)
        super().__init__(_load(self._file, config.mode), DIMENSION, config.reference)
        with self._file.open("rb") as file:
            self._weights = hashlib.file_digest(file, "sha256").hexdigest()[:16]

    @property
    def value_name(self) -> str:
        """Name that the value is reported under."""
        return "fid"

    def features(self, levels: Tensor) -> Tensor:
        """Return B×2048 features of B×3×H×W uint8 levels."""
        if self._mode == "clean":
            return self._extract(resize(levels).to(self.device))
        return self._extract(levels.float())

    def _extract(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)
        return features

    def protocol(self) -> Mapping[str, Any]:
        """Return how it was measured; counts are those of the last `compute` (None before it)."""
        return {
            "metric": "fid",
            "extractor": "Inception-v3 of clean-fid, pool3",
            "mode": self._mode,
            "weights": self._weights,
            "resize": _RESIZE[self._mode],
            **super().protocol(),
        }

    # TorchScript networks cannot be pickled, so a copy reads the file again.

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_held": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._held = (_load(self._file, self._mode).to(self.device),)


def resize(levels: Tensor) -> Tensor:
    """Resize B×3×H×W uint8 levels to B×3×299×299 floats in [0, 255], on the CPU, with clean-fid's filter."""
    from cleanfid.resize import build_resizer

    shrink = build_resizer("clean")
    images = levels.permute(0, 2, 3, 1).cpu().numpy()
    return torch.stack([torch.from_numpy(shrink(image)) for image in images]).permute(0, 3, 1, 2).contiguous()


def _load(path: Path, mode: str) -> nn.Module:
    from cleanfid.inception_torchscript import InceptionV3W

    try:
        with warnings.catch_warnings():
            # torch warns that TorchScript will go; the network exists in this form only.
            warnings.filterwarnings("ignore", "`torch.jit.load`", Warning)
            network = InceptionV3W(str(path.parent), download=False, resize_inside=mode == "legacy_tensorflow")
    except (RuntimeError, OSError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"The Inception file '{path}' is damaged or another network: {reason}") from error
    assert isinstance(network, nn.Module)
    return network.eval().requires_grad_(False)


def _inception_file(config: FidConfig) -> Path:
    if config.weights is not None:
        path = Path(config.weights).expanduser().resolve()
        if path.name != INCEPTION_FILE or not path.is_file():
            raise DataError(
                f"The option 'weights' of fid is '{config.weights}', which is not an existing file named "
                f"'{INCEPTION_FILE}'; give the path of that TorchScript file."
            )
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if path.is_file():
        return path
    if not config.download:
        raise DataError(
            f"fid needs the TorchScript Inception network '{INCEPTION_FILE}' of clean-fid, which is not at '{path}'; "
            "set 'weights' to its path, or 'download: true' to let clean-fid fetch it; 'frechet' works offline."
        )
    from cleanfid.downloads_helper import check_download_inception

    path.parent.mkdir(parents=True, exist_ok=True)
    # An interrupted download must not leave half a file under the final name.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        try:
            Path(check_download_inception(fpath=folder)).replace(path)
        except OSError as error:
            raise DataError(
                f"The Inception file cannot be downloaded ({error}); set 'weights' to the path of '{INCEPTION_FILE}'."
            ) from error
    return path

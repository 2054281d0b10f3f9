"""Options of the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs

from underpaint import ConfigError

__all__ = ["INCEPTION_FILE", "FidConfig", "FrechetConfig", "LpipsMetricConfig"]

INCEPTION_FILE = "inception-2015-12-05.pt"
"""Name of the TorchScript file with the Inception network that FID is defined on."""


@attrs.frozen(kw_only=True)
class LpipsMetricConfig:
    """Options of ``lpips``: those of the loss of this name.

    Attributes:
        weights: File with torchvision's VGG-16; None takes the one in torch's hub folder; ``random`` is for tests.
        heads: File with the linear heads; None takes the published ones.
        download: Let torchvision fetch its VGG-16 into the hub folder when it is not there.
    """

    weights: str | None = None
    heads: str | None = None
    download: bool = False


@attrs.frozen(kw_only=True)
class FrechetConfig:
    """Options of ``frechet``.

    Attributes:
        encoder: Registered name of the encoder whose features are compared; the default needs no files.
        options: Options of that encoder.
        features: ``pooled`` takes the encoder's summary of the image, ``mean`` the mean of its deepest
            feature map over the cells.
        reference: ``.npz`` file (path or fsspec URL) with ``mu``, ``sigma`` and perhaps ``count``, in place
            of reference images.
    """

    encoder: str = "tiny/vit"
    options: Mapping[str, Any] = attrs.field(factory=dict)
    features: Literal["pooled", "mean"] = "pooled"
    reference: str | None = None


@attrs.frozen(kw_only=True)
class FidConfig:
    """Options of ``fid``.

    Attributes:
        weights: Path of the TorchScript file `INCEPTION_FILE`; None looks into torch's hub folder.
        download: Let clean-fid fetch that file into the hub folder when it is not there.
        mode: ``clean`` resizes with the antialiased bicubic filter of clean-fid; ``legacy_tensorflow`` lets
            the network resize, as the evaluation suite of ADM does.
        reference: ``.npz`` file (path or fsspec URL) with ``mu``, ``sigma`` and perhaps ``count``, in place
            of reference images.
    """

    weights: str | None = None
    download: bool = False
    mode: Literal["clean", "legacy_tensorflow"] = "clean"
    reference: str | None = None

    def __attrs_post_init__(self) -> None:
        if self.weights is not None and self.download:
            raise ConfigError("fid has 'weights' beside 'download: true'; keep one of the two.")

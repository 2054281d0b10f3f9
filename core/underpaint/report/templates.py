"""What the templates of reports share: how they are loaded, and pictures inside the page."""

from __future__ import annotations

import functools
from pathlib import Path

import attrs
import jinja2
import numpy as np
from numpy.typing import NDArray

from underpaint.report.pictures import data_uri

__all__ = ["Picture", "picture", "template"]

_SMALL = 96


@attrs.frozen
class Picture:
    """An image with its caption; `sharp` when enlarging must not blur it."""

    uri: str
    caption: str
    sharp: bool


def picture(image: NDArray[np.uint8], caption: str) -> Picture:
    """Make an H×W×3 image part of a page."""
    # Large photographs would make a page too big to mail; the files beside it hold them without loss.
    sharp = caption == "latent" or image.shape[1] <= _SMALL
    return Picture(data_uri(image, lossless=sharp), caption, sharp)


@functools.cache
def template(name: str) -> jinja2.Template:
    """Load a template of this folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template(name)

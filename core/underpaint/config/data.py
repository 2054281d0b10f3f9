"""The images that are trained on, and the cache of their latents."""

from __future__ import annotations

from typing import Literal

import attrs
from attrs import validators as v

from underpaint.config.component import ComponentConfig
from underpaint.config.ranges import fraction, not_negative, optional_positive, positive
from underpaint.errors import ConfigError

__all__ = ["DataConfig", "LatentsConfig"]


@attrs.frozen(kw_only=True)
class DataConfig:
    """What is trained on, and how an image becomes a training crop.

    Attributes:
        train: Data set to train on.
        validation: Data set to measure on; None holds out a share of the training set.
        holdout: That share: a fixed random draw from all classes.
        limit: Train on at most this many samples, a fixed random draw; None for all.
        size: Side of the square crop in pixels, or height and width.
        crop: Where the crop is taken after the short side was resized.
        resize: Pixels that the short side of a training image is resized to before the crop, at least those of `size`;
            None takes the smallest image that covers the crop, as measuring and encoding always do.
        zoom: Range of the sides of a random crop, as a share of the largest that the image has room for, drawn evenly;
            the crop is then resized to `size`. None takes crops of the resized image as they are.
        min_side: Leave out training images whose short side is smaller, in pixels; those that are measured on stay.
            None leaves out none.
        enlarge: Train although most images are smaller than the crop. A few of them are always enlarged to cover it.
        flip: Flip half of the training images horizontally.
        workers: Loader processes per rank; 0 reads in the training process.
        memory: Decode the training images once and keep them on the training device of every rank: height·width·3
            bytes each. For small images and many epochs.
        max_broken: Share of broken images above which reading stops.
    """

    train: ComponentConfig
    validation: ComponentConfig | None = None
    holdout: float = attrs.field(default=0.05, validator=v.and_(v.gt(0.0), v.lt(1.0)))
    limit: int | None = attrs.field(default=None, validator=optional_positive)
    size: int | tuple[int, int] = 256
    crop: Literal["center", "random"] = "center"
    resize: int | None = None
    zoom: tuple[float, float] | None = None
    min_side: int | None = attrs.field(default=None, validator=optional_positive)
    enlarge: bool = False
    flip: bool = False
    workers: int = attrs.field(default=2, validator=not_negative)
    memory: bool = False
    max_broken: float = attrs.field(default=0.01, validator=fraction)

    def __attrs_post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ConfigError(f"data.size is {self.height}×{self.width}; give pixels above 0, such as 256.")
        if self.resize is not None and self.resize < max(self.height, self.width):
            raise ConfigError(
                f"data.resize is {self.resize}, and the crop is {self.height}×{self.width}; resize to at least its "
                "longer side, or leave it out."
            )
        if self.zoom is not None and not 0.0 < self.zoom[0] <= self.zoom[1] <= 1.0:
            raise ConfigError(f"data.zoom is {list(self.zoom)}; it must be [low, high] with 0 < low ≤ high ≤ 1.")
        if self.zoom is not None and (self.crop != "random" or self.resize is not None):
            raise ConfigError(
                "data.zoom is for random crops without data.resize; set data.crop to 'random', resize to null."
            )
        if self.memory and self.crop == "random":
            raise ConfigError(
                "data.memory keeps every image as one crop, and data.crop is 'random'; set crop to 'center', or memory "
                "to false."
            )

    @property
    def height(self) -> int:
        """Pixels."""
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        """Pixels."""
        return self.size if isinstance(self.size, int) else self.size[1]


@attrs.frozen(kw_only=True)
class LatentsConfig:
    """The latent cache.

    Attributes:
        flip: Also store the latents of the flipped images.
        dtype: Storage type.
        store: What is stored of the posterior of an image: its ``mode``; a ``sample``, drawn once and for all; or the
            ``posterior`` itself, which takes twice the space and from which every training step draws anew.
        statistics: What latents are standardised with: mean and standard deviation of each ``channel``, or of each
            ``position`` of each channel. The cache holds both.
        shard: Samples per shard file.
        batch: Images encoded at once, per rank.
        read: How training reads them. ``random`` shuffles all samples, and is for caches that fit into memory (the page
            cache). ``sequential`` shuffles blocks of consecutive samples, and the samples within a window of blocks;
            files are read in pieces of a block, by every machine all of them, a window ahead.
        block: Samples of a block, for ``sequential``.
        window: Blocks of a window, for ``sequential``; two windows should fit into memory.
    """

    flip: bool = False
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    store: Literal["mode", "posterior", "sample"] = "mode"
    statistics: Literal["channel", "position"] = "channel"
    shard: int = attrs.field(default=4096, validator=positive)
    batch: int = attrs.field(default=64, validator=positive)
    read: Literal["random", "sequential"] = "random"
    block: int = attrs.field(default=1024, validator=positive)
    window: int = attrs.field(default=16, validator=positive)

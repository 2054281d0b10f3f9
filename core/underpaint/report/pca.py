"""Latents as colours: their first three principal components."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["latent_pca"]

_OUTLIERS = 1.0


def latent_pca(latents: NDArray[Any]) -> NDArray[np.uint8]:
    """Show latents by the three directions in which their tokens vary most.

    The directions are found over the tokens of all the latents together, so that colours can be compared between
    images. Each component is stretched from its 1st to its 99th percentile; its sign is such that the largest
    entry of the direction is positive.

    Args:
        latents: N×d×h×w; tokens that are not finite are left out and shown black.

    Returns:
        N×h×w×3 uint8. With fewer than three directions of any spread, the colours left over are mid-grey.
    """
    count, channels, height, width = latents.shape
    tokens = np.moveaxis(np.asarray(latents, dtype=np.float64), 1, 3).reshape(-1, channels)
    finite = np.isfinite(tokens).all(axis=1)
    colours = np.full((len(tokens), 3), 127.5)
    colours[~finite] = 0.0
    if finite.any():
        centred = tokens[finite] - tokens[finite].mean(axis=0)
        variances, directions = np.linalg.eigh(centred.T @ centred)
        for colour, index in enumerate(np.argsort(variances)[::-1][:3]):
            if variances[index] > 1e-12 * variances.max():
                direction = directions[:, index]
                values = centred @ (direction * np.sign(direction[np.abs(direction).argmax()]))
                low, high = np.percentile(values, [_OUTLIERS, 100.0 - _OUTLIERS])
                colours[finite, colour] = np.clip((values - low) / max(high - low, 1e-300), 0.0, 1.0) * 255.0
    return np.round(colours).astype(np.uint8).reshape(count, height, width, 3)

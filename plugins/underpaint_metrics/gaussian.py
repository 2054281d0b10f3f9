"""The Fréchet distance between Gaussian fits, and the statistics it is computed from."""

from __future__ import annotations

import hashlib
import io
import math

import attrs
import fsspec
import numpy as np
import torch
from torch import Tensor

from underpaint import DataError

__all__ = ["Gaussian", "fit", "frechet_distance", "read_gaussian"]


@attrs.frozen(eq=False)
class Gaussian:
    """Mean and covariance of features, in float64 on the CPU.

    Attributes:
        mean: D values.
        covariance: D×D.
        count: Images it was fitted to; None where a file does not tell.
        digest: SHA-256 of the file it was read from; empty when it was fitted here.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None
    digest: str = ""


def fit(count: int, total: Tensor, outer: Tensor) -> Gaussian:
    """Fit a Gaussian to features x_1 … x_n from their sums.

    Args:
        count: n, at least 2.
        total: Σ x_i, D values in float64.
        outer: Σ x_i x_iᵀ, D×D in float64.

    Returns:
        The mean, and the unbiased covariance (division by n − 1).

    Raises:
        DataError: The sums are not finite.
    """
    assert count >= 2
    mean = total.cpu() / count
    covariance = (outer.cpu() - count * torch.outer(mean, mean)) / (count - 1)
    if not torch.isfinite(covariance).all():
        raise DataError("The features of some images are not finite, so no distance exists; try another encoder.")
    return Gaussian(mean, covariance, count)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return the squared Fréchet distance of two Gaussians, as FID reports it.

    ‖μ1 − μ2‖² + tr(S1 + S2 − 2·(S1 S2)^½) (Dowson and Landau 1982, eq. 4). The trace of the root is taken from
    the eigenvalues of the symmetric S1^½ S2 S1^½, which are those of S1 S2: no complex numbers arise, and
    singular covariances need no offset. Eigenvalues that rounding made negative count as 0.
    """
    values, vectors = torch.linalg.eigh(_symmetric(first.covariance))
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(_symmetric(root @ second.covariance @ root))
    trace = first.covariance.trace() + second.covariance.trace() - 2.0 * product.clamp(min=0.0).sqrt().sum()
    return max(0.0, float((first.mean - second.mean).square().sum() + trace))


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def read_gaussian(location: str, dimension: int) -> Gaussian:
    """Read reference statistics.

    Args:
        location: Path or fsspec URL of an ``.npz`` file with ``mu`` (D), ``sigma`` (D×D) and perhaps ``count``.
        dimension: D that the features have.

    Raises:
        DataError: The file is missing, damaged, or of other features.
    """
    try:
        with fsspec.open(location, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise DataError(
            f"There is no file of reference statistics '{location}'; check the option 'reference'."
        ) from None
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"The reference statistics '{location}' cannot be read: {error}.") from error
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            held = {key: np.asarray(arrays[key]) for key in ("mu", "sigma", "count") if key in arrays}
    except Exception as error:
        raise DataError(f"The reference statistics '{location}' are damaged or not an .npz file: {error}") from error
    if not {"mu", "sigma"} <= set(held):
        raise DataError(f"The reference statistics '{location}' lack 'mu' or 'sigma'; give an .npz file with both.")
    mu, sigma = held["mu"].astype(np.float64), held["sigma"].astype(np.float64)
    if mu.shape != (dimension,) or sigma.shape != (dimension, dimension):
        raise DataError(
            f"The reference statistics '{location}' have mu of shape {mu.shape} and sigma of shape {sigma.shape}, but "
            f"there are {dimension} features; give statistics of the same features."
        )
    if not math.isfinite(mu.sum() + sigma.sum()):
        raise DataError(f"The reference statistics '{location}' hold values that are not finite; compute them anew.")
    count = int(held["count"]) if "count" in held else None
    return Gaussian(torch.from_numpy(mu), torch.from_numpy(sigma), count, hashlib.sha256(data).hexdigest())

"""The Frechet distance of two sets of features, and how far it can be trusted.

Features (N, F) are anything a network says of images; each set is summed up by a Gaussian. The squared distance of the
two is |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)), here in float64, by symmetric eigenvalues alone:
(S1 S2)^(1/2) has the eigenvalues of (R S1 R)^(1/2) with R = S2^(1/2), which is symmetric, and defined for singular
covariances too.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.claims import check_archive
from ..runtime.errors import InputError, Remedy
from ..runtime.files import replacing

Array64 = NDArray[np.float64]
Features = NDArray[np.floating[Any]]
_CHUNK = 4096  # feature vectors converted to float64 at a time
_ROUNDING = 32 * np.finfo(np.float64).eps  # of the largest eigenvalue: what is below is noise of the solver


@dataclass(frozen=True, slots=True)
class Statistics:
    """A Gaussian: ``mean`` (F,) and ``covariance`` (F, F) of ``count`` feature vectors; 0 if nobody counted."""

    mean: Array64
    covariance: Array64
    count: int

    @property
    def dimension(self) -> int:
        """F: numbers in a feature vector."""
        return len(self.mean)

    @classmethod
    def of(cls, features: Features, weights: NDArray[np.integer[Any]] | None = None) -> Statistics:
        """Statistics of features (N, F), vector i counted ``weights[i]`` times. Unbiased covariance.

        Raises InputError for fewer than two vectors, or ones that are not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise InputError(f"{len(features)} images; a covariance needs at least 2, and more than there are features")
        times = np.ones(len(features), np.int64) if weights is None else weights
        total = int(times.sum())
        chunks = [slice(start, start + _CHUNK) for start in range(0, len(features), _CHUNK)]
        mean = sum((times[part] @ features[part].astype(np.float64) for part in chunks), np.zeros(features.shape[1]))
        mean /= total
        covariance = np.zeros((len(mean), len(mean)))
        for part in chunks:
            centred = (features[part] - mean) * np.sqrt(times[part])[:, None]
            covariance += centred.T @ centred
        if not np.isfinite(covariance).all():
            raise InputError(
                "the features are not finite: the network overflowed, or wants another `feature_range`",
                field="feature_range",
            )
        return cls(mean, covariance / (total - 1), total)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A squared Frechet distance from ``count`` images, and its error.

    ``standard_error`` and ``interval`` (95 %) say how it varies from one draw of so many images to the next; the
    reference is taken as given. ``bias`` estimates how much too large it is because they are not infinitely many.
    """

    distance: float
    standard_error: float
    interval: tuple[float, float]
    bias: float
    mean_part: float
    count: int
    dimension: int
    resamples: int


def distance(found: Statistics, reference: Statistics, root: Array64 | None = None) -> float:
    """The squared Frechet distance; ``root`` is the square root of the reference's covariance, if it is at hand.

    Raises InputError if the two have features of different size.
    """
    if found.dimension != reference.dimension:
        raise InputError(
            f"{found.dimension} features against {reference.dimension}: they are of different networks or layers"
        )
    root = square_root(reference.covariance) if root is None else root
    eigenvalues = np.linalg.eigvalsh(root @ found.covariance @ root)
    cross = np.sqrt(eigenvalues[eigenvalues > _ROUNDING * eigenvalues[-1]]).sum() if eigenvalues[-1] > 0 else 0.0
    apart = np.square(found.mean - reference.mean).sum()
    spread = np.trace(found.covariance) + np.trace(reference.covariance) - 2 * cross
    return max(0.0, float(apart + spread))  # 0 is the least there is; rounding may pass it


def square_root(covariance: Array64) -> Array64:
    """The symmetric square root of a covariance; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    root: Array64 = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return root


def estimate(
    features: Features,
    reference: Statistics,
    resamples: int = 100,
    seed: int = 0,
    tell: Callable[[float], None] = lambda share: None,
) -> Estimate:
    """The distance of features (N, F) to the reference, with its error by the bootstrap: images drawn again from
    those there are, with replacement, ``resamples`` times; ``tell`` is told what share of them is done. Raises
    InputError as :func:`distance` does.
    """
    found = Statistics.of(features)
    root = square_root(reference.covariance)
    plain = distance(found, reference, root)
    dice = np.random.default_rng(seed)
    even = np.full(len(features), 1 / len(features))
    draws = (dice.multinomial(len(features), even) for _ in range(resamples))
    distances: list[float] = []
    for times in draws:
        tell(len(distances) / resamples)
        distances.append(distance(Statistics.of(features, times), reference, root))
    again = np.array(distances)
    low, high = plain + np.quantile(again - again.mean(), [0.025, 0.975])
    return Estimate(
        distance=plain,
        standard_error=float(again.std(ddof=1)),
        interval=(max(0.0, float(low)), float(high)),
        bias=float(again.mean() - plain),
        mean_part=float(np.square(found.mean - reference.mean).sum()),
        count=found.count,
        dimension=found.dimension,
        resamples=resamples,
    )


def write_statistics(path: str | os.PathLike[str], statistics: Statistics, network: str) -> None:
    """Write statistics as .npz, whole or not at all: ``mu``, ``sigma`` (the names others use), count and network."""
    with replacing(path) as file:
        np.savez(file, mu=statistics.mean, sigma=statistics.covariance, count=statistics.count, network=network)


def read_statistics(path: str | os.PathLike[str]) -> tuple[Statistics, str | None]:
    """Statistics from .npz, and the identity of the network they were made with, None in files of other programs.

    Raises InputError for a file that holds none.
    """
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it is one array, as .npy")
        with file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # of damaged headers numpy, and Python's parser for them, raise almost anything
        raise _no_statistics(path, f"cannot be read as .npz ({str(error)[:100]})") from None
    if not {"mu", "sigma"} <= arrays.keys():
        raise _no_statistics(path, f"holds {', '.join(sorted(arrays)) or 'nothing'}; expected mu and sigma")
    mean, covariance = arrays["mu"], arrays["sigma"]
    floats = mean.dtype.kind == covariance.dtype.kind == "f"
    fits = floats and mean.ndim == 1 and covariance.shape == (len(mean), len(mean))
    if not (fits and np.isfinite(mean).all() and np.isfinite(covariance).all()):
        found = f"holds mu {mean.dtype} {mean.shape} and sigma {covariance.dtype} {covariance.shape}"
        raise _no_statistics(path, f"{found}; expected finite floats, (F,) and (F, F)")
    symmetric = (covariance.astype(np.float64) + covariance.T) / 2
    count, network = arrays.get("count", np.array(0)), arrays.get("network")
    counted = int(count) if count.ndim == 0 and count.dtype.kind in "iu" else 0
    return Statistics(mean.astype(np.float64), symmetric, counted), None if network is None else str(network)


def _no_statistics(path: str | os.PathLike[str], why: str) -> InputError:
    remedy = Remedy("evaluate", {"against": "IMAGES", "save_stats": os.fspath(path)})
    return InputError(f"'{path}' {why}; make it again, of the images it stands for", remedy=remedy)

"""What drawing gives: images that remember how they were drawn, and what can be watched on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backend import Array


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: ``done`` of ``total`` sequential steps, now in ``block`` at ``position``."""

    done: int
    total: int
    block: int
    position: int


@dataclass(frozen=True, slots=True)
class Preview:
    """What some samples look like after ``block``, which took ``seconds``: ``images`` (N, channels, size, size), from
    sample ``first`` on.
    """

    block: int
    first: int
    images: Array
    seconds: float


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told of a run: ``progress`` each finished position, ``preview`` each batch after each block, blocks last
    to first. An exception of either cancels.
    """

    progress: Callable[[Progress], None] | None = None
    preview: Callable[[Preview], None] | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """How a batch of samples was drawn, and what was checked.

    ``certificate`` (N,) is the largest round-trip error of each sample: the raw sample, before denoising, encoded
    again by the parallel graphs, against the noise it came from; None if not asked for. ``nonfinite`` lists the
    sample indices that overflowed and still are not finite, ``redrawn`` those drawn again. ``decoding`` says how blocks
    were solved, ``passes`` counts each block's dependent passes, in block order. Times in seconds; ``peak_memory`` is
    the most bytes the process has held so far. A certificate above ``suspect_above`` is suspect: :func:`suspect_limit`.
    """

    seed: int | None
    first_sample: int
    level: str
    backend: str
    decoding: str
    passes: tuple[int, ...]
    nonfinite: tuple[int, ...]
    redrawn: tuple[int, ...]
    certificate: Array | None
    seconds: float
    certificate_seconds: float
    denoise_seconds: float
    peak_memory: int
    suspect_above: float

    @property
    def largest_certificate(self) -> float | None:
        """The largest round-trip error of those that are finite; None if none is."""
        return None if self.certificate is None else largest_finite(self.certificate)

    @property
    def suspects(self) -> tuple[int, ...]:
        """Indices of samples whose certificate is suspect, not finite included."""
        return suspects(self.certificate, self.suspect_above, self.first_sample)

    @property
    def uncertified(self) -> tuple[int, ...]:
        """Indices of samples that are finite, but not when they are encoded again."""
        lost = suspects(self.certificate, math.inf, self.first_sample)
        return tuple(i for i in lost if i not in set(self.nonfinite))


def largest_finite(certificate: Array) -> float | None:
    """The largest number of an array that is finite; None if none is."""
    return max(map(float, certificate[np.isfinite(certificate)]), default=None)


def suspect_limit(allowed: float, tolerance: float) -> float:
    """The round-trip error above which a sample is suspect, everywhere: the larger of what the parity card ``allowed``
    the precision it was drawn in, and ten times the ``tolerance`` it was decoded to, 0 where serially.
    """
    return max(allowed, 10 * tolerance)


def suspects(certificate: Array | None, limit: float, first: int = 0) -> tuple[int, ...]:
    """Indices, counted from ``first``, of samples whose certificate (N,) is above a limit or not finite."""
    if certificate is None:
        return ()
    doubtful = ~(np.isfinite(certificate) & (certificate <= limit))
    return tuple(first + int(row) for row in np.flatnonzero(doubtful))


def nonfinite(*results: Array) -> tuple[int, ...]:
    """The rows, along the first axis, at which any of some results is not finite."""
    sound = [np.isfinite(result).reshape(len(result), -1).all(1) for result in results]
    return tuple(np.flatnonzero(~np.logical_and.reduce(sound)).tolist())


class Samples(np.ndarray[Any, np.dtype[np.float32]]):
    """Images (N, channels, size, size) that remember in ``report`` how they were drawn; what is derived does not."""

    report: Report | None

    def __array_finalize__(self, parent: object) -> None:
        self.report = None

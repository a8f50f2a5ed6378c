"""What is known of samples beside their pixels: how they were drawn, what was checked, which of them are suspect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .backend import Array, Doubles


@dataclass(frozen=True, slots=True)
class Report:
    """How a batch of samples was drawn, and what was checked.

    ``samples`` holds the index of each sample, in the order of the rows. ``certificate`` (N,) is the largest round-trip
    error of each: the raw sample, before denoising, encoded again by the parallel graphs, against the noise it came
    from. ``log_prob`` (N,) float64 is the log-density of each raw sample in nats, over [-1, 1] pixels, guidance
    included, and ``density`` says in words of what: see :meth:`Chain.log_prob`. The three are None if no certificate
    was asked for. ``nonfinite`` lists the sample indices that overflowed and still are not finite, ``redrawn`` those
    drawn again. ``decoding`` says how blocks were solved, ``passes`` counts each block's dependent passes, in block
    order. Times in seconds, of the whole run; ``peak_memory`` is the most bytes the process has held so far. A
    certificate above ``suspect_above`` is suspect: :func:`suspect_limit`.
    """

    seed: int | None
    samples: Sequence[int]
    level: str
    backend: str
    decoding: str
    density: str | None
    passes: tuple[int, ...]
    nonfinite: tuple[int, ...]
    redrawn: tuple[int, ...]
    certificate: Array | None
    log_prob: Doubles | None
    seconds: float
    certificate_seconds: float
    denoise_seconds: float
    peak_memory: int
    suspect_above: float

    @property
    def first_sample(self) -> int | None:
        """The index of the first sample; None for rows that are not consecutive samples."""
        samples = self.samples
        return samples[0] if len(samples) and tuple(samples) == tuple(range(samples[0], samples[-1] + 1)) else None

    def of(self, rows: NDArray[np.intp]) -> Self:
        """The report of some of the rows, in this order."""
        samples = tuple(self.samples[row] for row in rows.tolist())
        left = set(samples)
        return replace(
            self,
            samples=samples,
            nonfinite=tuple(sample for sample in self.nonfinite if sample in left),
            redrawn=tuple(sample for sample in self.redrawn if sample in left),
            certificate=None if self.certificate is None else self.certificate[rows],
            log_prob=None if self.log_prob is None else self.log_prob[rows],
        )

    @property
    def largest_certificate(self) -> float | None:
        """The largest round-trip error of those that are finite; None if none is."""
        return None if self.certificate is None else largest_finite(self.certificate)

    @property
    def suspects(self) -> tuple[int, ...]:
        """Indices of samples whose certificate is suspect, not finite included."""
        return tuple(self.samples[row] for row in suspects(self.certificate, self.suspect_above))

    @property
    def uncertified(self) -> tuple[int, ...]:
        """Indices of samples that are finite, but not when they are encoded again."""
        lost = (self.samples[row] for row in suspects(self.certificate, math.inf))
        return tuple(sample for sample in lost if sample not in set(self.nonfinite))


@dataclass(frozen=True, slots=True)
class CertifiedReport(Report):
    """A report of samples for which a certificate was asked."""

    density: str
    certificate: Array
    log_prob: Doubles


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

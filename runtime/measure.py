"""How fast is each way to draw the same samples, how far apart are they, and what could no step beat?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

import numpy as np

from .backend import Array, Labels
from .bundle import WEIGHTS, Bundle
from .decode import TOLERANCES
from .flow import Flow, Guidance

_SETTLE = 0.1  # seconds: the last one's idle threads may spin for a while, on cores that are the next one's
Draw = Callable[[Array, Labels, Guidance], Array]


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to turn noise (B, T, D) and labels into raw samples, and a name for it."""

    name: str
    draw: Draw
    passes: Callable[[], tuple[int, ...]] = tuple  # dependent passes of each block in the last draw, where counted
    tolerance: float | None = None  # change of a patch at which parallel decoding stops; None: it does not decode so


@dataclass(frozen=True, slots=True)
class Result:
    """One contender at one batch size and guidance, beside the first of the field."""

    name: str
    batch: int
    guidance: float
    seconds: float  # median
    error: float  # largest difference from the first one's samples
    rms: float
    certificate: float  # largest round-trip error, by the first one's bundle
    passes: tuple[int, ...]  # of each block
    rounds: tuple[float, ...]  # seconds of every round: the same place in two results is the same round
    tolerance: float | None = None  # at which it stopped, which is not its error

    def faster_than(self, other: Result) -> float:
        """The other's seconds over these: median over the interleaved rounds that both took part in."""
        return median(theirs / own for theirs, own in zip(other.rounds, self.rounds, strict=False))


def of_flow(flow: Flow, name: str, mode: str) -> Contender:
    """A flow decoding in one mode."""
    spent: list[tuple[int, ...]] = [()]

    def draw(noise: Array, labels: Labels, guidance: Guidance) -> Array:
        samples = flow.sample(
            noise=noise, labels=labels, guidance=guidance, denoise=False, batch_size=len(noise), decode=mode
        )
        spent[0] = samples.report.passes
        return np.asarray(samples)

    return Contender(name, draw, lambda: spent[0], TOLERANCES.get(mode))


def race(
    field: Sequence[Contender],
    judge: Flow,
    batch: int,
    guidance: Guidance,
    repeats: int,
    warm: int = 1,
    patience: float = math.inf,
) -> list[Result]:
    """Let all draw the same samples by turns, so that a slow spell of the machine hits all of them. Whoever took longer
    than ``patience`` seconds takes part in one round alone.
    """
    noise = judge.noise(0, range(batch))
    labels = np.arange(batch) % judge.config.classes if judge.config.classes else np.full(batch, -1)
    seconds: list[list[float]] = [[] for _ in field]
    images: list[Array] = [np.zeros(0, np.float32)] * len(field)
    for turn in range(warm + repeats):
        for place, (contender, times) in enumerate(zip(field, seconds, strict=True)):
            if times and times[-1] > patience:
                continue
            time.sleep(_SETTLE)
            started = time.perf_counter()
            images[place] = contender.draw(noise, labels, guidance)
            if turn >= warm:
                times.append(time.perf_counter() - started)
    return [
        Result(
            contender.name,
            batch,
            guidance.scale,
            median(times),
            float(np.abs(found - images[0]).max()),
            float(np.sqrt(np.mean(np.square(found - images[0])))),
            float(judge.certify(found, noise, labels, guidance).max()),
            contender.passes(),
            tuple(times),
            contender.tolerance,
        )
        for contender, times, found in zip(field, seconds, images, strict=True)
    ]


def read_bandwidth(threads: int, size: int = 256 << 20, repeats: int = 5) -> float:
    """Bytes per second that ``threads`` together read from memory: the sum of an array larger than the caches."""
    parts = np.array_split(np.ones(size // 8, np.float64), threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:  # numpy sums without holding the interpreter's lock
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(np.sum, parts))
            seconds.append(time.perf_counter() - started)
    return size / median(seconds)


def step_floor(bundle: Bundle, bandwidth: float) -> float:
    """Seconds: one block's weights at ``bandwidth``. Caches of the processor may beat it for small models."""
    return bundle.manifest.files[WEIGHTS].size / bundle.manifest.config.blocks / bandwidth

"""Measure, block by block, whether solving in parallel pays on this machine, and choose. Nothing here is hard-coded by
experience: which block is hard differs from checkpoint to checkpoint.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

from .backend import Array, Branches
from .decode import TOLERANCES, Parallel, solve
from .errors import InputError
from .flow import Flow, Guidance
from .plan import Plan, Row
from .ways import settles

SAMPLES = 24  # at least so many samples are looked at, in batches of the size in question
BATCHES = (1, 8, 32)
WINDOWS = (4, 8, 16, 32, 64, 128, 256)
_GAIN = 0.95  # of the serial time: what a window must stay below to be chosen, so that noise does not choose
_EXACT_ERROR = 1e-4  # against serial decoding: what exact mode promises
_SCREENED = 4  # samples on which every window is tried; the best of them is measured on all
Watch = Callable[[int, int, str], None]  # stages that are done, how many there are, and the next one
_Timed = tuple[float, int, Array]  # seconds, passes and patches of one batch


class _Outcome(NamedTuple):
    """One way of solving a block, beside serial decoding of the same batches, interleaved: a column of a row."""

    window: int
    passes: int  # most of any batch
    seconds: float  # median
    serial_seconds: float
    error: float  # largest difference from serial decoding

    @property
    def ratio(self) -> float:
        return self.seconds / self.serial_seconds


@dataclass(frozen=True, slots=True)
class _Work:
    """A block to be solved: the flow's state behind it, by batch, and what serial decoding makes of it."""

    flow: Flow
    block: int
    starts: list[Array]
    branches: list[Branches]
    solutions: list[Array]

    def time(self, number: int, how: Parallel | None) -> _Timed:
        """One batch."""
        began = time.perf_counter()
        decoding = self.flow.backend.decoding(self.block, self.starts[number], self.branches[number])
        x, passes = solve(decoding, self.flow.config.tokens, how)
        decoding.close()
        return time.perf_counter() - began, passes, x

    def compare(self, window: int, tolerance: float, limit: int, batches: int) -> _Outcome:
        """The first ``batches`` batches in parallel, for at most ``limit`` passes."""
        how = Parallel(window, tolerance, limit)
        return self._beside_serial(window, lambda number: self.time(number, how), batches)

    def _beside_serial(self, window: int, solved: Callable[[int], _Timed], batches: int) -> _Outcome:
        """Solve the first ``batches`` batches both ways by turns."""
        runs = [(self.time(i, None), solved(i)) for i in range(batches)]
        return _Outcome(
            window,
            max(passes for _, (_, passes, _) in runs),
            median(seconds for _, (seconds, _, _) in runs),
            median(seconds for (seconds, _, _), _ in runs),
            max(float(np.abs(x - self.solutions[i]).max()) for i, (_, (_, _, x)) in enumerate(runs)),
        )

    def lanes(self) -> _Outcome | None:
        """Divided among threads; None where that cannot be."""
        lanes = self.flow.lanes
        if lanes is None or len(self.starts[0]) < 2:
            return None

        def divided(number: int) -> _Timed:
            began = time.perf_counter()
            x = lanes.solve(self.block, self.starts[number], self.branches[number])
            return time.perf_counter() - began, self.flow.config.tokens - 1, x

        divided(0)  # opens the graph
        return self._beside_serial(1, divided, len(self.starts))

    def serial(self) -> _Outcome:
        seconds = median(self.time(i, None)[0] for i in range(len(self.starts)))
        return _Outcome(1, self.flow.config.tokens - 1, seconds, seconds, 0.0)

    def windows(self, serial_seconds: float) -> dict[int, int]:
        """Windows that could win, and the passes after which each has lost: no window takes fewer than two for each
        patch, one to find it and one to find it again.
        """
        steps = self.flow.config.tokens - 1
        most = {w: int(serial_seconds / self._pass_seconds(w)) for w in {min(window, steps) for window in WINDOWS}}
        return {w: min(most[w], steps) for w in sorted(most) if w > 1 and 2 * steps / w < most[w]}

    def _pass_seconds(self, window: int) -> float:
        """One pass in the middle of the sequence, where the cache has its mean length."""
        decoding = self.flow.backend.decoding(self.block, self.starts[0], self.branches[0])
        start, seconds = (self.flow.config.tokens - 1 - window) // 2, []
        for _ in range(4):
            began = time.perf_counter()
            decoding.evaluate(start, window)
            seconds.append(time.perf_counter() - began)
        decoding.close()
        return min(seconds)


def calibrate(
    flow: Flow, batches: Sequence[int] = BATCHES, samples: int = SAMPLES, watch: Watch = lambda done, total, stage: None
) -> Plan:
    """Draw ``samples`` samples serially and in every window that can win, by batch size; choose the fastest. Single
    images of a model with classes are measured guided too.

    Batches are also divided among threads. Where nothing is at least 5 % faster than serial decoding, serial decoding
    stays. Raises InputError for numbers that make no measurement.
    """
    if not batches or min(batches) < 1 or samples < 1:
        raise InputError(f"batches {', '.join(map(str, batches))} and samples {samples} must all be 1 or more")
    most = flow.backend.largest_batch
    sizes = sorted(b for b in set(batches) if most is None or b <= most)
    cases = [(batch, Guidance()) for batch in sizes]
    if 1 in sizes and flow.config.classes:
        cases.insert(1, (1, Guidance(1.0)))
    stages, count = len(cases) * flow.config.blocks * (1 + len(TOLERANCES)), itertools.count()

    def tell(stage: str) -> None:
        watch(next(count), stages, stage)

    measured = [_measure(flow, batch, guidance, samples, tell) for batch, guidance in cases]
    modes = {mode: tuple(rows[mode] for rows in measured) for mode in TOLERANCES}
    return Plan(flow.bundle.hash, flow.backend.machine, samples, modes)


def _measure(flow: Flow, batch: int, guidance: Guidance, samples: int, watch: Callable[[str], None]) -> dict[str, Row]:
    config, what = flow.config, f"batch {batch}{', guided' if guidance.scale else ''}"
    indices = [range(start, start + batch) for start in range(0, samples, batch)]
    states = [flow.noise(0, index) * flow.deviation for index in indices]
    classes = [np.arange(i.start, i.stop) % max(config.classes, 1) for i in indices]
    branches = [guidance.branches(flow.config.tokens, labels) for labels in classes]
    chosen: dict[str, list[_Outcome]] = {mode: [] for mode in TOLERANCES}
    divided: list[_Outcome] = []
    for block in reversed(range(config.blocks)):
        watch(f"{what}, block {block}, serially")
        work = _Work(flow, block, states, branches, [])
        work.solutions.extend(work.time(i, None)[2] for i in range(len(states)))
        serial = work.serial()  # after what warmed the session up
        hopeful = work.windows(serial.seconds) if settles(flow) else {}
        for mode, tolerance in TOLERANCES.items():
            watch(f"{what}, block {block}, {mode}")
            chosen[mode].append(_choose(work, mode, tolerance, hopeful) or serial)
        divided += [found for found in (work.lanes(),) if found is not None]
        states = work.solutions
    rows = {}
    for mode, found in chosen.items():
        wins = divided and sum(o.ratio for o in divided) <= _GAIN * sum(o.ratio for o in found)
        lanes = flow.lanes.count if wins and flow.lanes is not None else 1
        windows, passes, seconds, serials, errors = zip(*reversed(divided if wins else found), strict=True)
        count = len(branches[0].labels)
        rows[mode] = Row(batch * count, windows, passes, seconds, serials, errors, count, lanes)
    return rows


def _choose(work: _Work, mode: str, tolerance: float, windows: dict[int, int]) -> _Outcome | None:
    """The fastest window, if it is faster than serial decoding on every sample there is."""
    few = min(math.ceil(_SCREENED / len(work.starts[0])), len(work.starts))
    tried = [work.compare(window, tolerance, most, few) for window, most in windows.items()]
    best = min(tried, key=lambda outcome: outcome.ratio, default=None)
    if best is None or best.ratio > _GAIN:
        return None
    best = work.compare(best.window, tolerance, windows[best.window], len(work.starts))
    return best if best.ratio <= _GAIN and (mode != "exact" or best.error <= _EXACT_ERROR) else None

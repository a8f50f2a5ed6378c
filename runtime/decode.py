"""Inverting one block: how many positions a pass solves at once, and when a patch counts as solved.

The inverse is a triangular fixed point: x[i + 1] = F(x[0 ... i]). Serial decoding walks it. Parallel decoding evaluates
F at a window of positions at once, on guesses where patches are not known yet, until evaluating changes nothing any
more (Jacobi inside a window, Gauss-Seidel over windows: arXiv 2505.12849, 2505.24791). A patch is kept as soon as a
pass reproduces it to the tolerance from patches that are kept themselves. What is kept is what the pass *read*, so the
keys and values it stored belong to the final patches, and every patch fulfils its equation to the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .backend import Array, Decoding, Mask
from .errors import InputError

TOLERANCES = {"exact": 1e-5, "fast": 1e-3}  # largest change of a patch, in units of the flow's state
MODES = ("serial", *TOLERANCES)
Watch = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Parallel:
    """How a block is solved in parallel. After ``limit`` passes, or for a batch its share of them in a window, what is
    left is solved serially. Images that are done leave the batch, unless it is ``steady``: then an image's bits
    do not depend on its mates either, where the engine computes rows alike in a batch of one shape.
    """

    window: int
    tolerance: float
    limit: int
    steady: bool = False


def tolerance_of(mode: str, tolerance: float | None) -> float:
    """The tolerance of a mode, or the one that was given instead. Raises InputError."""
    if mode not in MODES:
        raise InputError.of("decode", f"'{mode}'", f"one of {', '.join(MODES)}")
    if tolerance is None:
        return TOLERANCES.get(mode, 0.0)
    if mode == "serial":
        raise InputError.of("tolerance", tolerance, "none with `decode` serial, which is exact", "drop one of the two")
    if not 0 <= tolerance < math.inf:
        raise InputError.of("tolerance", tolerance, "a number of 0 or more, such as 1e-3")
    return tolerance


def solve(decoding: Decoding, tokens: int, how: Parallel | None, on_step: Watch | None = None) -> tuple[Array, int]:
    """Solve a block, serially if ``how`` is None. Returns patches (B, T, D) and the number of dependent passes.

    ``on_step`` is told each position that is finished; an exception it raises cancels.
    """
    if how is None or how.window == 1 or tokens < 3:
        return serial(decoding, tokens, on_step), max(tokens - 1, 0)
    return _parallel(decoding, tokens, how, on_step or (lambda position: None))


def serial(decoding: Decoding, tokens: int, on_step: Watch | None = None) -> Array:
    """One position after the other, T - 1 dependent steps: exact (arXiv 2412.06329). Returns patches (B, T, D)."""
    walk: Callable[[int, Watch], None] | None = getattr(decoding, "walk", None)  # isinstance would look at `x`: a copy
    if walk is not None:
        walk(tokens - 1, on_step or (lambda position: None))
        return decoding.patches()
    for position in range(tokens - 1):
        decoding.step(position)
        if on_step is not None:
            on_step(position)
    return decoding.patches()


def _parallel(decoding: Decoding, tokens: int, how: Parallel, on_step: Watch) -> tuple[Array, int]:
    """A single image's window slides behind the last patch that is kept. The windows of a batch stay where they are
    until all of its images are done: an image's passes, and so its result, do not depend on its batch mates.
    """
    window = min(how.window, tokens - 1)
    share = math.ceil(how.limit * window / (tokens - 1))
    single = len(decoding.x) == 1
    position = passes = 0
    while position < tokens - 1 and (passes < how.limit or not single):
        if single:
            reached, spent = _slide(decoding, position, window, how.tolerance), 1
        else:
            reached, spent = _settle(decoding, position, window, how, share)
        passes += spent
        for finished in range(position, reached):
            on_step(finished)
        position = reached
    for rest in range(position, tokens - 1):
        decoding.step(rest)
        on_step(rest)
    return decoding.patches(), passes + tokens - 1 - position


def _slide(decoding: Decoding, position: int, window: int, tolerance: float) -> int:
    """One pass over the window from ``position`` on; returns the first position whose patch is known, but whose keys
    and values are not.
    """
    x, start = decoding.x, _start(decoding, position, window)
    stop = start + window
    found = decoding.evaluate(start, window)[:, position - start :]  # patches position + 1 ... stop
    unchanged = _unchanged(found[0, :-1], x[0, position + 1 : stop], tolerance)
    kept = len(unchanged) if unchanged.all() else int(np.argmin(unchanged))  # those before the first that changed
    x[:, position + 1 + kept : stop + 1] = found[:, kept:]
    return position + 1 + kept


def _settle(decoding: Decoding, position: int, window: int, how: Parallel, limit: int) -> tuple[int, int]:
    """Pass over one window until every image is done, none of which changes afterwards; images that are not after
    ``limit`` passes are finished serially. Returns the next window's start and the number of passes.
    """
    x, start = decoding.x, _start(decoding, position, window)
    stop = start + window
    waiting = np.ones(len(x), bool)
    most = min(limit, stop - position)  # of so many patches each pass finishes one or more
    for passes in range(1, most + 1):
        found = decoding.evaluate(start, window, waiting, how.steady)[:, position - start :]
        done = waiting & _unchanged(found[:, :-1], x[:, position + 1 : stop], how.tolerance).all(1)
        x[done, stop] = found[done, -1]
        waiting &= ~done
        if not waiting.any():
            return stop, passes
        x[waiting, position + 1 : stop + 1] = found[waiting]
    for single in range(position, stop):
        x[waiting, single + 1] = decoding.evaluate(single, 1, waiting, how.steady)[waiting, 0]
    return stop, most + stop - position


def _start(decoding: Decoding, position: int, window: int) -> int:
    """Where a window begins that covers ``position``: the last one reaches back, so that all have one size."""
    tokens: int = decoding.x.shape[1]
    return min(position, tokens - 1 - window)


def _unchanged(found: Array, read: Array, tolerance: float) -> Mask:
    """Patches (..., D) that a pass reproduced; never those that are not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        same: Mask = (np.abs(found - read) <= tolerance).all(-1)
    return same

"""A batch divided among threads, each with an engine of its own: faster than one engine with several threads where a
model is so small that they mostly wait for one another.
"""

from __future__ import annotations

import os
import threading
from itertools import pairwise

import numpy as np

from .backend import Array, Backend, Branches
from .decode import Watch, serial


class Lanes:
    """``count`` threads over ``backend``, which computes in the thread that calls it."""

    def __init__(self, backend: Backend, count: int) -> None:
        self.backend, self.count = backend, count
        self._begin()

    def _begin(self) -> None:
        from concurrent.futures import ThreadPoolExecutor  # most flows never divide a batch

        self._pool = ThreadPoolExecutor(self.count - 1, "lane")  # the first lane is the caller's own thread
        self._process = os.getpid()

    def solve(self, block: int, z: Array, branches: Branches, on_step: Watch | None = None) -> Array:
        """Solve a block serially, some of the images in each lane: patches (B, T, D).

        ``on_step`` is told of the first lane's positions; an exception it raises cancels all.
        """
        cancelled = threading.Event()
        if self._process != os.getpid():  # threads stay behind when a process is forked
            self._begin()

        def follow(position: int) -> None:
            if cancelled.is_set():
                raise _Cancelled

        def work(rows: slice, watch: Watch | None) -> Array:
            decoding = self.backend.decoding(block, z[rows], branches.of(rows))
            found = serial(decoding, z.shape[1], watch)
            decoding.close()
            return found

        edges = np.linspace(0, len(z), min(self.count, len(z)) + 1).astype(int).tolist()
        first, *others = (slice(start, stop) for start, stop in pairwise(edges))
        running = [self._pool.submit(work, rows, follow) for rows in others]
        try:
            found = work(first, on_step)
        except BaseException:
            cancelled.set()
            for lane in running:
                lane.exception()  # waits for its end
            raise
        return np.concatenate([found, *(lane.result() for lane in running)])


class _Cancelled(Exception):
    """Another lane was stopped."""

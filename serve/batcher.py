"""Requests that wait, drawn together: a bounded queue on the event loop, batches computed by threads.

Samples of one style share a batch, as rows of reproducible tiles: what a row holds depends on neither its place in a
tile nor its mates, so a request's samples are the bits ``Flow.sample(..., reproducible=True)`` gives it alone. That is
measured when the batcher starts; on an engine where it is not so, requests are drawn one by one.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..runtime.backend import REPRODUCIBLE_TILE, Array, Doubles
from ..runtime.flow import Flow
from ..runtime.guidance import Guidance
from ..runtime.request import UNGUIDED, Request, Resolved
from ..runtime.samples import Progress, Watch, nonfinite, suspects
from .metrics import Metrics
from .settings import Settings

OnProgress = Callable[[Progress], None]  # raises Abandoned when nobody waits any more


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a request drew: images (n, channels, size, size), sample indices that are not finite, and, if it asked for
    a certificate, that and the log-density of each raw sample in nats, (n,) both, with the sample indices for which the
    certificate is suspect, and what the density is of, in words.
    """

    request: Resolved
    images: Array
    nonfinite: tuple[int, ...]
    certificate: Array | None = None
    suspects: tuple[int, ...] = ()
    log_prob: Doubles | None = None
    density: str | None = None


class Full(Exception):
    """The queue holds all it may, so many. ``seconds`` until there should be room."""

    def __init__(self, seconds: float, waiting: int) -> None:
        super().__init__(seconds, waiting)
        self.seconds, self.waiting = seconds, waiting


class Abandoned(Exception):
    """Nobody waits for this any more."""


class Waiting:
    """One request's work: samples to draw, or a function computed alone. ``done`` gives its result.

    Samples are drawn with those of others whose ``style`` is the same: all of a request but which samples it wants.
    """

    def __init__(self, work: Resolved | Callable[[OnProgress], Any]) -> None:
        self.work = work
        self.rows, self.style = REPRODUCIBLE_TILE, None
        if isinstance(work, Resolved):
            alike = replace(work, n=1, labels=None, seed=0, first_sample=0, certify=False)
            self.rows, self.style = work.n, (alike, work.strength)  # 0 is a strength, and equals False
        self.since = time.monotonic()
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.abandoned = False  # read by the thread that computes

    def settle(self, outcome: Any) -> None:
        if self.done.done():
            return
        if isinstance(outcome, BaseException):
            self.done.set_exception(outcome)
            self.done.exception()  # seen, even if the one who asked has left
        else:
            self.done.set_result(outcome)


class Batcher:
    """Owns the queue and the threads. Everything but :meth:`_compute` and what it calls runs on the event loop."""

    def __init__(self, flow: Flow, settings: Settings, metrics: Metrics) -> None:
        self.flow, self.settings, self.metrics = flow, settings, metrics
        self.waiting: deque[Waiting] = deque()
        self.shares = True
        self._idle = settings.workers
        self._changed = asyncio.Event()
        self._pool = ThreadPoolExecutor(settings.workers, "draw")
        self._tasks: set[asyncio.Task[None]] = set()
        self._row_seconds = 0.05  # a running mean, for Retry-After
        metrics.queue.set_function(lambda: len(self.waiting))

    async def start(self) -> None:
        """Load the graphs, and see whether requests can share batches here."""
        self.shares = await asyncio.get_running_loop().run_in_executor(self._pool, self._rows_are_independent)
        self._spawn(self._dispatch())

    async def stop(self) -> None:
        """Stop taking requests from the queue; what is being computed ends at its next step."""
        for one in self.waiting:
            one.settle(Abandoned())
        self.waiting.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._pool.shutdown)

    def put(self, one: Waiting) -> None:
        """Queue work. Raises Full."""
        if len(self.waiting) >= self.settings.queue:
            rows = sum(one.rows for one in self.waiting)
            raise Full(rows * self._row_seconds / self.settings.workers, len(self.waiting))
        self.waiting.append(one)
        self._changed.set()

    def abandon(self, one: Waiting) -> None:
        """Nobody waits for this: it is not begun, or ends at its next step."""
        one.abandoned = True
        with suppress(ValueError):
            self.waiting.remove(one)
        one.settle(Abandoned())

    # --- on the event loop --------------------------------------------------------------------------------------

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _dispatch(self) -> None:
        """Give every free worker a batch as soon as it fills a tile, or its oldest request waited long enough."""
        while True:
            self._changed.clear()
            wait = self._patience()
            if wait is not None and wait <= 0:
                batch = self._take()
                self._idle -= 1
                self._spawn(self._run(batch))
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._changed.wait()

    def _patience(self) -> float | None:
        """Seconds until a batch should be begun; None: not before something changes."""
        if not self._idle or not self.waiting:
            return None
        if sum(one.rows for one in self._mates()) >= REPRODUCIBLE_TILE:
            return 0.0
        return self.waiting[0].since + self.settings.delay - time.monotonic()

    def _mates(self) -> list[Waiting]:
        """The oldest request, and those behind it that could be drawn with it."""
        head = self.waiting[0]
        if head.style is None or not self.shares:
            return [head]
        return [one for one in self.waiting if one.style == head.style]

    def _take(self) -> list[Waiting]:
        """A batch off the queue: the oldest requests, as many as leave the fewest rows of their tiles empty. Workers
        that are free share what waits.
        """
        mates = self._mates()
        totals = list(itertools.accumulate(one.rows for one in mates))
        room = min(self.settings.batch, _whole_tiles(math.ceil(totals[-1] / self._idle)))
        most = max(1, bisect.bisect_right(totals, room))
        count = max(range(1, most + 1), key=lambda k: (totals[k - 1] / _whole_tiles(totals[k - 1]), k))
        batch = mates[:count]
        taken = set(map(id, batch))
        self.waiting = deque(one for one in self.waiting if id(one) not in taken)
        return batch

    async def _run(self, batch: list[Waiting]) -> None:
        started = time.monotonic()
        try:
            outcomes = await asyncio.get_running_loop().run_in_executor(self._pool, self._compute, batch)
            for one, outcome in zip(batch, outcomes, strict=True):
                one.settle(outcome)
        finally:
            for one in batch:
                one.abandoned = True  # the service stops: so does the thread
                one.settle(Abandoned())
            self._idle += 1
            self._changed.set()
        rows = sum(one.rows for one in batch)
        self._row_seconds += 0.2 * ((time.monotonic() - started) / rows - self._row_seconds)

    # --- in a thread --------------------------------------------------------------------------------------------

    def _compute(self, batch: list[Waiting]) -> list[Any]:
        """Results or exceptions, one each. Where a batch fails, each is tried alone: only the guilty one fails."""
        try:
            return self._attempt(batch)
        except Exception as error:
            if len(batch) == 1 or isinstance(error, Abandoned):
                return [error] * len(batch)
        return [outcome for one in batch for outcome in self._compute([one])]

    def _attempt(self, batch: list[Waiting]) -> list[Any]:
        def end_if_abandoned(progress: Progress) -> None:  # told every step
            if all(one.abandoned for one in batch):
                raise Abandoned

        work = batch[0].work
        if not isinstance(work, Resolved):
            return [work(end_if_abandoned)]
        return self._draw([one.work for one in batch if isinstance(one.work, Resolved)], end_if_abandoned)

    def _draw(self, requests: list[Resolved], progress: OnProgress) -> list[Drawn]:
        started, counts = time.perf_counter(), [request.n for request in requests]
        certify = self.settings.certify or any(request.certify for request in requests)
        whole, noise = replace(requests[0], certify=certify), None
        if self.shares:
            labels = np.concatenate([request.classes() for request in requests])
            whole = replace(whole, n=len(labels), labels=tuple(labels.tolist()), first_sample=0)
            noise = self._noise(requests)
        watch = Watch(progress, lambda seen: self.metrics.inverted(seen.block, seen.seconds))
        samples = self.flow.draw(whole, noise, watch)
        self.metrics.drawn(samples.report, counts, time.perf_counter() - started)
        parts, ends = [], np.cumsum(counts)
        for request, end in zip(requests, ends, strict=True):
            rows = slice(end - request.n, end)
            images = np.asarray(samples)[rows]
            drawn = Drawn(request, images, tuple(request.first_sample + row for row in nonfinite(images)))
            if request.certify:
                mine, report = samples[rows], samples.report
                doubtful = suspects(mine.certificate, report.suspect_above, request.first_sample)
                found = mine.certificate, doubtful, mine.log_prob, report.density
                drawn = Drawn(request, images, drawn.nonfinite, *found)
            parts.append(drawn)
        return parts

    def _noise(self, requests: list[Resolved]) -> Array:
        """Of all samples of these requests, in one go."""
        pairs = [(request.seed, request.first_sample + k) for request in requests for k in range(request.n)]
        seeds, samples = zip(*pairs, strict=True)
        return self.flow.noise(seeds, samples)

    def _rows_are_independent(self) -> bool:
        """Whether a sample has the same bits in any row of a tile, whoever is in the others, on this engine."""
        config, settings = self.flow.config, self.settings
        noise = self.flow.noise(0, range(REPRODUCIBLE_TILE))
        order = np.roll(np.arange(REPRODUCIBLE_TILE), 5)[:-3]  # other places, other mates
        labels = np.arange(REPRODUCIBLE_TILE) % max(config.classes, 1) - (not config.classes)
        every = Request(REPRODUCIBLE_TILE, tuple(labels.tolist()), decode=settings.decode, tolerance=settings.tolerance)
        plain = replace(every.resolved(config), reproducible=True)
        for guidance in (UNGUIDED, Guidance(1.0)):
            all_rows = replace(plain, guidance=guidance)
            moved = replace(all_rows, n=len(order), labels=tuple(labels[order].tolist()))
            if not np.array_equal(self.flow.draw(all_rows, noise)[order], self.flow.draw(moved, noise[order])):
                return False
        return True


def _whole_tiles(rows: int) -> int:
    """Rows of the tiles that hold so many."""
    return -(-rows // REPRODUCIBLE_TILE) * REPRODUCIBLE_TILE

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
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.backend import Array
from ..runtime.flow import REPRODUCIBLE_TILE, Flow, Guidance, Progress
from .metrics import Metrics
from .settings import Settings

Watch = Callable[[Progress], None]  # raises Abandoned when nobody waits any more


@dataclass(frozen=True, slots=True)
class Style:
    """How samples are drawn. Those of one style can share a batch. ``strength`` None: not denoised."""

    guidance: Guidance
    strength: float | None


@dataclass(frozen=True, slots=True)
class Draw:
    """Samples ``first_sample ... first_sample + n - 1`` of a seed, of classes (n,), as ``Flow.resolve`` gave them."""

    seed: int
    first_sample: int
    classes: NDArray[np.int64]
    style: Style
    certify: bool = False


@dataclass(frozen=True, slots=True)
class Drawn:
    """Images (n, channels, size, size); sample indices that are not finite; certificate (n,) if asked for."""

    images: Array
    nonfinite: tuple[int, ...]
    certificate: Array | None


class Full(Exception):
    """The queue holds all it may. ``seconds`` until there should be room."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Abandoned(Exception):
    """Nobody waits for this any more."""


class Job:
    """One request's work: a draw, or a function computed alone. ``done`` gives its result."""

    def __init__(self, work: Draw | Callable[[Watch], Any]) -> None:
        self.work = work
        self.rows = len(work.classes) if isinstance(work, Draw) else REPRODUCIBLE_TILE
        self.since = time.monotonic()
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.abandoned = False  # read by the thread that computes

    @property
    def style(self) -> Style | None:
        return self.work.style if isinstance(self.work, Draw) else None

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
        self.waiting: deque[Job] = deque()
        self.shares = True
        self._idle = settings.workers
        self._changed = asyncio.Event()
        self._pool = ThreadPoolExecutor(settings.workers, "draw")
        self._tasks: set[asyncio.Task[None]] = set()
        self._row_seconds = 0.05  # a running mean, for Retry-After
        metrics.watch_queue(lambda: len(self.waiting))

    async def start(self) -> None:
        """Load the graphs, and see whether requests can share batches here."""
        self.shares = await asyncio.get_running_loop().run_in_executor(self._pool, self._rows_are_independent)
        self._spawn(self._dispatch())

    async def stop(self) -> None:
        """Stop taking requests from the queue; what is being computed ends at its next step."""
        for job in self.waiting:
            job.settle(Abandoned())
        self.waiting.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._pool.shutdown)

    def put(self, job: Job) -> None:
        """Queue a job. Raises Full."""
        if len(self.waiting) >= self.settings.queue:
            rows = sum(waiting.rows for waiting in self.waiting)
            raise Full(rows * self._row_seconds / self.settings.workers)
        self.waiting.append(job)
        self._changed.set()

    def abandon(self, job: Job) -> None:
        """Nobody waits for this job: it is not begun, or ends at its next step."""
        job.abandoned = True
        with suppress(ValueError):
            self.waiting.remove(job)
        job.settle(Abandoned())

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
        if sum(job.rows for job in self._mates()) >= REPRODUCIBLE_TILE:
            return 0.0
        return self.waiting[0].since + self.settings.delay - time.monotonic()

    def _mates(self) -> list[Job]:
        """The oldest request, and those behind it that could be drawn with it."""
        head = self.waiting[0]
        if head.style is None or not self.shares:
            return [head]
        return [job for job in self.waiting if job.style == head.style]

    def _take(self) -> list[Job]:
        """A batch off the queue: the oldest requests, as many as leave the fewest rows of their tiles empty. Workers
        that are free share what waits.
        """
        mates = self._mates()
        totals = list(itertools.accumulate(job.rows for job in mates))
        room = min(self.settings.batch, _whole_tiles(math.ceil(totals[-1] / self._idle)))
        most = max(1, bisect.bisect_right(totals, room))
        count = max(range(1, most + 1), key=lambda k: (totals[k - 1] / _whole_tiles(totals[k - 1]), k))
        batch = mates[:count]
        taken = set(map(id, batch))
        self.waiting = deque(job for job in self.waiting if id(job) not in taken)
        return batch

    async def _run(self, batch: list[Job]) -> None:
        started = time.monotonic()
        try:
            outcomes = await asyncio.get_running_loop().run_in_executor(self._pool, self._compute, batch)
            for job, outcome in zip(batch, outcomes, strict=True):
                job.settle(outcome)
        finally:
            for job in batch:
                job.abandoned = True  # the service stops: so does the thread
                job.settle(Abandoned())
            self._idle += 1
            self._changed.set()
        rows = sum(job.rows for job in batch)
        self._row_seconds += 0.2 * ((time.monotonic() - started) / rows - self._row_seconds)

    # --- in a thread --------------------------------------------------------------------------------------------

    def _compute(self, batch: list[Job]) -> list[Any]:
        """Results or exceptions, one a job. Where a batch fails its jobs are tried alone: only the guilty one fails."""
        try:
            return self._attempt(batch)
        except Exception as error:
            if len(batch) == 1 or isinstance(error, Abandoned):
                return [error] * len(batch)
        return [outcome for job in batch for outcome in self._compute([job])]

    def _attempt(self, batch: list[Job]) -> list[Any]:
        watch = partial(_watch, batch)
        work = batch[0].work
        if not isinstance(work, Draw):
            return [work(watch)]
        return list(self._draw([job.work for job in batch if isinstance(job.work, Draw)], watch))

    def _draw(self, draws: list[Draw], watch: Watch) -> list[Drawn]:
        style, flow = draws[0].style, self.flow
        counts = [len(draw.classes) for draw in draws]
        started = time.perf_counter()
        first = 0 if self.shares else draws[0].first_sample
        samples = flow.sample(
            None if self.shares else counts[0],
            noise=self._noise(draws) if self.shares else None,
            labels=np.concatenate([draw.classes for draw in draws]),
            guidance=style.guidance,
            seed=draws[0].seed,
            first_sample=first,
            denoise=False if style.strength is None else style.strength,
            certify=self.settings.certify or any(draw.certify for draw in draws),
            reproducible=True,
            decode=self.settings.decode,
            tolerance=self.settings.tolerance,
            progress=watch,
            preview=lambda seen: self.metrics.inverted(seen.block, seen.seconds),
        )
        report = samples.report
        assert report is not None
        self.metrics.drawn(report, len(draws), counts, time.perf_counter() - started)
        parts = []
        start = 0
        for draw, count in zip(draws, counts, strict=True):
            rows = range(start, start + count)
            broken = tuple(i - first - start + draw.first_sample for i in report.nonfinite if i - first in rows)
            certificate = None if report.certificate is None else report.certificate[start : start + count]
            parts.append(Drawn(np.asarray(samples)[start : start + count], broken, certificate))
            start += count
        return parts

    def _noise(self, draws: list[Draw]) -> Array:
        """Of all samples of these draws, in one go."""
        pairs = [(draw.seed, draw.first_sample + k) for draw in draws for k in range(len(draw.classes))]
        seeds, samples = zip(*pairs, strict=True)
        return self.flow.noise(seeds, samples)

    def _rows_are_independent(self) -> bool:
        """Whether a sample has the same bits in any row of a tile, whoever is in the others, on this engine."""
        noise = self.flow.noise(0, range(REPRODUCIBLE_TILE))
        order = np.roll(np.arange(REPRODUCIBLE_TILE), 5)[:-3]  # other places, other mates
        labels = np.arange(REPRODUCIBLE_TILE) % max(self.flow.config.classes, 1) - (not self.flow.config.classes)

        def draw(rows: NDArray[np.intp], guidance: Guidance) -> Array:
            found = self.flow.sample(
                noise=noise[rows],
                labels=labels[rows],
                guidance=guidance,
                reproducible=True,
                decode=self.settings.decode,
                tolerance=self.settings.tolerance,
                part_of_more=True,
            )
            return np.asarray(found)

        every = np.arange(REPRODUCIBLE_TILE)
        return all(np.array_equal(draw(every, g)[order], draw(order, g)) for g in (Guidance(), Guidance(1.0)))


def _whole_tiles(rows: int) -> int:
    """Rows of the tiles that hold so many."""
    return -(-rows // REPRODUCIBLE_TILE) * REPRODUCIBLE_TILE


def _watch(batch: list[Job], progress: Progress) -> None:
    """Told every step of a batch: ends it when nobody waits for it."""
    if all(job.abandoned for job in batch):
        raise Abandoned

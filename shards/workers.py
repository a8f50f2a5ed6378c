"""Handing out shards to workers that may die: each is drawn by whoever is free, and again if its worker was lost.

Three crews do this alike: Solo (this process), Local (processes here), and cluster.RayCrew (actors anywhere). Workers
write to the folder themselves; what passes between them and the crew is a shard there, its record back.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from ..runtime.bundle import Bundle
from ..runtime.errors import BundleError, MachineError, TarflowError, briefly
from ..runtime.flow import Flow
from ..runtime.machine import cores_each
from ..runtime.opening import Opening
from ..runtime.providers import settled
from ..runtime.samples import Progress
from .draw import draw
from .folder import check_claim
from .job import Job, Shard
from .record import Record

ATTEMPTS = 5  # losses of one shard's workers, or of workers that had not begun, after which it is no accident


@dataclass(frozen=True, slots=True)
class Task:
    """All that a worker needs to know: the job, where its bundle and its shards lie, and how to open the bundle: on
    the job's engine, or with "auto", of a job that records none, on any but the native one.

    A limit of memory is each worker's own.
    """

    job: Job
    bundle: Path
    folder: Path
    opening: Opening

    def on(self, threads: int) -> Task:
        """The same, for a worker that has so many threads."""
        return replace(self, opening=replace(self.opening, threads=threads))


class Ready:
    """A worker has opened the bundle."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker died; another is on its way and will say when it is ready."""

    why: str


News = Ready | Record | Lost | TarflowError


class Crew(Protocol):
    """Workers by number. One that is Ready, or has sent a Record, is free until it is handed a shard."""

    def hand(self, worker: int, shard: Shard) -> None:
        """Let a free worker draw a shard."""

    def wait(self) -> tuple[int, News]:
        """The next news, and whose it is."""

    def close(self) -> None:
        """Stop all workers, whatever they are at."""


class Worker:
    """What runs in each process: the bundle, opened once, and shards drawn one by one."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.flow: Flow | None = None

    def open(self) -> Flow:
        """Open the bundle, which must be the job's. Raises BundleError or MachineError where something is amiss."""
        task = self.task
        try:
            bundle, opening = Bundle.open(task.bundle), task.opening
            if opening.provider == "auto":  # of a job that records no engine
                opening = settled(bundle, opening, native=False)
            flow = Flow.open(bundle, opening)
        except BundleError as error:
            raise BundleError(f"on {socket.gethostname()}: {error}", remedy=error.remedy) from None
        except MachineError as error:
            if task.job.engine is None:
                raise
            raise MachineError(
                f"on {socket.gethostname()}, the job's engine, {task.job.engine}, is not to be had: {briefly(error)}; "
                "install tarflow there with a C++ compiler at hand, or leave that machine out"
            ) from None
        if flow.bundle.hash != task.job.bundle:
            found, expected = flow.bundle.hash[:16], task.job.bundle[:16]
            raise BundleError(
                f"on {socket.gethostname()}, '{task.bundle}' is another bundle: its hash is {found}..., the job's is "
                f"{expected}...; put the bundle where every machine sees it, or copy it to that path on each"
            )
        check_claim(task.folder, task.job)
        self.flow = flow
        return flow

    def work(self, shard: Shard | None, progress: Callable[[Progress], None] | None = None) -> Ready | Record:
        """Draw and write a shard; for None, just open the bundle."""
        flow = self.flow or self.open()
        return Ready() if shard is None else draw(flow, self.task.job, shard, self.task.folder, progress)

    def attempt(self, shard: Shard | None) -> News:
        """The same, but an error of ours comes back as a value, to be raised where a user sees it."""
        try:
            return self.work(shard)
        except TarflowError as error:
            return error


def carry_out(crew: Crew, shards: Sequence[Shard], finished: Callable[[Record], None]) -> None:
    """Have every shard drawn, and tell each record once.

    Raises what a worker raises, and MachineError if workers keep dying. Only workers that are ready get shards, so
    that one which never starts holds nothing up.
    """
    waiting, drawing = deque(shards), dict[int, Shard]()
    free, losses, left = set[int](), Counter[Shard | None](), len(shards)
    while left:
        worker, news = crew.wait()
        shard = drawing.pop(worker, None)
        free.discard(worker)
        if isinstance(news, TarflowError):
            raise news
        if isinstance(news, Lost):
            losses[shard] += 1
            if losses[shard] >= ATTEMPTS:
                raise _hopeless(shard, news)
            if shard is not None:
                waiting.appendleft(shard)
        else:
            free.add(worker)
        if isinstance(news, Record):
            left -= 1
            losses[None] = 0  # workers do start here
            finished(news)
        while free and waiting:
            drawing[worker := free.pop()] = waiting.popleft()
            crew.hand(worker, drawing[worker])


def _hopeless(shard: Shard | None, lost: Lost) -> MachineError:
    what = "workers die before they begin" if shard is None else f"every worker that draws shard {shard.number} dies"
    return MachineError(
        f"{what}, {ATTEMPTS} by now ({lost.why}). If memory runs out: fewer `workers`, or a `memory` limit for each. "
        "Drawing the same again continues with what is missing"
    )


class Solo:
    """A crew of one: this process itself. ``progress`` is told each position of a shard."""

    def __init__(self, task: Task, progress: Callable[[Progress], None] | None = None) -> None:
        self._worker, self._progress = Worker(task), progress
        self._shard: Shard | None = None

    def hand(self, worker: int, shard: Shard) -> None:
        self._shard = shard

    def wait(self) -> tuple[int, News]:
        return 0, self._worker.work(self._shard, self._progress)

    def close(self) -> None:
        pass


class Local:
    """A crew of processes on this machine, each with its own copy of the bundle in memory."""

    def __init__(self, task: Task, size: int) -> None:
        self._task = task.on(task.opening.threads or cores_each(size))
        self._context = multiprocessing.get_context("spawn")  # engines do not survive a fork
        self._workers: dict[int, tuple[BaseProcess, Connection]] = {}
        for worker in range(size):
            self._start(worker)

    def _start(self, worker: int) -> None:
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(self._task, theirs), daemon=True)
        process.start()
        theirs.close()  # so that its end is seen here
        self._workers[worker] = process, mine

    def hand(self, worker: int, shard: Shard) -> None:
        with contextlib.suppress(OSError):  # dead: wait will find out
            self._workers[worker][1].send(shard)

    def wait(self) -> tuple[int, News]:
        by_connection = {connection: worker for worker, (_, connection) in self._workers.items()}
        worker = by_connection[wait(list(by_connection))[0]]  # type: ignore[index]  # we wait for connections alone
        process, connection = self._workers[worker]
        try:
            news: News = connection.recv()
        except (EOFError, OSError):
            process.join()
            connection.close()
            self._start(worker)
            return worker, Lost(f"process {process.pid} ended with code {process.exitcode}")
        return worker, news

    def close(self) -> None:
        for process, connection in self._workers.values():
            process.terminate()
            connection.close()
        for process, _ in self._workers.values():
            process.join()


def _serve(task: Task, connection: Connection) -> None:
    """A local worker's life: open, then shards until the other end is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGHUP):  # they reach the whole group; the crew stops its workers itself
        signal.signal(number, signal.SIG_IGN)
    worker = Worker(task)
    with contextlib.suppress(EOFError, OSError):
        connection.send(worker.attempt(None))
        while True:
            connection.send(worker.attempt(connection.recv()))


def _end_with_parent() -> None:
    """A driver that was killed cannot stop its workers; half a shard is swept up by the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

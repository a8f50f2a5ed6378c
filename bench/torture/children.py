"""Cases in child processes, many a child, so that what crashes, hangs or devours ends a child and not the torture."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

SECONDS = 10.0  # of the processor that a case may take
_WAITING = 120.0  # seconds after which it waits for what never comes, or everything was stopped: it is tried once more
STILL = f"hang: nothing came of it in {_WAITING:g} s, twice"
MEMORY = 300 << 20  # bytes that a case may take beyond what the whole file takes
_FAR = 4 * MEMORY  # beyond which a child is not waited for
_CHUNK = 1000  # cases a child; what leaks in one goes with it
_FRESH = multiprocessing.get_context("spawn")  # a fork of one that has threads can wait for ever

Case = Callable[[int], str]  # does one case by its number; what came of it


@dataclass(frozen=True)
class Outcome:
    """What came of a case: what it returned, or why its child ended."""

    number: int
    verdict: str
    memory: int = 0  # bytes at peak, beyond those before it


class _Child:
    """A process that does cases one after the other, and says so before and after each."""

    def __init__(self, prepare: Callable[[], Case], numbers: Sequence[int]) -> None:
        self.left = list(numbers)
        self.inbox, outbox = _FRESH.Pipe(duplex=False)
        self.process = _FRESH.Process(target=_work, args=(prepare, self.left, outbox), daemon=True)
        self.process.start()
        outbox.close()
        self.since = time.monotonic()
        self.ready = False  # not before it says so: making ready may take longer than a case
        self.gone = False
        self.before, self.worked = 0, 0.0  # bytes resident, and seconds of the processor, when its case began

    def overdue(self) -> str | None:
        """Why it is not to be waited for any longer."""
        if not self.ready:
            return None
        waited, worked = time.monotonic() - self.since, _worked(self.process.pid or 0) - self.worked
        if worked > SECONDS:
            return f"hang: it took more than {SECONDS:g} s"
        if waited > _WAITING:
            return STILL
        if _resident(self.process.pid or 0) - self.before > _FAR:
            return f"memory: more than {_FAR >> 20} MiB"
        return None

    def end(self, why: str | None = None) -> str:
        """End the process; why it ended."""
        if why is not None:
            self.process.kill()
        self.process.join()
        code = self.process.exitcode or 0
        return why or (f"crash: {signal.Signals(-code).name}" if code < 0 else f"crash: it ended with {code}")


def play(prepare: Callable[[], Case], count: int, children: int = 2) -> Iterator[Outcome]:
    """What comes of cases 0 to ``count`` - 1. ``prepare`` runs in each child and returns what does a case there."""
    chunks = [range(first, min(first + _CHUNK, count)) for first in reversed(range(0, count, _CHUNK))]
    running: list[_Child] = []
    twice: set[int] = set()  # that are tried once more
    while chunks or running:
        while chunks and len(running) < children:
            running.append(_Child(prepare, chunks.pop()))
        ready = wait([child.inbox for child in running], timeout=0.05)
        for child in list(running):
            why = child.overdue()
            if child.inbox in ready:
                yield from _heard(child)
                why = None
            if why or child.gone:
                running.remove(child)
                why = child.end(why)
                if not child.left:
                    continue
                if why == STILL and child.left[0] not in twice:
                    twice.add(child.left[0])
                    running.append(_Child(prepare, child.left))
                    continue
                if not child.ready:
                    raise SystemExit(f"a child of the torture ended before its first case: {why}")
                yield Outcome(child.left[0], why)
                if child.left[1:]:
                    running.append(_Child(prepare, child.left[1:]))


def _heard(child: _Child) -> Iterator[Outcome]:
    while child.inbox.poll():
        try:
            number, verdict, memory = child.inbox.recv()
        except EOFError:
            child.gone = True
            return
        child.since, child.ready = time.monotonic(), True
        child.before, child.worked = _resident(child.process.pid or 0), _worked(child.process.pid or 0)
        if verdict:
            child.left.remove(number)
            yield Outcome(number, verdict, memory)


def _work(prepare: Callable[[], Case], numbers: Sequence[int], outbox: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    case = prepare()
    outbox.send((-1, "", 0))
    for number in list(numbers):
        before = _forget_peak()
        verdict = case(number)
        outbox.send((number, verdict, _peak() - before))
    outbox.close()
    os._exit(0)


def _forget_peak() -> int:
    """Start measuring the peak anew; the bytes resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) << 10


def _worked(process: int) -> float:
    """Seconds of the processor that a process took so far."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0

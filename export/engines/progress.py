"""How far a build is, over all its engines; and work that goes on in a thread while somebody watches."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar


@dataclass(frozen=True, slots=True)
class Headway:
    """How far a build is: engine ``done`` of ``total`` is at ``fraction``; seconds so far, and left (None: unknown)."""

    name: str
    done: int
    total: int
    fraction: float
    elapsed: float
    left: float | None
    kept: bool = False  # it was there already


Watch = Callable[[Headway], None]
Result = TypeVar("Result")


class Clock:
    """Keeps time over all engines of a build, and tells how far it is."""

    def __init__(self, total: int, watch: Watch) -> None:
        self.total, self.watch = total, watch
        self._started = self._told = time.monotonic()
        self._built = 0
        self._name, self._number, self._fraction = "", 0, 0.0

    def kept(self, name: str, number: int) -> None:
        self.watch(Headway(name, number + 1, self.total, 1.0, self._elapsed(), None, kept=True))

    def begin(self, name: str, number: int) -> None:
        self._name, self._number, self._fraction = name, number, 0.0
        self._tell()

    def tick(self) -> None:
        if time.monotonic() - self._told > 1:
            self._tell()

    def built(self) -> None:
        self._built += 1
        self._fraction = 1.0
        self._tell()

    def moved(self, fraction: float) -> None:
        self._fraction = max(self._fraction, fraction)

    def _tell(self) -> None:
        self._told = time.monotonic()
        done = self._built + self._fraction
        left = None
        if self._built:  # engines of a kind take alike; before the first nobody knows
            left = self._elapsed() / max(done, 0.1) * (self.total - self._number - self._fraction)
        self.watch(Headway(self._name, self._number + 1, self.total, self._fraction, self._elapsed(), left))

    def _elapsed(self) -> float:
        return time.monotonic() - self._started


def apart(work: Callable[[threading.Event], Result], tick: Callable[[], None] = lambda: None) -> Result:
    """``work(cancelled)``, run in a thread of its own; on Ctrl-C ``cancelled`` is set, and its end awaited.

    TensorRT swallows the KeyboardInterrupt that Python raises in one of its callbacks (log lines, progress), and a
    process that ends while TensorRT still builds is aborted. So no callback may run in the main thread, and nothing
    but the work's own end ends the wait: after an interruption Thread.join counts a running thread as ended.
    """
    cancelled, ended = threading.Event(), threading.Event()
    results: list[Result] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work(cancelled))
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    try:
        threading.Thread(target=run, name="tarflow-build").start()
        while not ended.wait(0.1):
            tick()
    except BaseException:
        cancelled.set()
        while not ended.is_set():
            with contextlib.suppress(KeyboardInterrupt):
                ended.wait()
        raise
    if failures:
        raise failures[0]
    return results[0]


def monitor(trt: Any, moved: Callable[[float], None], cancelled: threading.Event) -> Any:
    """TensorRT's progress monitor: nested phases of known length become one fraction of the outermost."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # a base that is known only now
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, tuple[str | None, int, int]] = {}  # name -> parent, steps, steps done

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = (parent_phase, max(num_steps, 1), 0)

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            parent, steps, _ = self._phases.get(phase_name, (None, 1, 0))
            self._phases[phase_name] = (parent, steps, step + 1)
            moved(self._fraction())
            return not cancelled.is_set()

        def _fraction(self) -> float:
            total, weight = 0.0, 1.0
            for _, steps, done in self._phases.values():  # in the order they began: outermost first
                total += weight * min(done, steps) / steps
                weight /= steps
            return min(total, 1.0)

    return Monitor()

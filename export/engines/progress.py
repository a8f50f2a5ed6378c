"""How far a build is, over all its engines; and work that goes on in a thread while somebody watches."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
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

    def begin(self, name: str, kept: bool = False) -> None:
        self._name, self._number, self._fraction = name, self._number + 1, float(kept)
        self._tell(kept)

    def tick(self) -> None:
        if time.monotonic() - self._told > 1:
            self._tell()

    def built(self) -> None:
        self._built += 1
        self._fraction = 1.0
        self._tell()

    def moved(self, fraction: float) -> None:
        self._fraction = max(self._fraction, fraction)

    def _tell(self, kept: bool = False) -> None:
        self._told = time.monotonic()
        elapsed, done, left = self._told - self._started, self._built + self._fraction, None
        if self._built and not kept:  # engines of a kind take alike; before the first nobody knows
            left = elapsed / max(done, 0.1) * (self.total - self._number + 1 - self._fraction)
        self.watch(Headway(self._name, self._number, self.total, self._fraction, elapsed, left, kept))


def apart(work: Callable[[threading.Event], Result], tick: Callable[[], None] = lambda: None) -> Result:
    """``work(cancelled)``, run in a thread of its own; on Ctrl-C ``cancelled`` is set, and its end awaited.

    TensorRT swallows the KeyboardInterrupt that Python raises in one of its callbacks (log lines, progress), and a
    process that ends while TensorRT still builds is aborted. So no callback may run in the main thread, and nothing
    but the work's own end ends the wait: after an interruption Thread.join counts a running thread as ended.
    """
    cancelled = threading.Event()
    with ThreadPoolExecutor(1, "tarflow-build") as pool:
        built = pool.submit(work, cancelled)
        try:
            while wait([built], 0.1).not_done:
                tick()
        except BaseException:
            cancelled.set()
            while not built.done():
                with contextlib.suppress(KeyboardInterrupt):
                    wait([built])
            raise
    return built.result()


def monitor(trt: Any, moved: Callable[[float], None], cancelled: threading.Event) -> Any:
    """TensorRT's progress monitor: nested phases of known length become one fraction of the outermost."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # a base that is known only now
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, tuple[int, int]] = {}  # name -> steps, steps done; outermost first

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = (max(num_steps, 1), 0)

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            steps, _ = self._phases.get(phase_name, (1, 0))
            self._phases[phase_name] = (steps, step + 1)
            fraction, weight = 0.0, 1.0
            for steps, done in self._phases.values():
                fraction += weight * min(done, steps) / steps
                weight /= steps
            moved(min(fraction, 1.0))
            return not cancelled.is_set()

    return Monitor()

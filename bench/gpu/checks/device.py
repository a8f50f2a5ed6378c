"""The device itself: does it start, what does it hold, what does it hold on to, and from how many threads?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.gpu.checks.check import Case, Outcome, draw, free_memory, labels
from bench.gpu.opening import captures
from tarflow.runtime.bundle import WEIGHTS
from tarflow.runtime.errors import MachineError
from tarflow.runtime.flow import Guidance
from tarflow.runtime.memory import cache_row
from tarflow.runtime.precision import PRECISIONS
from tarflow.runtime.tensorrt.cuda import Cuda

SIZES = range(1, 9)


def start(case: Case) -> Outcome:
    """The provider starts and draws."""
    began = time.perf_counter()
    flow = case.open()
    opened = time.perf_counter()
    images = flow.sample(4, labels=labels(flow, 4), seed=3, certify=True)
    drawn = time.perf_counter()
    draw(flow, 4)
    report = images.report
    assert report.certificate is not None
    certificate = float(report.certificate.max())
    most = PRECISIONS[case.precision].tolerance.certificate
    found = {
        "backend": flow.backend.description,
        "machine": flow.backend.machine,
        "captures": captures(flow),
        "certificate": certificate,
        "seconds": {"open": opened - began, "first": drawn - opened, "again": time.perf_counter() - drawn},
    }
    ok = bool(np.isfinite(images).all()) and certificate <= most
    return Outcome(ok, f"finite, certificate within {most:g}", found)


def cuda_python(case: Case) -> Outcome:
    """What engines need of CUDA: memory, copies, a captured copy that is replayed, and errors that do not stick."""
    cuda, numbers = Cuda(), np.arange(1 << 18, dtype=np.float32)
    source, target = cuda.allocate(numbers.nbytes), cuda.allocate(numbers.nbytes)

    def holds(address: int, wanted: Any) -> bool:
        return bool((cuda.download(address, numbers.shape, np.float32) == wanted).all())

    found: dict[str, Any] = {"zeros at first": holds(source, 0)}
    cuda.upload(source, numbers)
    graph = cuda.capture(lambda: cuda.copy(target, source, numbers.nbytes))
    found["a capture runs nothing"] = holds(target, 0)
    cuda.replay(graph)
    found["a replay does"] = holds(target, numbers)
    cuda.forget(graph)
    refused: dict[str, Callable[[], object]] = {
        "too much memory": lambda: cuda.allocate(1 << 45),
        "a wait in a capture": lambda: cuda.capture(cuda.synchronize),
    }
    for name, attempt in refused.items():
        try:
            attempt()
            found[f"{name} is refused"] = False
        except MachineError:
            found[f"{name} is refused"] = True
    cuda.upload(source, numbers * 2)
    found["usable after both"] = holds(source, numbers * 2)
    cuda.free(source)
    cuda.free(target)
    return Outcome(all(found.values()), "all of it", {**found, "name": cuda.name, "capability": cuda.capability})


def growth(case: Case) -> Outcome:
    """Device memory after each of several batch sizes."""
    flow, config, free = case.open(), case.bundle.manifest.config, []
    for n in SIZES:
        draw(flow, n)
        free.append(free_memory())
    weights = case.bundle.path(WEIGHTS).stat().st_size
    most = 0.3 * weights + sum(SIZES) * cache_row(config, case.precision)
    known = [size for size in free if size is not None]
    grown = known[0] - known[-1] if known else 0
    found = {"free": free, "grown": grown, "weights": weights}
    return Outcome(grown <= most, f"grows by at most {most:.0f} bytes: 0.3 times the weights, and caches", found)


def alternate(case: Case) -> Outcome:
    """Guided and unguided batches by turns, as a service gets them: what it costs, and what is not given back."""
    flow, turns = case.open(), []
    for turn in range(12):
        began = time.perf_counter()
        draw(flow, 16, float(turn % 2), reproducible=True)
        turns.append((round(time.perf_counter() - began, 4), free_memory()))
    alone = []
    for _ in range(4):
        began = time.perf_counter()
        draw(flow, 16, reproducible=True)
        alone.append(round(time.perf_counter() - began, 4))
    leaked = (turns[3][1] or 0) - (turns[-1][1] or 0)
    found = {"seconds and free memory by turns": turns, "seconds unguided alone": alone, "leaked": leaked}
    return Outcome(leaked <= 0, "no memory is taken after two turns of each", found)


def threads(case: Case) -> Outcome:
    """Three threads, one flow, two shapes: no errors, and the bits of a flow used by one."""
    wanted = {n: draw(case.open(), n, 1.0) for n in (3, 5)}
    flow, errors, wrong = case.open(), [], []

    def work(first: int) -> None:
        for turn in range(10):
            n = 3 if (first + turn) % 2 else 5
            try:
                images = flow.sample(
                    n,
                    labels=labels(flow, n),
                    guidance=Guidance(1.0),
                    seed=3,
                    decode="serial",
                    certify=True,
                    denoise=False,
                )
                if not np.array_equal(images, wanted[n]):
                    wrong.append(n)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}"[:200])

    started = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    found = {"errors": errors[:3], "failed": len(errors), "other bits": len(wrong)}
    return Outcome(not errors and not wrong, "no error, the same bits", found)

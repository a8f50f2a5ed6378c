"""libtarflow beside the Python runtime: same bundle, same ONNX Runtime, one run, interleaved, medians.

    make cpp && python -m bench.cpp

Writes its section of bench/RESULTS.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.results import RESULTS, machine, replace_section
from tarflow.runtime.backend import Branches
from tarflow.runtime.flow import Flow, Guidance
from tests.cpp_library import CppFlow

DEMO = Path(__file__).parent.parent / "tarflow" / "demo"
HEADING = "## The C++ runtime beside Python's"
REPEATS = {1: 41, 8: 25, 64: 9}


def pair(python: Flow, cpp: CppFlow, batch: int, guidance: float) -> tuple[float, float, float, float]:
    """Seconds of a whole decode, medians: Python's and C++'s, the ratio of neighbours, and the largest difference."""
    labels, times = np.arange(batch) % 10, []
    sides: list[Callable[[], np.ndarray[Any, Any]]] = [
        lambda: python.sample(batch, labels=labels, guidance=Guidance(guidance), denoise=False, batch_size=batch),
        lambda: cpp.sample(batch, labels=labels, guidance=guidance, denoise=0.0, batch_size=batch),
    ]
    error = float(np.abs(np.asarray(sides[0]()) - sides[1]()).max())
    for i in range(REPEATS[batch]):
        seconds = [0.0, 0.0]
        for side in (i % 2, 1 - i % 2):  # by turns the first: whoever comes second meets the other's warm caches
            started = time.perf_counter()
            sides[side]()
            seconds[side] = time.perf_counter() - started
        times.append((seconds[0], seconds[1]))
    return median(p for p, _ in times), median(c for _, c in times), median(p / c for p, c in times), error


def bare_step(python: Flow) -> float:
    """Seconds of ONNX Runtime's part of one step at batch 1: the same bound buffers, run again and again."""
    branches = Branches.plain(np.zeros(1, np.int64), python.config.tokens)
    z = python.noise(0, range(1))
    times = []
    for block in range(python.config.blocks):
        decoding = python.backend.decoding(block, z, branches)
        decoding.step(0)
        session, binding = decoding._session, decoding._binding  # type: ignore[attr-defined]
        for _ in range(200):
            started = time.perf_counter()
            session.run_with_iobinding(binding)
            times.append(time.perf_counter() - started)
    return median(times)


def main() -> None:
    python, cpp = Flow.open(DEMO, "cpu"), CppFlow(DEMO)
    steps = python.config.blocks * (python.config.tokens - 1)
    rows = [
        "| batch | guidance | Python, us a step | C++, us a step | Python / C++ | max difference |",
        "|---|---|---|---|---|---|",
    ]
    bare, first = bare_step(python), (0.0, 0.0)
    for batch in REPEATS:
        for guidance in (0.0, 1.0):
            slow, fast, ratio, error = pair(python, cpp, batch, guidance)
            first = first if any(first) else (slow / steps, fast / steps)
            per_step = f"{slow / steps * 1e6:.0f} | {fast / steps * 1e6:.0f}"
            rows.append(f"| {batch} | {guidance:g} | {per_step} | **{ratio:.2f}x** | {error:.1g} |")
            print(rows[-1], flush=True)
    python_over, cpp_over = ((first[i] - bare) * 1e6 for i in range(2))
    text = (
        "Whole decodes of the demo, noise included, denoising not, per step; medians of interleaved runs, "
        "the ratio is the median of neighbouring pairs. At batch 1 ONNX Runtime's part of a step, the same buffers run "
        f"again and again from Python, took {bare * 1e6:.0f} us; above it lie {python_over:.0f} us a step in Python "
        f"and {cpp_over:.0f} us in C++."
    )
    report = "\n\n".join([HEADING, machine(), "\n".join(rows), text])
    replace_section(RESULTS, report)
    print(text)


if __name__ == "__main__":
    main()

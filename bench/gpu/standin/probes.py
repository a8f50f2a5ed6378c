"""What ONNX Runtime's CUDA provider does with a bundle, by the stand-in's log. Each probe is a process of its own.

    python -m bench.gpu.standin [PROBE ...] [--bundle DIR]

They report, and judge nothing.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.gpu.opening import resident_flow
from bench.gpu.standin.audit import audit
from bench.gpu.standin.log import absent, allocated, bad, calls, read
from tarflow.runtime.bundle import WEIGHTS, Bundle
from tarflow.runtime.flow import Flow, Guidance

Found = dict[str, Any]


def labels(flow: Flow, n: int) -> np.ndarray[Any, Any] | None:
    return np.arange(n) % flow.config.classes if flow.config.classes else None


def draw(flow: Flow, n: int, guidance: float = 0.0, certify: bool = False) -> None:
    flow.sample(n, labels=labels(flow, n), guidance=Guidance(guidance), denoise=False, certify=certify)


def tf32(bundle: Bundle) -> Found:
    """In which precision products of float32 are: the graphs of steps, and the forward graphs that certify."""
    flow = resident_flow(bundle, "cuda")
    draw(flow, 4, guidance=1.0, certify=True)
    products = [event for event in read() if event.call == "product"]
    rounded = Counter(event.values["call"] for event in products if event.values["tf32"] == "1")
    return {"products": len(products), "in tf32": sum(rounded.values()), "by call": dict(rounded)}


def growth(bundle: Bundle) -> Found:
    """Device memory by the number of batch sizes seen, beside the weights."""
    flow, held = resident_flow(bundle, "cuda"), []
    for n in range(1, 9):
        draw(flow, n)
        held.append(allocated(read()))
    return {"weights": bundle.path(WEIGHTS).stat().st_size, "bytes after n = 1...8": held}


def alternate(bundle: Bundle) -> Found:
    """Guided and unguided batches by turns, as a service gets them: what is captured again, and what is destroyed?"""
    flow, made = resident_flow(bundle, "cuda"), []
    for turn in range(8):
        draw(flow, 16, guidance=float(turn % 2))
        made.append(calls(read(), "cudaGraphInstantiate"))
    del flow
    events = read()
    destroyed = calls(events, "cudaGraphExecDestroy")
    return {"graphs after each": made, "destroyed in all": destroyed, "bytes held after": allocated(events)}


def threads(bundle: Bundle) -> Found:
    """Three threads draw from one flow: what falls into another one's capture? Batches differ, so that all capture."""
    flow, errors = resident_flow(bundle, "cuda"), []

    def work(first: int) -> None:
        for n in range(first, first + 4):
            try:
                draw(flow, n, certify=True)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")

    all_of_them = [threading.Thread(target=work, args=(1 + 4 * k,)) for k in range(3)]
    for thread in all_of_them:
        thread.start()
    for thread in all_of_them:
        thread.join()
    events = read()
    return {"bad": dict(bad(events)), "captures": calls(events, "cudaStreamBeginCapture"), "errors": errors}


PROBES: dict[str, Callable[[Bundle], Found]] = {
    "tf32": tf32,
    "audit": audit,
    "growth": growth,
    "alternate": alternate,
    "threads": threads,
}


def probe(name: str, bundle: str) -> Found:
    """What one probe found, and what of CUDA nothing stood in for."""
    found = PROBES[name](Bundle.open(bundle))
    missing = absent(read())
    return {"probe": name, **found, **({"absent": missing} if missing else {})}

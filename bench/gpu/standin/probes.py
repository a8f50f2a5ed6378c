"""What ONNX Runtime's CUDA provider does with a bundle, by the stand-in's log. Each probe is a process of its own.

    python -m bench.gpu.standin [PROBE ...] [--bundle DIR]

They report, and judge nothing.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from bench.gpu.opening import resident_flow
from bench.gpu.standin.audit import audit
from bench.gpu.standin.log import Event, absent, allocated, bad, calls, read
from tarflow.runtime.bundle import WEIGHTS, Bundle
from tarflow.runtime.errors import InputError
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.graph import weights_of
from tarflow.runtime.ort import sessions
from tarflow.runtime.ort.backend import OrtBackend

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


def weights(bundle: Bundle) -> Found:
    """Once every graph that a device runs is open: what was copied to it, beside the weights, and is it that?"""
    flow, content, right = resident_flow(bundle, "cuda"), bundle.path(WEIGHTS).read_bytes(), True
    assert isinstance(flow.backend, OrtBackend)
    for block, entry in enumerate(bundle.manifest.blocks):
        for kind in entry.graphs.keys() - {"step"}:
            session = flow.backend.sessions.get(block, kind)
            read_by_it = weights_of(bundle.path(entry.graphs[kind])).values()
            for weight, value in zip(read_by_it, session.weights[1::2], strict=True):
                right &= value.numpy().tobytes() == content[weight.start : weight.start + weight.length]
            del session, value
    copies = (event.values for event in read() if event.call.startswith("cudaMemcpy"))
    copied = sum(int(values["bytes"]) for values in copies if values["to"] == "device")
    del flow
    return {"weights": len(content), "copied": copied, "right": right, **left(read())}


def growth(bundle: Bundle) -> Found:
    """Device memory by the number of batch sizes seen, beside the weights: of steps alone, then of all there is."""
    flow, held = resident_flow(bundle, "cuda"), []
    for everything in (False, True):
        for n in range(1, 9):
            flow.sample(n, labels=labels(flow, n), denoise=everything, certify=everything)
            held.append(allocated(read()))
    sizes = {"bytes after n = 1...8": held[:8], "certified and denoised": held[8:]}
    return {"weights": bundle.path(WEIGHTS).stat().st_size, **sizes}


def alternate(bundle: Bundle) -> Found:
    """Guided and unguided batches by turns, as a service gets them: what is captured again, and what is destroyed?"""
    flow, made = resident_flow(bundle, "cuda"), []
    for turn in range(8):
        draw(flow, 16, guidance=float(turn % 2))
        made.append(calls(read(), "cudaGraphInstantiate"))
    del flow
    return {"graphs after each": made, **left(read())}


def crowd(bundle: Bundle) -> Found:
    """More shapes than captures are kept for."""
    sessions.MOST_CAPTURES = 6  # three shapes' of a block
    flow, held = resident_flow(bundle, "cuda"), []
    for n in (1, 2, 3, 4, 1, 2, 6, 8, 1):
        draw(flow, n)
        events = read()
        held.append(calls(events, "cudaGraphInstantiate") - calls(events, "cudaGraphExecDestroy"))
    del flow
    return {"blocks": bundle.manifest.config.blocks, "graphs held after each": held, **left(read())}


def together(work: list[Callable[[], None]]) -> None:
    """All of it at once, a thread each."""
    threads = [threading.Thread(target=part) for part in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def devices(events: list[Event]) -> list[str]:
    """Where memory was allocated, but for the byte with which ONNX Runtime begins, on the first one."""
    made = (event.values for event in events if event.call == "allocated")
    return sorted({values["device"] for values in made if values["bytes"] != "1"})


def left(events: list[Event]) -> Found:
    """What is left once a flow has been let go of."""
    graphs = calls(events, "cudaGraphInstantiate") - calls(events, "cudaGraphExecDestroy")
    streams = calls(events, "cudaStreamCreate") - calls(events, "cudaStreamDestroy")
    return {"graphs left": graphs, "streams left": streams, "bytes left": allocated(events), "bad": dict(bad(events))}


def threads(bundle: Bundle) -> Found:
    """Three threads draw from one flow, and from others that they open: what falls into another one's capture?"""
    shared, errors = [resident_flow(bundle, "cuda")], []

    def work(first: int) -> None:
        for n in range(first, first + 4):  # batches differ, so that all capture
            try:
                draw(shared[0], n, certify=True)
                draw(resident_flow(bundle, "cuda"), 1)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")

    together([partial(work, 1 + 4 * k) for k in range(3)])
    captures = calls(read(), "cudaStreamBeginCapture")
    shared.clear()
    return {"captures": captures, "errors": errors, **left(read())}


def cpp(bundle: Bundle, provider: str = "cuda:1") -> Found:
    """The same of libtarflow: guidance by turns, batch sizes, and handles of one bundle in three threads."""
    from tests.cpp_library import CppFlow

    library = str(next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")))
    where, errors = {"provider": provider.encode(), "onnxruntime": library.encode()}, []

    def draw(flow: CppFlow, n: int, guidance: float = 0.0, certify: int = 0) -> None:
        classes = np.arange(n) % max(bundle.manifest.config.classes, 1)
        flow.sample(n, labels=classes, guidance=guidance, certify=certify, denoise=0.0)

    def work(first: int) -> None:
        try:
            own = CppFlow(bundle.folder, **where)
            for n in range(first, first + 4):
                draw(own, n, certify=1)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    flow, made, held = CppFlow(bundle.folder, **where), [], []
    for n in range(1, 9):
        draw(flow, n)
        held.append(allocated(read()))
    for turn in range(8):
        draw(flow, 16, guidance=float(turn % 2))
        made.append(calls(read(), "cudaGraphInstantiate"))
    together([partial(work, 1 + 4 * k) for k in range(3)])
    events = read()
    used = devices(events)
    backend = flow.shape.backend.decode()
    del flow
    sizes = {"weights": bundle.path(WEIGHTS).stat().st_size, "bytes after n = 1...8": held}
    return {"backend": backend, "devices": used, "graphs after each": made, "errors": errors, **sizes, **left(read())}


def device(bundle: Bundle, provider: str = "cuda:1") -> Found:
    """On which device everything is, and what is said of one that is not there."""
    flow = resident_flow(bundle, provider)
    draw(flow, 2, certify=True)
    used = devices(read())
    refused = ""
    try:
        resident_flow(bundle, "cuda:2")
    except InputError as error:
        refused = str(error)
    return {"machine": flow.backend.machine, "devices": used, "refused": refused}


PROBES: dict[str, Callable[..., Found]] = {
    "tf32": tf32,
    "audit": audit,
    "weights": weights,
    "growth": growth,
    "alternate": alternate,
    "crowd": crowd,
    "threads": threads,
    "device": device,
    "cpp": cpp,
}


def probe(name: str, bundle: str, *more: str) -> Found:
    """What one probe found, and what of CUDA nothing stood in for."""
    found = PROBES[name](Bundle.open(bundle), *more)
    missing = absent(read())
    return {"probe": name, **found, **({"absent": missing} if missing else {})}

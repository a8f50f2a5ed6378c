"""How long a step takes, and how the C++ runtime compares."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import numpy as np

from bench.gpu.checks.check import Case, Outcome, distance, draw
from tarflow.runtime.backend import Branches
from tarflow.runtime.flow import Flow

BATCHES, BRANCHES, TURNS = (1, 8, 32), (1, 2), 4
WARM = 3  # steps of every turn that are not timed: the first two of a shape are captured


def steps(case: Case) -> Outcome:
    """Microseconds a serial step, replayed and launched anew, by batch and branches."""
    found = {}
    for cuda_graph in (True, False):
        flow = case.open(cuda_graph)
        for batch in BATCHES:
            for count in BRANCHES:
                seconds = min(one_step(flow, batch, count) for _ in range(TURNS))
                word = "replayed" if cuda_graph else "launched"
                found[f"{word}, batch {batch}, branches {count}"] = round(seconds * 1e6, 1)
    return Outcome(True, "none", {"microseconds": found})


def one_step(flow: Flow, batch: int, count: int) -> float:
    """Seconds, averaged over one block."""
    tokens = flow.config.tokens
    mix = np.full((2, count, tokens), 1 / count, np.float32)
    branches = Branches(np.zeros((count, batch), np.int64), mix, np.ones(count, np.float32))
    decoding = flow.backend.decoding(0, flow.noise(0, range(batch)), branches)
    for position in range(WARM):
        decoding.step(position)
    began = time.perf_counter()
    for position in range(WARM, tokens - 1):
        decoding.step(position)
    decoding.patches()  # ends when all steps have
    seconds = (time.perf_counter() - began) / (tokens - 1 - WARM)
    decoding.close()
    return seconds


def cpp(case: Case) -> Outcome:
    """libtarflow beside Python: numbers, certificate, seconds."""
    from tests.cpp_library import CppFlow

    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    (library,) = (Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*")
    theirs = CppFlow(case.bundle.folder, provider=case.provider.encode(), onnxruntime=str(library).encode())
    ours = case.open()
    classes = [k % max(ours.config.classes, 1) for k in range(6)]
    images = theirs.sample(6, labels=classes, seed=3, guidance=1.0, certify=1, denoise=0.0)
    apart, certificate = distance(images, draw(ours, 6, 1.0)), float(theirs.certificate(6).max())
    began = time.perf_counter()
    theirs.sample(6, labels=classes, seed=3, guidance=1.0, denoise=0.0)
    between = time.perf_counter()
    draw(ours, 6, 1.0)
    seconds = {"C++": between - began, "Python": time.perf_counter() - between}
    ok = apart["max"] <= 1e-4 if case.precision == "fp32" else apart["rms"] <= 2e-3
    found = {"apart": apart, "certificate": certificate, "seconds": seconds}
    return Outcome(ok, "fp32: 1e-4 apart; fp16: rms 2e-3", found)

"""Right numbers, and the same bits wherever the runtime promises them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from bench.gpu.checks.check import Case, Outcome, distance, draw, labels
from bench.gpu.opening import captures
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.inputs import AS_THEY_ARE

ON_CPU = {"serial": 1e-4, "exact": 1e-4, "fast": 2e-3}  # fp32, largest difference; two fast solutions, 1e-3 each
HALF = {0.0: 1e-3, 1.0: 2e-3}  # fp16, rms by guidance
GUIDANCE = (0.0, 1.0)
TILE = 16


def parity(case: Case) -> Outcome:
    """Samples in every mode, encodings and denoising beside the same bundle on a CPU's kernels."""
    device, host = case.open(), Flow.open(case.bundle, "cpu")
    found: dict[str, Any] = {}
    ok = True
    for decode, bar in ON_CPU.items():
        for guidance in GUIDANCE:
            apart = distance(draw(device, 6, guidance, decode), draw(host, 6, guidance, decode))
            found[f"{decode}, guidance {guidance:g}"] = apart
            ok &= apart["max"] <= bar if case.precision == "fp32" else apart["rms"] <= HALF[guidance]
    images = np.asarray(host.sample(20, labels=labels(host, 20), seed=3, denoise=False))
    classes = labels(host, len(images))
    encoded = (flow.encode(images, classes, AS_THEY_ARE) for flow in (device, host))
    for name, one, other in zip(("z", "log_det"), *encoded, strict=True):
        found[name] = distance(one, other)
    if host.config.noise_std:
        found["denoised"] = distance(*(flow.denoise(images, classes, range=AS_THEY_ARE) for flow in (device, host)))
    return Outcome(bool(ok), f"samples: fp32 max {ON_CPU}; fp16 rms {HALF} by guidance", found)


def graphs(case: Case) -> Outcome:
    """Replaying a captured graph and launching every kernel anew are the same bits."""
    recorded, plain = case.open(), case.open(cuda_graph=False)
    found: dict[str, Any] = {
        f"{decode}, guidance {guidance:g}, n {n}": bool(
            np.array_equal(draw(recorded, n, guidance, decode), draw(plain, n, guidance, decode))
        )
        for decode in ("serial", "fast")
        for guidance in GUIDANCE
        for n in (1, 5)
    }
    captured = captures(recorded) or case.provider == "cpu"
    return Outcome(all(found.values()) and captured, "the same bits, captured", {"captured": captured, **found})


def repeat(case: Case) -> Outcome:
    """The same request is the same bits, in one flow and from one to another."""
    one, other = case.open(), case.open()
    first, *again = [draw(flow, TILE, 1.0, reproducible=True) for flow in (one, one, other, one)]
    same = [bool(np.array_equal(first, images)) for images in again]
    digest = hashlib.sha256(np.asarray(first).tobytes()).hexdigest()[:16]
    return Outcome(all(same), "the same bits", {"same": same, "digest": digest})


def tile(case: Case) -> Outcome:
    """What shards and servers rest on: a row's bits depend neither on its place in a tile nor on its neighbours."""
    flow, order = case.open(), np.roll(np.arange(TILE), 5)
    noise, classes = flow.noise(3, range(TILE)), np.arange(TILE) % max(flow.config.classes, 1)
    found = {}
    for scale in GUIDANCE:
        here, there = (
            flow.sample(
                noise=noise[rows], labels=classes[rows], guidance=Guidance(scale), reproducible=True, denoise=False
            )
            for rows in (np.arange(TILE), order)
        )
        found[f"guidance {scale:g}"] = bool(np.array_equal(np.asarray(here)[order], there))
    whole = np.asarray(flow.sample(40, labels=0, seed=9, reproducible=True, denoise=False))
    found["of 40 or of 7"] = bool(
        np.array_equal(whole[:7], flow.sample(7, labels=0, seed=9, reproducible=True, denoise=False))
    )
    return Outcome(all(found.values()), "the same bits", found)

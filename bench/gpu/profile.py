"""What a serial step on ONNX Runtime's CUDA provider is made of, kernel by kernel, by PyTorch's profiler:

    python -m bench.gpu.profile BUNDLE [--batch 1 32] [--results FILE]

Captured and not; a line of JSON for each, written at once.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.opening import resident_flow
from tarflow.runtime.backend import Branches
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.flow import Flow

WARM, STEPS, TOP = 8, 16, 14
NAME = 90  # characters of a kernel's name, which is mostly its template's arguments


def of_steps(flow: Flow, batch: int) -> dict[str, Any]:
    """Kernels a step, what they take of it, and the largest of them."""
    decoding = flow.backend.decoding(
        0, flow.noise(0, range(batch)), Branches.plain(np.zeros(batch, np.int64), flow.config.tokens)
    )
    positions = range(WARM, min(WARM + STEPS, flow.config.tokens - 1))
    for position in range(WARM):
        decoding.step(position)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for position in positions:
            decoding.step(position)
    decoding.close()
    seconds: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in profiled.events() or ():
        if event.device_type.name == "CUDA":
            seconds[event.name[:NAME]] += event.device_time / len(positions)
            launches[event.name[:NAME]] += 1
    return {
        "kernels a step": sum(launches.values()) / len(positions),
        "microseconds in kernels a step": round(sum(seconds.values()), 1),
        "largest": [(name, round(time, 1), launches[name] / len(positions)) for name, time in seconds.most_common(TOP)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.profile", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], metavar="N")
    parser.add_argument("--results", type=Path, metavar="FILE", help="lines are added to it")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no CUDA GPU here; there is nothing to profile")
    torch.zeros(1, device="cuda")  # CUDA is up before anything is profiled
    bundle = Bundle.open(asked.bundle)
    for captured in (False, True):
        flow = resident_flow(bundle, "cuda", captured)
        for batch in asked.batch:
            line = json.dumps({"captured": captured, "batch": batch, **of_steps(flow, batch)})
            print(line, flush=True)
            if asked.results:
                with asked.results.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()

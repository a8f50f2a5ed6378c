"""How far a serial step is from what no step could beat: what it must read over the bandwidth, its products alone.

    python -m bench.floor

Writes its section of bench/RESULTS.md. The bare products are one block's matrix products for the rows of a batch, on
the block's own weights, in PyTorch: no attention, no norms, nothing between them. Also how threads and spinning matter.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn import functional as F

from bench.compare import DEMO, PHOTOS, trained_photos
from bench.results import RESULTS, machine, replace_section
from tarflow.checkpoint import load
from tarflow.export.pipeline import export
from tarflow.model import TarFlow
from tarflow.runtime.backend import Branches
from tarflow.runtime.flow import Flow
from tarflow.runtime.measure import read_bandwidth, step_floor
from tarflow.runtime.memory import cache_row

BATCHES = (1, 8, 32, 64)
HEADING = "## How far a serial step is from its floor"


@torch.inference_mode()
def bare_products(model: TarFlow, batch: int) -> Callable[[], None]:
    """One block's products for ``batch`` rows."""
    block = model.blocks[0]
    linears = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {linear: torch.randn(batch, linear.in_features) for linear in linears}

    @torch.inference_mode()
    def run() -> None:
        for linear in linears:
            F.linear(inputs[linear], linear.weight, linear.bias)

    return run


def serial(flow: Flow, batch: int) -> Callable[[], None]:
    """A block, decoded serially."""
    branches = Branches.plain(np.arange(batch) % max(flow.config.classes, 1), flow.config.tokens)
    z = flow.noise(0, range(batch))

    def run() -> None:
        decoding = flow.backend.decoding(0, z, branches)
        for position in range(flow.config.tokens - 1):
            decoding.step(position)
        decoding.close()

    return run


def timed(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def floors(name: str, model: TarFlow, bundle: Path) -> list[str]:
    flow, steps = Flow.open(bundle, "cpu"), model.config.tokens - 1
    lines = []
    for batch in BATCHES:
        bare, decode = bare_products(model, batch), serial(flow, batch)
        timed(bare), timed(decode)
        pairs = []
        for _ in range(5 if batch < 32 else 3):
            own = timed(decode) / steps
            pairs.append((own, min(timed(bare) for _ in range(20))))
        step, products = (median(times) for times in zip(*pairs, strict=True))
        bandwidth = read_bandwidth(torch.get_num_threads())
        weights = step_floor(flow.bundle, bandwidth)
        cache = batch * cache_row(flow.config, "fp32") / 2 / bandwidth  # half full, averaged over the sequence
        floor = max(weights, products) + cache
        lines.append(
            f"| {name} | {batch} | {step * 1e3:.2f} | {weights * 1e3:.2f} | {products * 1e3:.2f} | {cache * 1e3:.2f} "
            f"| {step / weights:.2f}x | {median(a / b for a, b in pairs):.2f}x | **{step / floor:.2f}x** |"
        )
        print(lines[-1], flush=True)
    return lines


def settings(bundle: Path) -> list[str]:
    """Serial decoding of a block by threads and spinning, interleaved."""
    lines = []
    ways = list(itertools.product(range(1, (os.cpu_count() or 1) + 1), (True, False)))
    for batch in (1, 8, 32):
        runs = [
            serial(Flow.open(bundle, "cpu", threads=threads, spinning=spinning), batch) for threads, spinning in ways
        ]
        times: list[list[float]] = [[] for _ in ways]
        for turn in range(4):
            for run, own in zip(runs, times, strict=True):
                seconds = timed(run)
                if turn:
                    own.append(seconds)
        lines.append(f"| {batch} | " + " | ".join(f"{median(own):.3f}" for own in times) + " |")
        print(lines[-1], flush=True)
    head = " | ".join(f"{n} thread{'s' * (n > 1)}, {'spinning' if s else 'sleeping'}" for n, s in ways)
    return [f"| batch | {head} |", "|---" * (len(ways) + 1) + "|", *lines]


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    trained_photos(PHOTOS)
    with tempfile.TemporaryDirectory() as work:
        photos = Path(work) / "photos"
        export(PHOTOS, photos, check=False)
        rows = floors("demo", load(DEMO), DEMO) + floors("width 384, 4 layers, T 256", load(PHOTOS), photos)
        chosen = settings(photos)
    head = [
        "| model | batch | step, ms | weights, ms | products, ms | cache, ms | to weights | to products | to all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    text = (
        "A step of serial decoding, averaged over a block's positions; the weights it must read, over the memory's "
        "bandwidth; the same products alone in PyTorch; and the keys and values it must read, half a cache on average, "
        "over the bandwidth. All: the cache, and the larger of weights and products. The processor's caches can beat "
        "what memory allows for small models. Below, seconds for one block of the second model by threads and "
        "spinning: the defaults are ONNX Runtime's, one thread a core, spinning."
    )
    replace_section(RESULTS, "\n\n".join([HEADING, machine(), "\n".join(head + rows), text, "\n".join(chosen)]))


if __name__ == "__main__":
    main()

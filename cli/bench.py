"""``tarflow bench``: how fast does this bundle sample here?"""

from __future__ import annotations

import os
import time
from typing import Annotated

import typer

from .console import default_bundle, emit, parse_sizes, say
from .options import BundleArgument, Json, Provider, Spinning, Threads


def bench(
    bundle: BundleArgument = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,8,32",
    guidance: Annotated[float, typer.Option(help="Guidance scale of the guided rows; 0 leaves them out.")] = 1.0,
    repeats: Annotated[int, typer.Option(help="Runs of each row; the median counts.")] = 5,
    provider: Provider = "cpu",
    threads: Threads = None,
    spinning: Spinning = None,
    json: Json = False,
) -> None:
    """Time sampling (decoding alone, no denoising) at several batch sizes, and the distance to the memory floor.

    The floor: every sequential step must read one block's weights once. Comparisons with PyTorch: make bench.

    Example: tarflow bench tarflow-bundle --batch 1,8,32
    """
    from statistics import median

    from ..runtime.bench import read_bandwidth, step_floor
    from ..runtime.errors import InputError
    from ..runtime.flow import Flow, Guidance

    sizes = parse_sizes(batch)
    if repeats < 1:
        raise InputError(f"--repeats is {repeats}; expected 1 or more")
    flow = Flow.open(default_bundle(bundle), provider, threads, spinning)
    labels = 0 if flow.config.classes else None
    guided = Guidance(guidance, attention_temperature=1.0 if flow.config.classes else 0.5)
    rows = [(size, g) for size in sizes for g in ([Guidance(), guided] if guidance else [Guidance()])]
    times: dict[int, list[float]] = {i: [] for i in range(len(rows))}
    for round_ in range(repeats + 1):  # rows interleaved, so that a slow spell of the machine hits all of them
        for i, (size, g) in enumerate(rows):
            started = time.perf_counter()
            flow.sample(size, labels=labels, guidance=g, denoise=False, batch_size=size)
            if round_:  # the first round warms up
                times[i].append(time.perf_counter() - started)
    bandwidth = read_bandwidth(threads or os.cpu_count() or 1)
    steps = flow.config.blocks * (flow.config.tokens - 1)
    floor = step_floor(flow.bundle, bandwidth)
    results = [
        {
            "batch": size,
            "guidance": g.scale,
            "seconds": median(times[i]),
            "microseconds_per_step": median(times[i]) / max(steps, 1) * 1e6,
            "samples_per_second": size / median(times[i]),
        }
        for i, (size, g) in enumerate(rows)
    ]
    if json:
        emit(
            {
                "bundle": str(flow.bundle.folder),
                "backend": flow.backend.description,
                "rows": results,
                "read_bandwidth": bandwidth,
                "floor_microseconds_per_step": floor * 1e6,
            }
        )
        return
    say(f"{flow.backend.description}; {steps} sequential steps a batch")
    print(f"{'batch':>6} {'guidance':>9} {'seconds':>9} {'us/step':>9} {'samples/s':>10}")
    for row in results:
        print(
            f"{row['batch']:>6} {row['guidance']:>9g} {row['seconds']:>9.3f} {row['microseconds_per_step']:>9.0f} "
            f"{row['samples_per_second']:>10.1f}"
        )
    print(f"floor at batch 1: {floor * 1e6:.0f} us/step (one block's weights at {bandwidth / 1e9:.1f} GB/s)")

"""A step of serial decoding by the native engine and by ONNX Runtime, by turns in one run, with the error of each.

    python -m bench.native [--quick]

Writes its section of bench/RESULTS.md.

One block with random weights, its whole sequence or 128 steps of it; a step's time is the run's over its steps, the
ratio the median of the ratios within a turn. Errors are those of the block's patches against float64. ONNX Runtime's
best is the faster of one engine with all threads and of lanes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench.compare import DEMO
from bench.results import RESULTS, machine, replace_section
from bench.weights import random_model
from tarflow.checkpoint import load, save
from tarflow.config import Config
from tarflow.export.pipeline import export
from tarflow.model import TarFlow
from tarflow.runtime.backend import Array, Branches
from tarflow.runtime.decode import serial
from tarflow.runtime.flow import Flow
from tarflow.runtime.measure import read_bandwidth
from tarflow.runtime.native.library import isa

HEADING = "## A native step beside ONNX Runtime's"
WIDE = Config(64, 3, 4, 384, 1, 4, 10, noise_std=0.1)
LARGE = Config(256, 3, 8, 768, 1, 8, 10, noise_std=0.1)
PRECISIONS = ("fp32", "int16", "int8")
BYTES = {"fp32": 4, "int16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    model: TarFlow
    bundle: Path
    steps: int
    batches: tuple[int, ...]
    rounds: int


def decode(flow: Flow, z: Array, steps: int) -> Callable[[], Array]:
    """The first block, its first ``steps`` positions: patches (B, T, D) in block order."""
    branches = Branches.plain(np.arange(len(z)) % max(flow.config.classes, 1), flow.config.tokens)

    def run() -> Array:
        decoding = flow.backend.decoding(0, z, branches)
        found = serial(decoding, steps + 1)
        decoding.close()
        return found

    return run


def in_lanes(flow: Flow, z: Array) -> Callable[[], Array]:
    branches = Branches.plain(np.arange(len(z)) % max(flow.config.classes, 1), flow.config.tokens)
    lanes = flow.lanes
    assert lanes is not None
    return lambda: lanes.solve(0, z, branches)


def rms(found: Array, case: Case, z: Array) -> float:
    """Against the same block in float64, where it was decoded to its end."""
    labels = torch.arange(len(z)) % max(case.model.config.classes, 1)
    block, tokens = case.model.blocks[0].double(), case.model.config.tokens
    with torch.no_grad():
        exact = block.decode(torch.from_numpy(z).double(), [labels], torch.ones(2, 1, tokens).double(), [1.0])
    block.float()
    return float(np.sqrt(np.square(found - exact.numpy()).mean()))


def rows_of(case: Case) -> list[str]:
    config, lines = case.model.config, []
    graphs = Flow.open(case.bundle, provider="cpu")
    flows = {precision: Flow.open(case.bundle, provider="native", precision=precision) for precision in PRECISIONS}
    block = sum(weights.numel() for layer in case.model.blocks[0].layers for weights in layer.parameters())
    for batch in case.batches:
        z = graphs.noise(0, range(batch))
        ways = {"ONNX Runtime": decode(graphs, z, case.steps)}
        if case.steps == config.tokens - 1 and graphs.lanes is not None and batch > 1:
            ways["in lanes"] = in_lanes(graphs, z)
        ways |= {precision: decode(flow, z, case.steps) for precision, flow in flows.items()}
        found = {name: run() for name, run in ways.items()}  # and warm
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(case.rounds):
            for name, run in ways.items():
                started = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - started) / case.steps)
        best = [min(pair) for pair in zip(*(times[name] for name in ways if name not in PRECISIONS), strict=True)]
        bandwidth = read_bandwidth(os.cpu_count() or 1)
        for name in ways:
            ratio = median(b / own for b, own in zip(best, times[name], strict=True))
            whole = case.steps == config.tokens - 1 and batch <= 8
            error = f"{rms(found[name], case, z):.1e}" if whole else ""
            floor = f"{BYTES.get(name, 4) * block / bandwidth * 1e3:.3f}" if batch == 1 else ""
            step = f"{median(times[name]) * 1e3:.3f}"
            lines.append(f"| {case.name} | {batch} | {name} | {step} | {floor} | {ratio:.2f}x | {error} |")
            print(lines[-1], flush=True)
    return lines


def exported(config: Config, folder: Path) -> tuple[TarFlow, Path]:
    model = random_model(config)
    checkpoint = folder / config.file_name("random", ".safetensors")
    save(model, checkpoint)
    export(checkpoint, folder / "bundle", check=False)
    return model, folder / "bundle"


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.native")
    parser.add_argument("--quick", action="store_true", help="the demo alone, and nothing written")
    quick = parser.parse_args().quick
    lines = rows_of(Case("demo", load(DEMO), DEMO, 15, (1, 8, 32), 41))
    if quick:
        return
    with tempfile.TemporaryDirectory() as wide, tempfile.TemporaryDirectory() as large:
        lines += rows_of(Case("384, 4 layers, T 256", *exported(WIDE, Path(wide)), 255, (1, 8, 32), 7))
        lines += rows_of(Case("768, 8 layers, T 1024", *exported(LARGE, Path(large)), 128, (1, 8), 5))
    head = "| model | batch | way | step, ms | weights, ms | to ONNX Runtime's best | rms |\n|" + "---|" * 7
    about = (__doc__ or "").split("\n\n")[-1].replace("\n", " ").strip()
    about += " Weights: the layers' in that precision, over the memory's bandwidth, which the processor's caches beat."
    told = f"Instruction set {isa()}; {machine()}"
    replace_section(RESULTS, "\n\n".join([HEADING, told, about, "\n".join([head, *lines])]))


if __name__ == "__main__":
    main()

"""Every way to draw the same samples, by turns in one run: PyTorch as published and compiled, and this runtime
serially, in parallel, in fewer bits, on ONNX Runtime and from C++; medians, each with its error and certificate.

    python -m bench.compare [demo] [photos] [wide] [large] [--quick]

Writes its sections of bench/RESULTS.md. ``photos`` is trained by recipes/photos.sh, which takes a while; the weights of
``wide``, which has its shape, and ``large`` are random, so that nothing is said of parallel decoding there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench.results import RESULTS, machine, replace_section
from bench.weights import random_model
from tarflow.checkpoint import load, save
from tarflow.config import Config
from tarflow.export.pipeline import export
from tarflow.model import TarFlow
from tarflow.rivals import Compiled, published
from tarflow.runtime.backend import Array
from tarflow.runtime.calibrate import calibrate
from tarflow.runtime.decode import TOLERANCES
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.measure import Contender, Draw, Result, of_flow, race, read_bandwidth
from tarflow.runtime.plan import Plan, Row
from tests.cpp_library import CppFlow

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "tarflow" / "demo"
PHOTOS = ROOT / "runs" / "photos" / "photos_model_2_384_4_4_0.10.safetensors"
PUBLISHED, COMPILED, SERIAL = "PyTorch, published", "PyTorch, compiled", "serial"
SAMPLES = 8  # that calibration looks at, or one batch
SLOW = 15.0  # seconds: who takes longer for a batch is measured once, and not at all in the rows that follow
AGREEMENT = 1e-3  # of serial samples with the published method's, or the times mean nothing


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and the rows to measure: (batch, guidance, rounds)."""

    name: str
    text: str
    checkpoint: Callable[[Path], Path]
    rows: Sequence[tuple[int, float, int]]
    trained: bool = True
    batches: Sequence[int] = field(default=())  # that are calibrated


def cases(quick: bool) -> dict[str, Case]:
    """The models. ``quick`` leaves the smallest batch of each."""
    rounds = {"demo": {1: 21, 8: 15, 32: 9, 64: 9}, "photos": {1: 5, 8: 3, 32: 3}, "wide": {1: 5, 8: 3, 32: 1}}
    rows = {
        name: [(batch, g, n) for batch, n in sizes.items() for g in (0.0, 1.0) if not quick or batch == 1]
        for name, sizes in rounds.items()
    }
    return {
        "demo": Case(
            "demo",
            "The demo: width 128, 3 layers, T 16, 4 blocks",
            lambda _: DEMO,
            rows["demo"],
            batches=(1, 8, 32, 64),
        ),
        "photos": Case(
            "photos",
            "Trained on photographs: width 384, 4 layers, T 256, 4 blocks",
            trained_photos,
            rows["photos"],
            batches=(1, 8, 32),
        ),
        "wide": Case(
            "wide",
            "Random weights: width 384, 4 layers, T 256, 4 blocks",
            partial(random_weights, Config(32, 3, 2, 384, blocks=4, layers=4, classes=2, noise_std=0.1)),
            rows["wide"],
            trained=False,
        ),
        "large": Case(
            "large",
            "One block of `2-768-8-8`, random weights: width 768, 8 layers, T 1024",
            partial(random_weights, Config(64, 3, 2, 768, blocks=1, layers=8, classes=10, noise_std=0.05)),
            [(1, 0.0, 3), (1, 1.0, 3), (8, 0.0, 3)][: 1 if quick else 3],
            trained=False,
        ),
    }


def trained_photos(_: Path) -> Path:
    """The checkpoint of recipes/photos.sh, trained now if it is not there."""
    if not PHOTOS.exists():
        subprocess.run([ROOT / "recipes" / "photos.sh", PHOTOS.parent], check=True, cwd=ROOT)
    return PHOTOS


def random_weights(config: Config, folder: Path) -> Path:
    save(random_model(config), folder / "random.safetensors")
    return folder / "random.safetensors"


def torch_draw(model: TarFlow, decode: Callable[..., torch.Tensor]) -> Draw:
    """A rival's decoding as a contender draws: numpy in, images out."""

    def draw(noise: Array, labels: NDArray[np.int64], guidance: Guidance) -> Array:
        found = decode(torch.from_numpy(noise), torch.from_numpy(labels), guidance.scale)
        images: Array = model.unpatchify(found).numpy()
        return images

    return draw


def cpp_draw(folder: Path) -> Draw:
    """libtarflow, serially."""
    flow = CppFlow(folder, provider=b"native")

    def draw(noise: Array, labels: NDArray[np.int64], guidance: Guidance) -> Array:
        return flow.sample(noise=noise, labels=labels, guidance=guidance.scale, denoise=0.0, batch_size=len(noise))

    return draw


def whole_sequence(bundle: Path) -> Flow:
    """A flow that decodes all positions at once: the fewest dependent passes, whatever they cost here."""
    flow = Flow.open(bundle, provider="native")
    blocks, window = flow.config.blocks, flow.config.tokens - 1
    ones = (1.0,) * blocks
    row = Row(1 << 20, (window,) * blocks, (window,) * blocks, ones, ones, ones)
    flow.plan = Plan(flow.bundle.hash, flow.backend.machine, 1, dict.fromkeys(TOLERANCES, (row,)))
    return flow


def contenders(case: Case, model: TarFlow, fp32: Path, int8: Path) -> list[Contender]:
    """The published method first: all are compared with it."""
    flow = Flow.open(fp32, provider="native")
    compiled = Compiled(model)
    found = [
        Contender(PUBLISHED, torch_draw(model, lambda *inputs: published(model, *inputs))),
        Contender(COMPILED, torch_draw(model, lambda *inputs: compiled(*inputs))),
        of_flow(Flow.open(fp32, provider="cpu"), "ONNX Runtime", "serial"),
        of_flow(Flow.open(int8, provider="cpu"), "ONNX Runtime, int8", "serial"),
        of_flow(flow, SERIAL, "serial"),
        Contender("serial, C++", cpp_draw(fp32)),
        of_flow(Flow.open(fp32, provider="native", precision="int16"), "int16", "serial"),
        of_flow(Flow.open(fp32, provider="native", precision="int8"), "int8", "serial"),
    ]
    if case.trained:
        found += [
            of_flow(flow, "exact", "exact"),
            of_flow(flow, "fast", "fast"),
            of_flow(whole_sequence(fp32), "fast, whole sequence", "fast"),
        ]
    return found


def measure(case: Case, work: Path) -> Iterator[list[Result]]:
    """Export, calibrate, and let all contenders race, row by row."""
    checkpoint = case.checkpoint(work)
    model = load(checkpoint).eval()
    bundles = [work / f"{case.name}-{engine}" for engine in ("fp32", "int8")]
    for folder, engine in zip(bundles, ("fp32", "int8"), strict=True):
        export(checkpoint, folder, engine, check=case.trained)
    if case.batches:  # int8 rounds by more than fast mode's tolerance in every pass: it is decoded serially
        flow = Flow.open(bundles[0], provider="native")
        calibrate(flow, case.batches, SAMPLES, lambda done, total, stage: print(f"  {stage}", flush=True)).write(
            flow.bundle
        )
    field_, judge = contenders(case, model, *bundles), Flow.open(bundles[0])
    for batch, scale, rounds in case.rows:
        results = race(field_, judge, batch, Guidance(scale), rounds, patience=SLOW)
        serial = named(results, SERIAL)
        if not serial.error < AGREEMENT:
            raise SystemExit(f"{case.name}, batch {batch}: samples differ by {serial.error:.2g}; times mean nothing")
        slow = {r.name for r in results if r.seconds > SLOW} - {PUBLISHED, SERIAL}
        field_ = [contender for contender in field_ if contender.name not in slow]
        yield results


def named(results: Sequence[Result], name: str) -> Result:
    return next(result for result in results if result.name == name)


def table(rows: Sequence[Sequence[Result]]) -> str:
    lines = [
        "| way | batch | guidance | seconds | published / it | serial / it | passes | max error | rms | certificate |",
        "|---" * 10 + "|",
    ]
    for results in rows:
        first, serial = named(results, PUBLISHED), named(results, SERIAL)
        lines += [
            f"| {r.name} | {r.batch} | {r.guidance:g} | {r.seconds:.3f} | **{r.faster_than(first):.2f}x** "
            f"| {r.faster_than(serial):.2f}x | {', '.join(map(str, r.passes))} | {r.error:.1g} | {r.rms:.1g} "
            f"| {r.certificate:.1g} |"
            for r in results
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["demo", "photos", "large"])
    parser.add_argument("--quick", action="store_true", help="batch 1 alone, and write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    known = cases(arguments.quick)
    for name in arguments.cases:
        case, rows = known[name], []
        with tempfile.TemporaryDirectory() as work:
            for results in measure(case, Path(work)):
                rows.append(results)
                print(table([results]).split("\n", 2)[2], flush=True)
        words = (
            "Seconds to decode one batch, denoising not included; rounds interleaved, times are medians, ratios "
            "medians over rounds, passes by block. Published: eager PyTorch, cache by concatenation, a second pass for "
            "guidance. Compiled: torch.compile, cache of full length. ONNX Runtime: `--provider cpu`; all others are "
            "native, in float32 unless said, `serial` being what `auto` takes. Errors are from the published "
            "method's samples; the certificate is the round trip through the float32 graphs. Ways that took more than "
            "15 s for a batch are left out of the rows that follow. Memory was read at "
            f"{read_bandwidth(torch.get_num_threads()) / 1e9:.1f} GB/s."
        )
        if not arguments.quick:
            replace_section(RESULTS, "\n\n".join([f"## {case.text}", machine(), table(rows), words]))


if __name__ == "__main__":
    main()

"""Sampling against the published method, same threads, one run, interleaved, medians: ``make bench``.

Writes bench/RESULTS.md. Random weights: serial decoding does the same work whatever the weights are.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch

from tarflow.checkpoint import save
from tarflow.config import Config
from tarflow.export.pipeline import export
from tarflow.model import TarFlow
from tarflow.rivals import published
from tarflow.runtime.bench import read_bandwidth, step_floor
from tarflow.runtime.flow import Flow, Guidance

RESULTS = Path(__file__).parent / "RESULTS.md"
HEADING = "## Serial sampling against the published method"
CLASSES = 10
AGREEMENT = 1e-3  # both sides must have computed the same samples, or the times mean nothing


@dataclass(frozen=True, slots=True)
class Case:
    """A model (two blocks, one of each direction), a batch, a guidance, and the ratio to reach."""

    name: str
    config: Config
    batch: int
    guidance: float
    bar: float
    repeats: int


@dataclass(frozen=True, slots=True)
class Result:
    case: Case
    published: float  # seconds, median
    ours: float
    ratio: float  # median of the ratios of neighbouring runs
    error: float
    floor: float  # seconds for all steps


def cases(quick: bool) -> list[Case]:
    tiny = Config(image_size=16, channels=3, patch_size=2, width=64, blocks=2, layers=2, classes=CLASSES, noise_std=0.1)
    middle = Config(
        image_size=32, channels=3, patch_size=2, width=384, blocks=2, layers=4, classes=CLASSES, noise_std=0.1
    )
    found = [Case("width 64, 2 layers, T 64", tiny, 64, g, 2.3, 9) for g in (0.0, 1.0)]
    for batch, repeats in ((1, 7), (8, 3), (32, 2)):
        found += [Case("width 384, 4 layers, T 256", middle, batch, g, 4.0, repeats) for g in (0.0, 1.0)]
    return found[:2] if quick else found


def random_model(config: Config) -> TarFlow:
    """Random, well-conditioned weights; the output layer too, which a fresh model has at zero."""
    torch.manual_seed(0)
    model = TarFlow(config)
    for block in model.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.2 * config.width**-0.5)
    return model.eval()


def run(case: Case, model: TarFlow, flow: Flow) -> Result:
    labels = np.arange(case.batch) % CLASSES
    noise = flow.noise(0, range(case.batch))
    tensors = torch.from_numpy(noise), torch.from_numpy(labels)
    guidance = Guidance(case.guidance)
    times: list[tuple[float, float]] = []
    for i in range(case.repeats + 1):
        started = time.perf_counter()
        theirs = published(model, *tensors, case.guidance)
        between = time.perf_counter()
        ours = flow.sample(noise=noise, labels=labels, guidance=guidance, denoise=False, batch_size=case.batch)
        if i or case.repeats == 1:  # the first pair warms up
            times.append((between - started, time.perf_counter() - between))
    error = float(np.abs(model.unpatchify(theirs).numpy() - ours).max())
    if not error < AGREEMENT:
        raise SystemExit(
            f"{case.name}, batch {case.batch}: the two sides differ by {error:.2g}; times would mean nothing"
        )
    steps = case.config.blocks * (case.config.tokens - 1)
    return Result(
        case,
        published=median(t for t, _ in times),
        ours=median(t for _, t in times),
        ratio=median(a / b for a, b in times),
        error=error,
        floor=steps * step_floor(flow.bundle, read_bandwidth(torch.get_num_threads())),
    )


def table(results: list[Result]) -> str:
    rows = [
        "| model | batch | guidance | published, s | ours, s | ratio | bar | max error | floor, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        floor = f"{r.floor:.2f}" if r.case.batch == 1 else ""
        rows.append(
            f"| {r.case.name} | {r.case.batch} | {r.case.guidance:g} | {r.published:.2f} | {r.ours:.2f} "
            f"| **{r.ratio:.1f}x** | {r.case.bar:g}x | {r.error:.1g} | {floor} |"
        )
    return "\n".join(rows)


def machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return (
        f"{os.cpu_count()} cores ({model}), {torch.get_num_threads()} threads on both sides, Python "
        f"{platform.python_version()}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the smallest model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: list[Result] = []
    models: dict[str, tuple[TarFlow, Flow]] = {}
    with tempfile.TemporaryDirectory() as name:
        for case in cases(arguments.quick):
            if case.name not in models:
                model, folder = random_model(case.config), Path(name) / str(len(models))
                save(model, folder.with_suffix(".safetensors"))
                export(folder.with_suffix(".safetensors"), folder, check=False)
                models[case.name] = model, Flow.open(folder, threads=arguments.threads)
            results.append(run(case, *models[case.name]))
            print(table(results[-1:]).splitlines()[-1], flush=True)
    report = "\n\n".join(
        [
            HEADING,
            machine(),
            table(results),
            "Seconds to decode one batch through both blocks of a two-block model, without denoising; medians of "
            "interleaved runs, the ratio is the median of neighbouring pairs. Published: eager PyTorch, cache by "
            "concatenation, a second pass for guidance. The floor of batch 1 is one block's weights over the measured "
            "memory bandwidth, for every step.",
        ]
    )
    if not arguments.quick:
        replace_section(RESULTS, report)
    print(report)


def replace_section(path: Path, section: str) -> None:
    """Put ``section`` where its heading stands in the file, or at its end; other sections stay as they are."""
    heading = section.splitlines()[0]
    sections = ("\n" + path.read_text()).split("\n## ") if path.exists() else ["\n# Results"]
    head, *others = sections
    kept = [f"## {s}".strip() for s in others if f"## {s.splitlines()[0]}" != heading]
    path.write_text("\n\n".join([head.strip(), section, *kept]) + "\n")


if __name__ == "__main__":
    main()

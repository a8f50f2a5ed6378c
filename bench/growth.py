"""How time grows with the sequence and with the batch: ours, the published method and the compiled one, as a plot.

    python -m bench.growth

Writes bench/growth.png and its section of bench/RESULTS.md.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.compare import COMPILED, DEMO, PUBLISHED, SERIAL, torch_draw
from bench.results import RESULTS, machine, replace_section
from bench.weights import random_model
from tarflow.checkpoint import load, save
from tarflow.config import Config
from tarflow.export.pipeline import export
from tarflow.model import TarFlow
from tarflow.rivals import Compiled, published
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.measure import Contender, Result, of_flow, race

SIZES = (8, 16, 32, 64)  # of images, patch 2: 16 to 1,024 patches
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PLOT = Path(__file__).parent / "growth.png"
HEADING = "## Growth over the sequence and over the batch"
ROUNDS = 3


def field_of(model: TarFlow, bundle: Path) -> list[Contender]:
    compiled = Compiled(model)
    return [
        Contender(PUBLISHED, torch_draw(model, lambda *inputs: published(model, *inputs))),
        Contender(COMPILED, torch_draw(model, lambda *inputs: compiled(*inputs))),
        of_flow(Flow.open(bundle), SERIAL, "serial"),
    ]


def over_sequence(work: Path) -> list[tuple[int, list[Result]]]:
    """Batch 1 of a model of width 256, 2 layers, 2 blocks, random weights, by its number of patches."""
    found = []
    for size in SIZES:
        model = random_model(Config(size, 3, 2, 256, blocks=2, layers=2, classes=10, noise_std=0.1))
        save(model, work / f"{size}.safetensors")
        export(work / f"{size}.safetensors", work / str(size), check=False)
        flow = Flow.open(work / str(size))
        found.append((model.config.tokens, race(field_of(model, work / str(size)), flow, 1, Guidance(), ROUNDS)))
        print([(r.name, round(r.seconds, 3)) for r in found[-1][1]], flush=True)
    return found


def over_batch() -> list[tuple[int, list[Result]]]:
    """The demo."""
    model, judge = load(DEMO).eval(), Flow.open(DEMO)
    found = []
    for batch in BATCHES:
        found.append((batch, race(field_of(model, DEMO), judge, batch, Guidance(), 2 * ROUNDS + 1)))
        print([(r.name, round(r.seconds, 4)) for r in found[-1][1]], flush=True)
    return found


def draw(panels: Sequence[tuple[str, list[tuple[int, list[Result]]]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, len(panels), figsize=(9, 3.6), constrained_layout=True)
    for axes, (title, rows) in zip(places, panels, strict=True):
        for number, name in enumerate((PUBLISHED, COMPILED, SERIAL)):
            axes.plot([x for x, _ in rows], [found[number].seconds for _, found in rows], marker="o", label=name)
        axes.set(xscale="log", yscale="log", title=title, ylabel="seconds a batch")
        axes.set_xticks([x for x, _ in rows], [str(x) for x, _ in rows])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    places[0].set_xlabel("patches")
    places[1].set_xlabel("batch")
    places[0].legend(frameon=False)
    figure.savefig(PLOT, dpi=110)


def table(name: str, rows: list[tuple[int, list[Result]]]) -> list[str]:
    lines = [f"| {name} | published, s | compiled, s | serial, s | to published | to compiled |", "|---" * 6 + "|"]
    for x, (theirs, compiled, own) in rows:
        ratios = f"{own.faster_than(theirs):.2f}x | {own.faster_than(compiled):.2f}x"
        lines.append(f"| {x} | {theirs.seconds:.4f} | {compiled.seconds:.4f} | {own.seconds:.4f} | {ratios} |")
    return lines


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as work:
        sequence = over_sequence(Path(work))
    batch = over_batch()
    draw([("width 256, 2 layers, 2 blocks, batch 1", sequence), ("the demo", batch)])
    parts = [HEADING, machine(), "![two plots](growth.png)", "\n".join(table("patches", sequence))]
    replace_section(RESULTS, "\n\n".join([*parts, "\n".join(table("batch", batch))]))


if __name__ == "__main__":
    main()

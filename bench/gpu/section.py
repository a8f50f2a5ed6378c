"""A section of bench/RESULTS-GPU.md: the machine, one table, and what its numbers mean."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.results import replace_section

if TYPE_CHECKING:
    from tarflow.runtime.bundle import Bundle

    from .device import Cell
    from .field import Choice

RESULTS = Path(__file__).parent.parent / "RESULTS-GPU.md"
NOT_RUN = "No GPU was to be had: nothing here has been run on one."


def section(bundle: Bundle, speed: float, cells: Sequence[Cell], choice: Choice, notes: list[str]) -> str:
    """A section of the results: the machine, one table, and what its numbers mean."""
    config, where = bundle.manifest.config, machine(choice.device)
    columns = ["batch", "guidance", "", "seconds", "published / own", "compiled / own", "own / floor"]
    columns += ["error", "certificate", "passes"]
    table = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for cell in cells:
        for r in cell.rows:
            table.append(
                f"| {cell.batch} | {cell.guidance:g} | {r.name} | {'~' * r.estimated}{r.seconds:.4g} "
                f"| {ratio(r.over_published)} | {ratio(r.over_compiled)} | {r.seconds / cell.floor:.1f}x "
                f"| {small(r.error)} | {small(r.certificate)} | {r.passes or ''} |"
            )
        table.append(f"| {cell.batch} | {cell.guidance:g} | floor | {cell.floor:.4g} | | | | | | |")
    text = (
        f"{config.blocks} blocks of width {config.width} with {config.layers} layers, T = {config.tokens}, "
        f"{bundle.manifest.precision} graphs, random weights. Published models of these shapes have eight such blocks, "
        "and take as many times longer. Seconds to decode one batch, without denoising; medians of interleaved turns, "
        f"ratios are medians of neighbours. ~: estimated from {choice.stretch} steps each at the beginning, in the "
        "middle and at the end of a block. Error: largest difference from float32 PyTorch; none where a whole run "
        f"would take over {choice.patience:g} s. Certificate: largest round-trip error. Passes: dependent passes of "
        "all blocks; on random weights they say nothing about trained ones. Floor: what every serial step must read, "
        "one block's matrices and the keys and values of known positions, in half precision, at the measured "
        f"{speed / 1e9:.3g} GB/s."
    )
    notes = list(dict.fromkeys([*notes, *(note for cell in cells for note in cell.notes)]))
    return "\n\n".join(
        [f"## {bundle.folder.name} on {where.split(',')[0]}", where, "\n".join(table), text, *bullets(notes)]
    )


def put(path: Path, text: str) -> None:
    """Write a section, and take back what was said while there was none."""
    path.write_text(path.read_text().replace(NOT_RUN, "") if path.exists() else "# On a GPU\n")
    replace_section(path, text)


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def small(value: float | None) -> str:
    return "" if value is None else f"{value:.1g}"


def bullets(notes: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {note}" for note in notes)] if notes else []


def machine(device: str) -> str:
    """The device, its driver, and all versions, the device first."""
    import onnxruntime
    import torch

    from tarflow.runtime.machine import cores, processor

    versions = f"Python {platform.python_version()}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    if importlib.util.find_spec("tensorrt"):
        versions += f", tensorrt {importlib.metadata.version('tensorrt')}"
    host = f"{processor()}, {cores()} cores"
    if device == "cpu":
        return f"a CPU, {host}, {versions}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    return f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}, {host}, {versions}"

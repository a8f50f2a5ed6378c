"""The bench of a GPU, in one command, on a machine without network:

    python -m bench.gpu --wheels DIR

Exports (or takes, ``--bundles``) fp16 graphs of the two largest published shapes with random weights, one block of each
direction; draws the same samples with each of :mod:`bench.field` by turns; writes a section of bench/RESULTS-GPU.md a
model, about what was run and nothing else. ``--device cpu --quick`` goes the same way with a tiny model, and writes to
``--results`` alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .results import replace_section

if TYPE_CHECKING:
    from tarflow.config import Config
    from tarflow.runtime.bundle import Bundle

    from .device import Cell
    from .field import Choice

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "RESULTS-GPU.md"
NOT_RUN = "No GPU was to be had: nothing here has been run on one, and no number is reported."
NEEDED = ("torch", "numpy", "onnxruntime", "safetensors", "PIL")
NEEDED_TO_EXPORT = ("onnx", "onnx_ir", "onnxscript")
BATCHES = (1, 8, 32)


def shapes(quick: bool) -> dict[str, Config]:
    """The models by name: two blocks, one of each direction; published ones have eight."""
    from tarflow.config import Config

    if quick:
        return {"tiny": Config(8, 3, 2, width=64, blocks=2, layers=1, classes=4, noise_std=0.1)}
    return {
        "2-768-8-8": Config(64, 3, 2, width=768, blocks=2, layers=8, classes=1000, noise_std=0.05),
        "4-1024-8-8": Config(64, 3, 4, width=1024, blocks=2, layers=8, classes=1000, noise_std=0.05),
    }


def prepare(folder: Path, models: dict[str, Config]) -> None:
    """Export the models, in fp16 with random weights, to ``folder``; those that are there already stay."""
    missing = absent(NEEDED_TO_EXPORT)
    if missing:
        raise SystemExit(
            f"exporting needs {', '.join(missing)}, not to be found here: add wheels of them to --wheels, or export "
            "elsewhere, python -m bench.gpu --prepare DIR, and bring the folder: --bundles DIR"
        )
    from bench.weights import random_model
    from tarflow.checkpoint import save
    from tarflow.export.pipeline import export

    folder.mkdir(parents=True, exist_ok=True)
    for name, config in models.items():
        if (folder / name / "manifest.json").exists():
            continue
        with tempfile.TemporaryDirectory() as place:
            checkpoint = Path(place) / f"{name}.safetensors"
            save(random_model(config), checkpoint)
            tell(f"export {name}")
            export(checkpoint, folder / name, "fp16", check=False, watch=tell)


# --- what is written --------------------------------------------------------------------------------------------------


def section(
    name: str, bundle: Bundle, where: str, speed: float, cells: Sequence[Cell], choice: Choice, notes: list[str]
) -> str:
    """A section of the results: the machine, one table, and what its numbers mean."""
    config = bundle.manifest.config
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
    return "\n\n".join([f"## {name} on {where.split(',')[0]}", where, "\n".join(table), text, *bullets(notes)])


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


def tell(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


# --- the command ------------------------------------------------------------------------------------------------------


def absent(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def with_wheels(folder: Path, arguments: Sequence[str]) -> int:
    """The same command in a process that sees the wheels of a folder before what is installed. Returns its exit code.

    They go to a folder of their own: a virtual environment made from one does not see that one's packages.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"'{folder}' holds no wheels; expected onnxruntime_gpu-*.whl and what else is missing here")
    with tempfile.TemporaryDirectory(prefix="tarflow-wheels.") as site:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        if subprocess.run([*pip, "--disable-pip-version-check", "--target", site, *map(str, wheels)]).returncode:
            raise SystemExit(f"pip could not install the wheels of '{folder}'; expected one version of each package")
        path = os.pathsep.join(filter(None, [site, str(ROOT), os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-m", "bench.gpu", *arguments]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=Path.cwd()).returncode


def build_engines(bundle: Bundle, batches: Sequence[int]) -> str | None:
    """TensorRT engines for the batches, beside the bundle's graphs; what is built stays. Returns why not, or None."""
    from tarflow.export.engines.build import Options, build
    from tarflow.runtime.backend import WINDOW

    from .device import FAILURES

    sizes = min(batches), sorted(batches)[len(batches) // 2], max(batches)
    options = Options(batch=sizes, window=(1, 1, WINDOW))
    try:
        build(bundle, options=options, watch=lambda progress: None, package="tensorrt")
    except FAILURES as error:
        return f"TensorRT engines were not built: {str(error).splitlines()[0][:200]}"
    return None


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What was asked, and the arguments that are left for a process with the wheels."""
    wheels = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    wheels.add_argument("--wheels")
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--wheels", type=Path, metavar="DIR", help="wheels to use before what is installed, such as onnxruntime-gpu")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--quick", action="store_true", help="a tiny model, small batches, one turn; writes no file but --results")
    add("--prepare", type=Path, metavar="DIR", help="only export the bundles, for --bundles; needs onnx, no GPU")
    add("--bundles", type=Path, metavar="DIR", help="bundles made by --prepare; default: made anew")
    add("--models", nargs="+", metavar="NAME", help="only these, such as 4-1024-8-8")
    add("--batch", type=int, nargs="+", metavar="N", help="batch sizes; default 1 8 32")
    add("--repeats", type=int, metavar="N", help="turns; default 3, or 1 with --quick")
    add("--stretch", type=int, default=32, metavar="N", help="steps of the published method timed, thrice a block")
    add("--patience", type=float, default=60.0, metavar="S", help="run it whole, for its error, if that is enough")
    add("--no-compile", action="store_true", help="record PyTorch's own kernels instead of compiled ones")
    add("--no-tensorrt", action="store_true", help="leave TensorRT out where it is installed")
    add("--results", type=Path, metavar="FILE", help=f"default: {RESULTS.name} on a GPU, none otherwise")
    return parser.parse_args(arguments), wheels.parse_known_args(arguments)[1]


def main(arguments: Sequence[str] | None = None) -> None:
    asked, rest = parse(sys.argv[1:] if arguments is None else arguments)
    if asked.wheels:
        raise SystemExit(with_wheels(asked.wheels, rest))
    missing = absent(NEEDED)
    if missing:
        raise SystemExit(f"the bench needs {', '.join(missing)}, not to be found here: bring wheels, --wheels DIR")
    models = shapes(asked.quick)
    unknown = sorted(set(asked.models or ()) - set(models))
    if unknown:
        raise SystemExit(f"no model {', '.join(unknown)} in this bench; expected some of {', '.join(models)}")
    models = {name: config for name, config in models.items() if not asked.models or name in asked.models}
    if asked.prepare:
        prepare(asked.prepare, models)
        return
    check_device(asked.device)
    with tempfile.TemporaryDirectory(prefix="tarflow-bench.") as made:
        folder = asked.bundles or Path(made)
        prepare(folder, models)
        for name in models:
            run(name, folder / name, asked)


def run(name: str, folder: Path, asked: argparse.Namespace) -> None:
    """Bench one model, print its section, and write it where results go."""
    from tarflow.runtime.bundle import Bundle

    from .device import bench
    from .field import Choice, bandwidth

    bundle = Bundle.open(folder)
    bundle.check_runnable()
    batches = asked.batch or ((1, 2) if asked.quick else BATCHES)
    repeats = asked.repeats or (1 if asked.quick else 3)
    tensorrt = asked.device == "cuda" and not asked.no_tensorrt and importlib.util.find_spec("tensorrt") is not None
    failed = build_engines(bundle, batches) if tensorrt else None
    compiled = asked.device == "cuda" and not asked.no_compile
    choice = Choice(asked.device, compiled, tensorrt and failed is None, asked.stretch, asked.patience)
    speed = bandwidth(asked.device, (64 if asked.quick else 2048) << 20)
    cells = []
    results = asked.results or (RESULTS if asked.device == "cuda" and not asked.quick else None)
    for cell in bench(bundle, choice, batches, repeats, speed, tell):
        cells.append(cell)
        text = section(name, bundle, machine(asked.device), speed, cells, choice, [failed] if failed else [])
        if results is not None:  # after every cell: a command that is stopped leaves what was run
            put(results, text)
    print(text)


def check_device(device: str) -> None:
    import onnxruntime
    import torch

    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} finds no CUDA GPU here; --device cpu --quick tries the command out"
        )
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise SystemExit(
            f"onnxruntime {onnxruntime.__version__} here is not built for CUDA: bring a wheel of onnxruntime-gpu for "
            f"Python {platform.python_version()} and CUDA {torch.version.cuda}, --wheels DIR"
        )


if __name__ == "__main__":
    main()

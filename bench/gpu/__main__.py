"""The bench of a GPU, in one command, on a machine without network:

    python -m bench.gpu --wheels DIR

Exports (or takes, ``--bundles``) fp16 graphs of the two largest published shapes with random weights, one block of each
direction; draws the same samples with each of :mod:`bench.gpu.field` by turns; writes a section of
bench/RESULTS-GPU.md a model, about what was run and nothing else. ``--device cpu --quick`` goes the same way with a
tiny model, and writes to ``--results`` alone.
"""

from __future__ import annotations

import argparse
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

from .checkout import ROOT
from .models import absent, export_models, shapes
from .section import RESULTS, put, section

if TYPE_CHECKING:
    from tarflow.runtime.bundle import Bundle

NEEDED = ("torch", "numpy", "onnxruntime", "safetensors", "PIL")
BATCHES = (1, 8, 32)


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
    from tarflow.export.engines.build import build
    from tarflow.export.engines.options import Options
    from tarflow.runtime.backend import WINDOW

    from .device import FAILURES

    sizes = min(batches), sorted(batches)[len(batches) // 2], max(batches)
    options = Options(batch=sizes, window=(1, 1, WINDOW))
    try:
        build(bundle, options=options)
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
        export_models(asked.prepare, models, tell)
        return
    check_device(asked.device)
    with tempfile.TemporaryDirectory(prefix="tarflow-bench.") as made:
        folder = asked.bundles or Path(made)
        export_models(folder, models, tell)
        for name in models:
            run(folder / name, asked)


def run(folder: Path, asked: argparse.Namespace) -> None:
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
        text = section(bundle, speed, cells, choice, [failed] if failed else [])
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


def tell(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

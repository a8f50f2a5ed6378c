"""``tarflow doctor``: will it run here, and if not, why?"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .console import DEMO, emit, show
from .messages import flags_in, spell
from .options import Json

if TYPE_CHECKING:
    from ..runtime.backend import Backend
    from ..runtime.bundle import Bundle

PACKAGES = (
    "tarflow",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "safetensors",
    "torch",
    "onnx",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-rtx",
    "onnxruntime-ep-nv-tensorrt-rtx",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "cuda-python",
    "polygraphy",
)
SELF_TEST_LIMIT = 1e-3  # round trip of one block


def doctor(json: Json = False) -> None:
    """Show versions, providers, cores and GPU; warn of combinations known to fail; try one block on every provider,
    TensorRT engines (built for it, where there is a GPU) among them, or say why it cannot be tried.

    Exit code 3 if nothing can run here, 1 if a provider fails or computes wrong results.

    Example: tarflow doctor
    """
    versions = {name: found for name in PACKAGES if (found := version_of(name))}
    providers, problems = _providers()
    problems += _known_bad(versions, providers)
    tests = _self_tests(providers)
    tensorrt = _tensorrt(versions)
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "gpu": _gpu(),
        "packages": versions,
        "providers": providers,
        "self_test": tests,
        "tensorrt": tensorrt,
        "problems": problems,
    }
    if json:
        emit(report)
    else:
        show(
            [
                ("python", f"{report['python']} on {report['platform']}"),
                ("cores", str(report["cores"])),
                ("gpu", report["gpu"] or "none seen"),
                *((name, found) for name, found in versions.items()),
                ("providers", ", ".join(providers) or "none"),
                *((f"self-test {name}", _spell(result)) for name, result in tests.items()),
                *(("tensorrt", sentence) for sentence in tensorrt),
            ]
        )
        for problem in problems:
            print(f"problem: {problem}")
        if not problems:
            print("no known problem")
    if all(result["ok"] is None for result in tests.values()):
        raise typer.Exit(3)
    if any(result["ok"] is False for result in tests.values()):
        raise typer.Exit(1)


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _providers() -> tuple[list[str], list[str]]:
    """Which of our providers this ONNX Runtime has, and what is wrong if none."""
    from ..runtime.errors import MachineError
    from ..runtime.ort.library import PROVIDERS, load_onnxruntime

    try:
        available = load_onnxruntime().get_available_providers()
    except MachineError as error:
        return [], [spell(error)]
    return [name for name, full in PROVIDERS.items() if full in available], []


def _known_bad(versions: dict[str, str], providers: list[str]) -> list[str]:
    problems = []
    if "onnxruntime" in versions and "onnxruntime-gpu" in versions:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; keep one: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
        )
    if _gpu() and "cuda" not in providers and providers:
        problems.append(
            "there is a GPU, but this ONNX Runtime is the CPU build: "
            "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
        )
    runtime = versions.get("onnxruntime") or versions.get("onnxruntime-gpu")
    if runtime and tuple(map(int, runtime.split(".")[:2])) < (1, 20):
        problems.append(
            f"onnxruntime {runtime} is older than 1.20, which these graphs need: pip install -U onnxruntime"
        )
    return problems


def _gpu() -> str | None:
    """Name and driver of the first NVIDIA GPU, as its own tool says."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.splitlines()[0] if answer else None


def _tensorrt(versions: dict[str, str]) -> list[str]:
    """Sentences about building and running engines here."""
    from ..export.engines.target import find_tensorrt
    from ..runtime.errors import MachineError, briefly
    from ..runtime.tensorrt.cuda import Cuda

    sentences = []
    try:
        trt, package = find_tensorrt()
        sentences.append(f"{package} {trt.__version__} builds engines: tarflow build BUNDLE")
    except MachineError as error:
        sentences.append(spell(error))
    try:
        cuda = Cuda()
        sentences.append(f"engines can run on {cuda.name}, compute capability {cuda.capability}")
    except MachineError as error:
        sentences.append(briefly(error))
    if any(name.startswith("onnxruntime-ep-nv-tensorrt-rtx") for name in versions):
        sentences.append(
            "the TensorRT-RTX plugin of ONNX Runtime is installed; tarflow does not load it: build engines with "
            "pip install 'tarflow[tensorrt-rtx]' and tarflow build"
        )
    return sentences


def _self_tests(providers: list[str]) -> dict[str, dict[str, Any]]:
    """Provider -> what one block gave on it; ``ok`` None where it could not be tried."""
    from ..runtime.ort.library import PROVIDERS

    tests: dict[str, dict[str, Any]] = {}
    for name, full in PROVIDERS.items():
        if name in providers:
            tests[name] = _self_test(partial(_on_runtime, name))
        else:
            tests[name] = _untried(f"this ONNX Runtime has no {full}")
    if "cpu" in providers:
        tests["cpu, graphs for devices"] = _self_test(partial(_on_runtime, "cpu", resident=True))
    tests["tensorrt"] = _engine_test()
    return tests


def _on_runtime(name: str, bundle: Bundle, resident: bool | None = None) -> Backend:
    """A bundle on one of ONNX Runtime's providers."""
    from ..runtime.opening import Opening
    from ..runtime.ort.backend import OrtBackend

    return OrtBackend(bundle, Opening(name), resident)


def _engine_test() -> dict[str, Any]:
    """Build the demo's engines in a temporary folder, as quickly as they build, and try them."""
    import tempfile

    from ..export.engines.build import build
    from ..export.engines.options import Options
    from ..export.engines.target import find_tensorrt
    from ..runtime.bundle import Bundle
    from ..runtime.errors import MachineError, briefly
    from ..runtime.tensorrt.backend import open_tensorrt
    from ..runtime.tensorrt.cuda import Cuda

    try:
        Cuda()
        find_tensorrt()
    except MachineError as error:
        return _untried(briefly(error))

    with tempfile.TemporaryDirectory(prefix="tarflow-doctor.") as name:
        folder = Path(name) / "demo"
        shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("engines", "plans"))
        try:
            place, _ = build(Bundle.open(folder), options=Options(batch=(1, 4, 4), level=0))
        except Exception as failure:  # as in a self-test
            return _failed(failure)
        return _self_test(lambda bundle: open_tensorrt(bundle, folder=place), folder)


def _self_test(open_backend: Callable[[Bundle], Backend], folder: Path = DEMO) -> dict[str, Any]:
    """Invert the demo's last block and encode it again: the error is the certificate of one block."""
    import numpy as np

    from ..runtime.backend import Branches
    from ..runtime.bundle import Bundle
    from ..runtime.decode import serial
    from ..runtime.flow import Flow

    try:
        bundle = Bundle.open(folder)
        bundle.check_runnable()
        flow = Flow(bundle, open_backend(bundle))
        block = flow.config.blocks - 1
        z = flow.noise(0, range(4))
        branches = Branches.plain(np.full(4, -1, np.int64), flow.config.tokens)
        x = serial(flow.backend.decoding(block, z, branches), flow.config.tokens)
        error = float(np.abs(flow.backend.forward(block, x, branches)[0] - z).max())
    except Exception as failure:  # whatever a provider throws is this command's answer
        return _failed(failure)
    return {"ok": error < SELF_TEST_LIMIT, "error": error, "message": f"round trip of one block {error:.2g}"}


def _failed(failure: Exception) -> dict[str, Any]:
    return {"ok": False, "error": None, "message": flags_in(f"{type(failure).__name__}: {failure}")}


def _untried(why: str) -> dict[str, Any]:
    return {"ok": None, "error": None, "message": why}


def _spell(result: dict[str, Any]) -> str:
    state = {True: "ok", False: "FAILED", None: "not tried"}[result["ok"]]
    return f"{state}, {result['message']}"

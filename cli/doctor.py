"""``tarflow doctor``: will it run here, and if not, why?"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Exit

from ..runtime.bundle import Bundle
from ..runtime.errors import MachineError, TarflowError, briefly
from ..runtime.hidden import left_in
from ..runtime.machine import cores, cpu_quota
from ..runtime.native.choice import on_cpus
from ..runtime.opening import Opening
from .console import DEMO, emit, show
from .messages import flags_in, spell
from .options import Json

if TYPE_CHECKING:
    from ..runtime.backend import Backend

_RUNTIME = ("tarflow", "numpy", "onnxruntime", "onnxruntime-gpu", "safetensors")
_TENSORRT = ("tensorrt", "tensorrt-cu13", "tensorrt-rtx")
_PLUGINS = ("onnxruntime-ep-nv-tensorrt-rtx", "onnxruntime-ep-nv-tensorrt-rtx-cu13")
PACKAGES = (*_RUNTIME, "torch", "onnx", *_TENSORRT, *_PLUGINS, "cuda-python", "polygraphy")
_COST = (
    "small batches take up to 4 times longer that way, in int8 up to 10 times; where it was not built: install a C++ "
    "compiler such as g++, then tarflow again"
)
SELF_TEST_LIMIT = 1e-3  # round trip of one block


def doctor(json: Json = False) -> None:
    """Show versions, providers, cores (and how many of them a quota leaves) and GPU; warn of combinations known to
    fail; try one block on every provider, TensorRT engines (built for it, where there is a GPU) among them, or say why
    it cannot be tried.

    Exit code 3 if nothing can run here, 1 if a provider fails or computes wrong results.

    Example: tarflow doctor
    """
    versions, gpu, quota = versions_of(PACKAGES), _gpu(), cpu_quota()
    providers, problems = _providers()
    problems += _known_bad(versions, providers, gpu) + left_here()
    tensorrt, untried = _tensorrt(versions)
    tests = _self_tests(providers)
    tests["tensorrt"] = _result(None, untried) if untried else _engine_test()
    problems += [f"self-test {name}: {test['message']}" for name, test in tests.items() if test["ok"] is False]
    decoding = on_cpus(Bundle.open(DEMO))
    if not decoding.startswith("native"):
        decoding += f"; {_COST}"
    python, system, count = platform.python_version(), platform.platform(), os.cpu_count()
    if json:
        used = {"cores": count, "cpu_quota": quota, "threads": cores()}
        found = {"packages": versions, "providers": providers, "self_test": tests, "tensorrt": tensorrt}
        found["decoding_on_cpus"] = decoding
        emit(python=python, platform=system, **used, gpu=gpu, **found, problems=problems)
    else:
        states = {True: "ok", False: "FAILED", None: "not tried"}
        show(
            [
                ("python", f"{python} on {system}"),
                ("cores", f"{count}, {cores()} of them used{f': a quota of {quota:g}' if quota else ''}"),
                ("gpu", gpu or "none seen"),
                *versions.items(),
                ("providers", ", ".join(providers) or "none"),
                ("on cpus", f"the demo is decoded by {decoding}"),
                *((f"self-test {name}", f"{states[test['ok']]}, {test['message']}") for name, test in tests.items()),
                *(("tensorrt", sentence) for sentence in tensorrt),
            ]
        )
        print("\n".join(f"problem: {problem}" for problem in problems) or "no known problem")
    results = [test["ok"] for test in tests.values()]
    if False in results:
        raise Exit(1)
    if True not in results:
        raise Exit(3)


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _providers() -> tuple[list[str], list[str]]:
    """Which of our providers this ONNX Runtime has, and what is wrong if none."""
    from ..runtime.ort.library import PROVIDERS, load_onnxruntime

    try:
        available = load_onnxruntime().get_available_providers()
    except MachineError as error:
        return [], [spell(error)]
    return [name for name, full in PROVIDERS.items() if full in available], []


def _known_bad(versions: dict[str, str], providers: list[str], gpu: str | None) -> list[str]:
    problems = []
    if "onnxruntime" in versions and "onnxruntime-gpu" in versions:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; keep one: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
        )
    if gpu and "cuda" not in providers and providers:
        problems.append(
            "there is a GPU, but this ONNX Runtime is the CPU build: "
            "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
        )
    ort = versions.get("onnxruntime") or versions.get("onnxruntime-gpu")
    if ort and tuple(map(int, ort.split(".")[:2])) < (1, 25):
        problems.append(f"onnxruntime {ort} is older than 1.25, which these graphs need: pip install -U onnxruntime")
    return problems


def left_here() -> list[str]:
    """What killed runs left hidden in this folder, those in it, and where bundles keep plans and engines."""
    here = Path()
    folders = [folder for place in ("*/", "*/plans/", "*/records/", "*/engines/*/") for folder in here.glob(place)]
    return [
        f"'{left}' was left by a run that was killed; the next that writes to '{left.parent}' puts back or removes "
        f"it, or: rm -r '{left}'"
        for folder in (here, *folders)
        for left in left_in(folder)
    ]


def _gpu() -> str | None:
    """Name and driver of the first NVIDIA GPU, as its own tool says."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.splitlines()[0] if answer else None


def _tensorrt(versions: dict[str, str]) -> tuple[list[str], str | None]:
    """Sentences about building and running engines here, and why none can be tried."""
    from ..export.engines.target import find_tensorrt
    from ..runtime.tensorrt.cuda import Cuda

    sentences, untried = [], None
    try:
        trt, package = find_tensorrt()
        sentences.append(f"{package} {trt.__version__} builds engines: tarflow build BUNDLE")
    except MachineError as error:
        sentences.append(spell(error))
        untried = briefly(error)
    try:
        cuda = Cuda()
        sentences.append(f"engines can run on {cuda.name}, compute capability {cuda.capability}")
    except MachineError as error:
        sentences.append(untried := briefly(error))
    if versions.keys() & {*_PLUGINS}:
        sentences.append(
            "the TensorRT-RTX plugin of ONNX Runtime is installed; tarflow does not load it: build engines with "
            "pip install 'tarflow[tensorrt-rtx]' and tarflow build"
        )
    return sentences, untried


def _self_tests(providers: list[str]) -> dict[str, dict[str, Any]]:
    """Provider -> what one block gave on it; ``ok`` None where it could not be tried."""
    from ..runtime.ort.library import PROVIDERS

    def on(name: str, resident: bool | None = None) -> dict[str, Any]:
        from ..runtime.ort.backend import OrtBackend

        return _self_test(lambda bundle: OrtBackend(bundle, Opening(name), resident))

    tests = {
        name: on(name) if name in providers else _result(None, f"this ONNX Runtime has no {full}")
        for name, full in PROVIDERS.items()
    }
    if "cpu" in providers:
        tests["cpu, graphs for devices"] = on("cpu", resident=True)
        tests["native"] = _native_test()
    return tests


def _native_test() -> dict[str, Any]:
    """The same on the native engine, and which instruction set it takes."""
    from ..runtime.native.backend import NativeBackend
    from ..runtime.native.library import isa

    try:
        found = isa()
    except TarflowError as error:
        return _result(None, briefly(error))
    test = _self_test(lambda bundle: NativeBackend(bundle, Opening("native")))
    return test | {"message": f"{test['message']}, {found}"}


def _engine_test() -> dict[str, Any]:
    """Build the demo's engines in a temporary folder, as quickly as they build, and try them."""
    from ..export.engines.build import build
    from ..export.engines.options import Options
    from ..runtime.tensorrt.backend import open_tensorrt

    def opened(bundle: Bundle) -> Backend:
        place, _ = build(bundle, options=Options(batch=(1, 4, 4), level=0))
        return open_tensorrt(bundle, folder=place)

    with tempfile.TemporaryDirectory(prefix="tarflow-doctor.") as name:
        folder = Path(name) / "demo"
        shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("engines", "plans"))
        return _self_test(opened, folder)


def _self_test(open_backend: Callable[[Bundle], Backend], folder: Path = DEMO) -> dict[str, Any]:
    """Invert the demo's last block and encode it again: the error is the certificate of one block."""
    import numpy as np

    from ..runtime.backend import Branches
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
        return _result(False, flags_in(f"{type(failure).__name__}: {failure}"))
    return _result(error < SELF_TEST_LIMIT, f"round trip of one block {error:.2g}", error)


def _result(ok: bool | None, message: str, error: float | None = None) -> dict[str, Any]:
    return {"ok": ok, "error": error, "message": message}

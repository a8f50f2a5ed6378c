"""The stand-in, built: libraries that take the place of CUDA's, and the ONNX Runtime that runs on them.

    python -m bench.gpu.standin.build

Needs a C++ compiler, nm and readelf. CUDA's headers and ONNX Runtime come from the package index when they are first
needed.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.checkout import KEPT, ROOT
from bench.gpu.wheels import ONNXRUNTIME, unpacked
from tarflow.runtime.files import replacing_folder

SOURCE = Path(__file__).parent / "src"
HEADERS = ("nvidia-cuda-runtime==13.5.37", "nvidia-cuda-crt==13.5.37")
RUNTIME = "libcudart.so.13"  # what the others call for the log
LIBRARIES = {
    RUNTIME: ("state", "code", "device", "memory", "streams"),
    "libcublas.so.13": ("cublas",),
    "libcublasLt.so.13": ("cublas",),
    "libcurand.so.10": (),
    "libcuda.so.1": ("driver",),
}
NOT_SUPPORTED = 801  # cudaErrorNotSupported


@dataclass(frozen=True, slots=True)
class Standin:
    """``libraries`` in place of CUDA's, ``packages`` with the onnxruntime that finds them."""

    libraries: Path
    packages: Path

    def environment(self, log: Path | None = None) -> dict[str, str]:
        """For a process that is to run on it. What it does is written to ``log``."""
        found = {**os.environ, "LD_LIBRARY_PATH": str(self.libraries), "PYTHONPATH": f"{self.packages}:{ROOT}"}
        return found if log is None else {**found, "STANDIN_LOG": str(log)}


def build() -> Standin:
    """Build it, or take what was built of the same sources. Raises SystemExit if there is no compiler."""
    packages = unpacked(ONNXRUNTIME)
    sources = sorted(SOURCE.iterdir())
    text = b"".join(path.read_bytes() for path in [Path(__file__), *sources])
    key = hashlib.sha256(text + ONNXRUNTIME.encode()).hexdigest()[:12]
    folder = KEPT / f"standin-{packages.name}-{key}"
    if not folder.exists():
        with replacing_folder(folder, force=False, marker=None) as partial:
            compile_all(partial, packages / "onnxruntime/capi/libonnxruntime_providers_cuda.so")
    return Standin(folder, packages)


def compile_all(folder: Path, provider: Path) -> None:
    """Every library, with all that ``provider`` asks of it: what no source defines says so in the log, and fails."""
    includes = [unpacked(header) for header in HEADERS]
    flags = [f"-I{path.parent}" for root in includes for path in root.rglob("cuda_runtime_api.h")]
    flags += [f"-I{path.parent.parent}" for root in includes for path in root.rglob("crt/host_defines.h")]
    asked = asked_of(provider)
    with tempfile.TemporaryDirectory() as place:
        for name, sources in LIBRARIES.items():
            objects = [Path(place) / f"{source}.o" for source in sources]
            for source, compiled in zip(sources, objects, strict=True):
                run("g++", "-std=c++17", "-O1", "-fPIC", *flags, "-c", SOURCE / f"{source}.cpp", "-o", compiled)
            defined = {words[-1] for compiled in objects for words in symbols("--defined-only", compiled)}
            absent = Path(place) / "absent.cpp"
            absent.write_text(stubs(asked[name] - defined))
            script = Path(place) / "exports.map"
            script.write_text(f"{name} {{ global: cu*; __cu*; standin_*; local: *; }};\n")
            link = ["g++", "-shared", "-fPIC", f"-Wl,-soname,{name}", f"-Wl,--version-script={script}"]
            others = [] if name == RUNTIME else [f"-L{folder}", f"-l:{RUNTIME}"]
            run(*link, "-o", folder / name, *objects, absent, *others)


def asked_of(provider: Path) -> dict[str, set[str]]:
    """What a provider calls, by library. The driver's names carry no library."""
    found = defaultdict(set)
    for words in symbols("--dynamic", "--undefined-only", provider):
        name, _, library = words[-1].partition("@")
        if library in LIBRARIES:
            found[library].add(name)
        elif not library and name.startswith("cu"):
            found["libcuda.so.1"].add(name)
    return found


def needed_by(library: Path) -> list[str]:
    """The libraries that one is linked to."""
    return re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "--dynamic", "--wide", library))


def symbols(*arguments: str | Path) -> list[list[str]]:
    return [line.split() for line in run("nm", *arguments).splitlines()]


def stubs(names: set[str]) -> str:
    lines = [f'int {name}(void) {{ standin_absent("{name}"); return {NOT_SUPPORTED}; }}' for name in sorted(names)]
    return "\n".join(['extern "C" {', "void standin_absent(const char*);", *lines, "}", ""])


def run(*command: str | Path) -> str:
    try:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    except FileNotFoundError:
        raise SystemExit(
            f"{command[0]} is not to be found here; the stand-in for CUDA is compiled: install g++"
        ) from None


if __name__ == "__main__":
    build()

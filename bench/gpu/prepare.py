"""Pack what a GPU machine without network needs beside this checkout and its own PyTorch:

    python -m bench.gpu.prepare FOLDER [--python 3.12] [--capability 90] [--bundle DIR ...]

onnxruntime-gpu for that Python, of whose device code only what that GPU can load and a bundle launches is kept (a
fifteenth of the library, packed); libtarflow, where it was built; bundles. :mod:`bench.gpu.unpack` undoes it.
"""

from __future__ import annotations

import argparse
import lzma
import os
import subprocess
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.checkout import LIBTARFLOW, ROOT
from bench.gpu.fatbin import blank
from bench.gpu.standin.kernels import PROVIDER, own
from bench.gpu.wheels import HERE, ONNXRUNTIME, unpacked

UNUSED = (
    "onnxruntime/transformers",
    "onnxruntime/tools",
    "onnxruntime/quantization",
    "onnxruntime/capi/libonnxruntime_providers_tensorrt.so",
)
LARGE = 4 << 20  # a file of so many bytes is an archive of its own, so that archives are packed and unpacked at a time


@dataclass(frozen=True, slots=True)
class Archive:
    """Files by their place on the other machine, below one folder."""

    name: str
    files: dict[str, Path]

    def write(self, folder: Path) -> int:
        """FOLDER/NAME.tar.xz. Returns its size."""
        path = folder / f"{self.name}.tar.xz"
        with (
            lzma.open(path, "wb", preset=9) as packed,
            tarfile.open(fileobj=packed, mode="w|") as tar,
        ):
            for place, file in self.files.items():
                tar.add(file.resolve(), place)
        return path.stat().st_size


def onnxruntime(python: str, capability: int, work: Path) -> list[Archive]:
    """ONNX Runtime for that Python: its large files one by one, and the rest."""
    packages = unpacked(ONNXRUNTIME, python)
    lean = work / "lean.so"
    library = bytearray((packages / PROVIDER).read_bytes())
    left = blank(library, capability, own(packages / PROVIDER))
    if not left:
        raise SystemExit(f"{ONNXRUNTIME} has no code for compute capability {capability / 10}; expected one such as 90")
    lean.write_bytes(library)
    archives, rest = [], {}
    for file in sorted(path for path in packages.rglob("*") if path.is_file()):
        place = file.relative_to(packages).as_posix()
        if place.startswith(UNUSED):
            continue
        source = lean if place == PROVIDER else file
        if source.stat().st_size > LARGE:
            archives.append(Archive(file.name.partition(".")[0], {place: source}))
        else:
            rest[place] = source
    return [*archives, Archive("python", rest)]


def of_bundle(bundle: Path) -> Archive:
    """A bundle, below ``bundles`` by its name."""
    files = [path for path in sorted(bundle.rglob("*")) if path.is_file()]
    return Archive(
        f"bundle-{bundle.name}", {f"bundles/{bundle.name}/{path.relative_to(bundle)}": path for path in files}
    )


def tree() -> int:
    """Bytes of the checkout: what git knows, and what it does not ignore."""
    names = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    files = [ROOT / os.fsdecode(name) for name in names.stdout.split(b"\0") if name]
    return sum(file.lstat().st_size for file in files if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.prepare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, help="where archives go; git ignores .gpu and build")
    add("--python", default=HERE, metavar="X.Y", help="of the other machine; default: this one's")
    add("--capability", type=int, default=90, metavar="N", help="compute capability of its GPU; default: 90, for 9.0")
    add("--bundle", type=Path, nargs="+", default=[], metavar="DIR")
    add("--bundles-alone", action="store_true", help="no ONNX Runtime and no libtarflow: a second load")
    asked = parser.parse_args()
    for bundle in asked.bundle:
        if not (bundle / "manifest.json").is_file():
            parser.error(f"'{bundle}' is no bundle: it has no manifest.json")
    asked.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        archives = [of_bundle(bundle) for bundle in asked.bundle]
        if not asked.bundles_alone:
            archives += onnxruntime(asked.python, asked.capability, Path(work))
            archives += [Archive("libtarflow", {"libtarflow.so": LIBTARFLOW})] if LIBTARFLOW.exists() else []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            sizes = list(pool.map(lambda archive: archive.write(asked.folder), archives))
    for archive, size in zip(archives, sizes, strict=True):
        print(f"{size / 1e6:8.1f} MB  {archive.name}")
    print(f"{sum(sizes) / 1e6:8.1f} MB  {asked.folder}, and {tree() / 1e6:.1f} MB of this checkout")
    if not LIBTARFLOW.exists():
        print(f"without libtarflow: there is no {LIBTARFLOW.relative_to(ROOT)}; make cpp builds it")


if __name__ == "__main__":
    main()

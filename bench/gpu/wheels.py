"""Wheels from a package index, unpacked in a folder of the checkout that git ignores, and kept there."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from bench.gpu.checkout import KEPT
from tarflow.runtime.files import replacing_folder

ONNXRUNTIME = "onnxruntime-gpu==1.31.1"  # for CUDA 13
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64")


def unpacked(requirement: str, python: str = HERE) -> Path:
    """The folder that holds what is in the wheel of ``requirement``, NAME==VERSION, for a CPython such as "3.12".

    Linux on x86-64, whatever runs here. Raises SystemExit if pip finds no such wheel.
    """
    folder = KEPT / f"{requirement.replace('==', '-')}-cp{python.replace('.', '')}"
    if folder.exists():
        return folder
    KEPT.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    pip += [f"--platform={platform}" for platform in PLATFORMS]
    with tempfile.TemporaryDirectory(dir=KEPT) as place:
        if subprocess.run([*pip, "--dest", place, requirement]).returncode:
            raise SystemExit(f"pip found no wheel of {requirement} for Python {python} on Linux, x86-64")
        (wheel,) = Path(place).glob("*.whl")
        with replacing_folder(folder, force=False, marker=None) as partial, zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
    return folder

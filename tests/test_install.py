"""A fresh machine: the runtime alone installs, and draws 64 images."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = ("tarflow", "export", "runtime", "shards", "quality", "serve", "cli", "pyproject.toml", "README.md", "LICENSE")


def test_the_runtime_alone_generates_without_torch_and_onnx(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(source)]
    subprocess.run(install, check=True)

    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True)
    installed = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert "onnxruntime" in installed
    assert not installed & {"torch", "onnx", "onnxscript", "onnxruntime-gpu", "scikit-learn"}
    top = {p.name for p in next((tmp_path / "env" / "lib").glob("python*")).joinpath("site-packages").iterdir()}
    assert not top & {"export", "runtime", "shards", "quality", "serve", "cli"}, "a common name landed in site-packages"

    command = [str(tmp_path / "env" / "bin" / "tarflow"), "generate", "--n", "64", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples.png").exists()
    assert json.loads(done.stdout)["certificate"]["max"] < 1e-4

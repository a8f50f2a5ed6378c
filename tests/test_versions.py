"""What the README says, on the oldest packages that pyproject.toml allows, and on Python 3.13."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path
from urllib.request import urlopen

import pytest
from packaging.version import Version

from .conftest import DEMO
from .lowest_bounds import ROOT, lowest_bounds

OLDEST, NEWEST = ROOT / ".env-oldest", ROOT / ".env-3.13"
README = (ROOT / "README.md").read_text()
COMMANDS = (
    "doctor",
    "inspect my-bundle",
    "verify my-bundle",
    "generate my-bundle --n 64 --labels 0-9 --guidance 1 -o grid.png --save samples.npy",
    "generate my-bundle --n 64 --shard-size 16 --out samples --workers 2",
    "likelihood my-bundle samples.npy --labels 3",
    "classify my-bundle samples.npy --classes 0-4 --top 1",
    "denoise my-bundle samples.npy --save denoised.npz",
    "evaluate my-bundle --against samples.npy --n 64",
    "report my-bundle -o report.html --n 16",
    "package my-bundle --triton models",
    "calibrate my-bundle --batch 1 --samples 1",
)
ELSEWHERE = {"export", "train", "build", "check-engine", "bisect", "bench"}  # these need PyTorch or TensorRT


@pytest.fixture(params=[OLDEST, NEWEST], ids=["oldest", "3.13"])
def environment(request: pytest.FixtureRequest) -> Path:
    """A virtual environment that the Makefile made."""
    folder: Path = request.param
    if not (folder / "bin" / "python").exists():
        pytest.skip(f"no {folder.name} here: make {folder.name}/done, with a python3.13 for that one")
    return folder


def test_the_readmes_commands_and_its_python_run(environment: Path, tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "my-bundle")
    ray = ("generate my-bundle --n 64 --shard-size 16 --out of-ray --ray",) if environment == OLDEST else ()
    for command in ("--version", "--help", "generate --help", *COMMANDS, *ray):
        done = run([environment / "bin" / "tarflow", *command.split()], tmp_path)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), f"{command}\n{done.stdout}{done.stderr}"
    if ray:
        shards = [(tmp_path / folder / "shard-000003.npy").read_bytes() for folder in ("samples", "of-ray")]
        assert shards[0] == shards[1]
    (snippet,) = re.findall(r"```python\n(import numpy.*?)```", README, re.S)
    done = run([environment / "bin" / "python", "-W", "error", "-c", snippet + "print(images.shape)"], tmp_path)
    assert done.stdout == "(64, 1, 8, 8)\n", done.stderr


def test_a_server_answers_and_stops(environment: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [environment / "bin" / "tarflow", "serve", DEMO, "--port", "0"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on "), (tmp_path / "log").read_text()
        address = line.split()[2]
        assert urlopen(f"{address}/v1/samples/7/3.png?label=3&guidance=1").read().startswith(b"\x89PNG")
        assert json.load(urlopen(f"{address}/v2/models/sample"))["name"] == "sample"
        assert b"tarflow_samples_total" in urlopen(f"{address}/metrics").read()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.communicate()


def test_what_is_run_here_is_what_the_readme_names() -> None:
    named = set(re.findall(r"^\| `tarflow ([a-z-]+)`", README, re.M))
    assert named == {command.split()[0] for command in COMMANDS} | ELSEWHERE | {"serve"}


@pytest.mark.parametrize("environment", [OLDEST], ids=["oldest"], indirect=True)
def test_the_oldest_environment_has_the_oldest_packages(environment: Path) -> None:
    asked = lowest_bounds("serve", "ray")
    assert {"numpy", "onnxruntime", "typer", "fastapi", "ray"} <= asked.keys()
    code = "import sys; from importlib.metadata import version as v; print(*map(v, sys.argv[1:]))"
    found = run([environment / "bin" / "python", "-c", code, *asked], environment).stdout.split()
    assert [Version(installed) for installed in found] == [Version(bound) for bound in asked.values()]


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

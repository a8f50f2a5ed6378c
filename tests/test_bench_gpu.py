"""The bench of a GPU goes its whole way on a CPU, so that it is ready where there is one."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.gpu.__main__ import main
from bench.gpu.checkout import ROOT
from bench.gpu.checks.one import CHECKS
from bench.gpu.device import compete
from bench.gpu.field import Choice, Rivals, Task, stretches
from bench.gpu.section import NOT_RUN
from tarflow import checkpoint
from tarflow.rivals import grown, published_steps
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.errors import MachineError
from tarflow.runtime.flow import Flow

from .conftest import DEMO, python


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Steps this small are slower on several threads, and far slower on cores that others use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_whole_bench_runs_on_a_cpu_and_writes_its_section_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny").symlink_to(DEMO)  # a bundle that is there is not exported again
    results = tmp_path / "results.md"
    results.write_text(f"# On a GPU\n\n{NOT_RUN}\n\n## another on a GPU\n\nkept\n\n## tiny on a CPU\n\nold\n")
    where = ["--bundles", str(tmp_path), "--results", str(results)]
    main(["--device", "cpu", "--quick", "--batch", "1", "--stretch", "3", *where])
    text = results.read_text()
    assert "## another on a GPU\n\nkept" in text
    assert "old" not in text
    assert NOT_RUN not in text
    assert text.count("## tiny on a CPU") == 1
    assert f"torch {torch.__version__}" in text
    assert "did not run" not in text
    cells = [
        [cell.strip() for cell in line.split("|")] for line in text.splitlines() if re.match(r"\| 1 \| [01] ", line)
    ]
    names = [row[3] for row in cells]
    assert names[: len(names) // 2] == names[len(names) // 2 :]
    assert [name.split(", ")[-1] for name in names[2:6]] == ["serial", "exact", "fast", "floor"]
    errors = {(row[2], row[3].split(", ")[-1]): float(row[8]) for row in cells if row[3] != "floor" and row[8]}
    for guidance in "01":
        assert errors[guidance, "serial"] < 1e-4
        assert errors[guidance, "exact"] < 1e-3
        assert errors[guidance, "fp16"] < 0.1
    assert all(float(row[4].lstrip("~")) > 0 for row in cells)
    assert text.split("## tiny")[1].strip() in capsys.readouterr().out


def test_stretches_of_the_published_method_are_its_own_steps() -> None:
    assert stretches(1023, 32) == [range(32), range(495, 527), range(991, 1023)]
    assert stretches(90, 32) == [range(90)]
    model, noise = checkpoint.load(DEMO), torch.from_numpy(Flow.open(DEMO).noise(0, range(2)))
    block, labels = model.blocks[1], torch.tensor([3, 4])
    whole, caches = block.order(noise).clone(), grown(block, 2, 0, noise)
    published_steps(block, whole, labels, 1.0, caches, range(15))
    assert [len(layer) for branch in caches for layer in branch] == [15] * 2 * model.config.layers
    filled = grown(block, 2, 15, noise)
    assert [[key.shape for key, _ in layer] for layer in filled[0]] == [[key.shape for key, _ in caches[0][0]]] * 3
    parts, caches = block.order(noise).clone(), grown(block, 2, 0, noise)
    for places in (range(7), range(7, 15)):
        published_steps(block, parts, labels, 1.0, caches, places)
    assert torch.equal(parts, whole)


def test_one_that_cannot_run_is_noted_and_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rivals = Rivals(checkpoint.load(DEMO), Choice("cpu", compiled=False, stretch=1))

    def refuse(task: Task) -> float:
        raise MachineError("the card is too small\nfor this")

    usual = Rivals.published
    monkeypatch.setattr(Rivals, "published", lambda self: replace(usual(self), seconds=refuse))
    task = Task(Flow.open(DEMO).noise(0, range(1)), np.array([1]), 0.0)
    rows, notes = compete(Bundle.open(DEMO), rivals, task, 1, lambda stage: None)
    assert notes[0] == "PyTorch as published, bf16 did not run: the card is too small"
    assert [row.over_published for row in rows] == [None] * len(rows)
    assert len(rows) == 4


def test_without_a_gpu_or_wheels_it_says_so(tmp_path: Path) -> None:
    for arguments, message in (
        (["--wheels", str(tmp_path)], "holds no wheels; expected onnxruntime_gpu"),
        (["--models", "nothing"], "expected some of 2-768-8-8, 4-1024-8-8"),
        ([], "finds no CUDA GPU"),
    ):
        if not arguments and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit, match=re.escape(message)):
            main(arguments)


def test_wheels_come_before_what_is_installed(tmp_path: Path) -> None:
    name = "onnxruntime_gpu-9.0.dist-info"
    files = {
        "onnxruntime/__init__.py": "raise SystemExit('the wheel was imported')",
        f"{name}/METADATA": "Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 9.0\n",
        f"{name}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}/RECORD": "",
    }
    with zipfile.ZipFile(tmp_path / "onnxruntime_gpu-9.0-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
    done = python("-m", "bench.gpu", "--device", "cpu", "--quick", "--wheels", tmp_path, timeout=300, cwd=ROOT)
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (1, "the wheel was imported")


def test_all_checks_of_a_device_hold_on_a_cpu(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    done = python("-m", "bench.gpu.checks", results, "--provider", "cpu", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == results.read_text()
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["check"] for line in found] == [check.name for check in CHECKS if check.on_cpu]
    assert all(line["ok"] and line["bundle"] == "demo" and line["precision"] == "fp32" for line in found)
    parity = next(line["found"] for line in found if line["check"] == "parity")
    assert len(parity) == 9  # three modes, guided and not; z, log_det, denoised


def test_a_check_that_fails_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    asked = ["-m", "bench.gpu.checks", tmp_path / "results", "--provider", "cpu", "--only", "cpp", "growth"]
    done = python(*asked, cwd=ROOT, env=os.environ | {"TARFLOW_LIBRARY": "/nowhere/libtarflow.so"})
    failed, held = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert (failed["check"], failed["ok"], failed["failed"]) == ("cpp", False, "exit code 1")
    assert "/nowhere/libtarflow.so" in failed["said"]
    assert (held["check"], held["ok"]) == ("growth", True)

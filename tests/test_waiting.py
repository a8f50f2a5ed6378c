"""Whoever waits is told how far it is, on stderr and where there is no terminal too; and may ask for silence."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tarflow.cli import progress
from tarflow.runtime.flow import Flow
from tarflow.runtime.request import Request
from tarflow.runtime.samples import Stage, Watch

from .conftest import DEMO, Cli

COMMANDS = {
    "generate demo --n 2": "sampling",
    "generate demo --n 2 --out shards": "samples",
    "likelihood demo in.npy": "encoding",
    "denoise demo in.npy --save out.npy": "denoising",
    "classify demo in.npy --classes 0-1": "classifying",
    "evaluate demo --n 70 --resamples 2": "resampling 2 times",
    "bench demo --batch 1 --guidance 0 --repeats 1": "measuring",
    "calibrate demo --batch 1 --samples 1": "calibrating",
}


@pytest.fixture
def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the demo and an image, in which ten seconds are over at once."""
    shutil.copytree(DEMO, tmp_path / "demo")
    np.save(tmp_path / "in.npy", np.zeros((1, 1, 8, 8), np.uint8))
    monkeypatch.setattr(progress, "QUIET_FOR", -1.0)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_long_command_says_how_far_it_is_and_is_silent_if_asked(command: str, impatient: None, tarflow: Cli) -> None:
    done = tarflow(*command.split())
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if re.match(r"\[ +\d+\.\d s\] ", line)]
    assert any(COMMANDS[command] in line for line in lines), done.stderr
    shutil.rmtree("shards", ignore_errors=True)
    quiet = tarflow(*command.split(), "--quiet")
    assert quiet.returncode == 0, quiet.stderr
    assert not re.search(r"^\[ +\d", quiet.stderr, re.MULTILINE), quiet.stderr


def test_a_short_command_says_nothing(tarflow: Cli) -> None:
    assert tarflow("generate", DEMO, "--n", 2, "--labels", 1).stderr == ""


def test_calibrating_is_counted(impatient: None, tarflow: Cli) -> None:
    lines = tarflow("calibrate", "demo", "--batch", "1", "--samples", "1").stderr.splitlines()
    assert "calibrating: 0 %, 0 of 24: batch 1, block 3, serially" in lines[0]  # plain and guided, 4 blocks, 3 ways
    assert "96 %, 23 of 24: batch 1, guided, block 0, fast, about 0:" in lines[-1]


def test_the_bar_covers_certifying_and_denoising(flow: Flow) -> None:
    seen: list[tuple[float, str]] = []
    steps = progress.Steps(lambda share, now: seen.append((share, now)), staged=True)
    request = Request(20, certify=True, batch_size=8).resolved(flow.config)
    flow.draw(request, watch=Watch(steps.step, stage=steps.stage))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    last = [(share, now) for share, now in seen if now in ("certifying", "denoising")][-4:]
    assert [now for _, now in last] == ["certifying", "certifying", "denoising", "denoising"]
    assert last[0][0] < 0.98, "all is decoded, and not all is done"
    assert max(share for share, now in seen if now == "block 0") < 0.98


def test_stages_are_told_when_they_begin_and_end(flow: Flow) -> None:
    seen: list[Stage] = []
    request = Request(3, certify=True, batch_size=2).resolved(flow.config)
    flow.draw(request, watch=Watch(stage=seen.append))
    both = [("certify", 0), ("certify", 1), ("denoise", 1), ("denoise", 2)]
    assert [(stage.name, stage.done) for stage in seen] == both + [(name, done + 2) for name, done in both]
    assert {stage.total for stage in seen} == {4}

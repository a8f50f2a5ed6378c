"""Benchmarks compare like with like: every contender draws the same samples."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tarflow import checkpoint
from tarflow.rivals import Compiled, published
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.measure import of_flow, race

from .conftest import DEMO, Cli, Exported, largest, refused, report_of, said


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_rivals_draw_the_same_samples(monkeypatch: pytest.MonkeyPatch, guidance: float) -> None:
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)  # its result, not its minute of compiling
    flow, model = Flow.open(DEMO), checkpoint.load(DEMO)
    noise, labels = flow.noise(0, range(6)), np.array([1, 5, 9, 0, 2, 3])
    expected = flow.sample(noise=noise, labels=labels, guidance=Guidance(guidance), denoise=False)
    for decode in (lambda *inputs: published(model, *inputs), Compiled(model)):
        for rows in (slice(0, 3), slice(3, 6)):  # what was compiled or recorded for the first serves the second
            found = decode(torch.from_numpy(noise[rows]), torch.from_numpy(labels[rows]), guidance)
            assert largest(model.unpatchify(found).numpy(), expected[rows]) < 1e-4


def test_a_race_tells_time_error_and_certificate() -> None:
    flow = Flow.open(DEMO)
    serial, exact, fast = race([of_flow(flow, m, m) for m in ("serial", "exact", "fast")], flow, 2, Guidance(1.0), 2)
    assert (serial.faster_than(serial), serial.error, serial.passes) == (1.0, 0.0, (15,) * 4)
    assert (exact.error < 1e-4, exact.certificate < 1e-3) == (True, True), exact
    assert (fast.error < 0.02, fast.certificate < 0.1) == (True, True), fast
    assert sum(fast.passes) <= sum(exact.passes)
    assert (serial.tolerance, exact.tolerance, fast.tolerance) == (None, 1e-5, 1e-3)  # beside what came of them
    assert all(result.seconds > 0 for result in (serial, exact, fast))


def test_samples_from_anywhere_are_certified() -> None:
    flow = Flow.open(DEMO)
    samples = flow.sample(4, labels=[0, 1, 2, 3], guidance=Guidance(1.0), denoise=False, certify=True)
    certificate = flow.certify(samples, flow.noise(0, range(4)), [0, 1, 2, 3], Guidance(1.0))
    np.testing.assert_array_equal(certificate, report_of(samples).certificate)
    assert flow.certify(samples, flow.noise(1, range(4)), [0, 1, 2, 3]).min() > 1


def test_bundles_are_compared_on_the_command_line(cli: Cli, bundle: Exported, tmp_path: Path) -> None:
    twin = shutil.copytree(DEMO, tmp_path / "twin")
    rows = said(cli("bench", DEMO, "--against", twin, "--batch", 2, "--repeats", 1, "--json"))["rows"]
    names = ["serial", "exact", "fast", "twin serial", "twin fast"]
    assert [row["name"] for row in rows] == names * 2, "unguided and guided"
    assert all(row["rms"] < 0.05 for row in rows)
    assert all(row["rms"] == 0 for row in rows if row["name"] == "twin serial")
    refused(cli("bench", DEMO, "--against", bundle("cond")), 2, "holds another model")

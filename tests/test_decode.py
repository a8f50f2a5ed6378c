"""Parallel decoding: the same samples as serial decoding, whatever the window, and whoever shares the batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarflow.cli.messages import spell
from tarflow.runtime.backend import Array, Branches
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.calibrate import _Outcome, _Work, calibrate
from tarflow.runtime.chain import Ways
from tarflow.runtime.decode import Parallel, solve
from tarflow.runtime.errors import BundleError, InputError
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.ort.backend import OrtBackend
from tarflow.runtime.ort.stepwise import StepwiseDecoding
from tarflow.runtime.plan import Plan, Row, find_plan

from .conftest import DEMO, Cli, Exported, largest, refused, report_of, said

GUIDANCES = [Guidance(), Guidance(1.5), Guidance(1.0, "a", annealed=True), Guidance(0.7, "b", False, 0.5)]
LABELS = np.array([3, 7, -1, 0, 9])


@pytest.fixture(scope="module")
def flow() -> Flow:
    return Flow.open(DEMO, "cpu")


def whole(how: Parallel, flow: Flow, z: Array, branches: Branches) -> tuple[Array, int]:
    """All blocks; the patches, and the passes they took."""
    ways = Ways("", (how,) * flow.config.blocks)
    x, passes = flow.chain.decode(z, branches, ways, lambda block, position: None)
    return x, sum(passes)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("window", [2, 4, 7, 15, 100])
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_exact_decoding_is_serial_decoding(flow: Flow, batch: int, window: int, guidance: Guidance) -> None:
    z = flow.noise(0, range(batch))
    branches = guidance.branches(flow.config.tokens, LABELS[:batch])
    expected, steps = whole(Parallel(1, 0.0, 15), flow, z, branches)
    assert steps == 60
    found, passes = whole(Parallel(window, 1e-5, 15), flow, z, branches)
    assert largest(found, expected) < 1e-4
    assert passes < 60 if batch == 1 and window > 2 else passes >= 8
    loose, fewer = whole(Parallel(window, 1e-3, 15), flow, z, branches)
    assert largest(loose, expected) < 0.02
    assert fewer <= passes


@pytest.mark.parametrize("resident", [False, True])
def test_every_patch_fulfils_its_equation(flow: Flow, resident: bool) -> None:
    """One more pass over the whole sequence, with keys and values computed anew, changes nothing beyond the tolerance:
    what was stored while solving belonged to the final patches.
    """
    backend = OrtBackend(flow.bundle, resident=resident)
    for batch in (1, 3):
        branches = Guidance(1.0).branches(flow.config.tokens, LABELS[:batch])
        z = flow.noise(4, range(batch))
        for window in (4, 15):
            solved = backend.decoding(2, z, branches)
            x, _ = solve(solved, flow.config.tokens, Parallel(window, 1e-3, 100))
            fresh = backend.decoding(2, z, branches)
            fresh.guess(x)
            for position in range(15):  # keys and values of the one are those of the other
                expected = fresh.evaluate(position, 1)[:, 0].copy()
                assert largest(expected, fresh.x[:, position + 1]) <= 1.01e-3
                assert largest(solved.evaluate(position, 1)[:, 0], expected) <= 1e-5


def test_a_sample_does_not_depend_on_its_batch_mates(flow: Flow) -> None:
    """To the bit: the same image beside easy mates, hard ones, and one that overflows."""
    z = flow.noise(7, range(4))
    branches = Guidance(1.0).branches(flow.config.tokens, LABELS[:4])
    how = Parallel(5, 1e-3, 12, steady=True)
    expected, _ = whole(how, flow, z, branches)
    for scale in (0.0, 3.0, 1e4):
        mates = z.copy()
        mates[1:] *= scale
        with np.errstate(all="ignore"):
            found, _ = whole(how, flow, mates, branches)
            left, _ = whole(replace(how, steady=False), flow, mates, branches)
        assert np.array_equal(found[0], expected[0]), scale
        assert largest(left[0], expected[0]) < 1e-5, scale  # rounding: the batch changes its shape


def test_images_that_are_done_leave_the_batch(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mates of zeros settle in fewer passes; from then on, fewer rows are computed, and the same patches found."""
    z = flow.noise(7, range(4))
    z[1:] = 0
    branches = Guidance(1.0).branches(flow.config.tokens, LABELS[:4])
    expected, _ = whole(Parallel(15, 1e-5, 15, steady=True), flow, z, branches)
    computed: list[int] = []
    run = flow.backend.sessions.run  # type: ignore[attr-defined]

    def counted(block: int, kind: str, feeds: dict[str, Array]) -> list[Array]:
        computed.append(len(feeds["x"]) // 15)
        found: list[Array] = run(block, kind, feeds)
        return found

    monkeypatch.setattr(flow.backend.sessions, "run", counted)  # type: ignore[attr-defined]
    found, _ = whole(Parallel(15, 1e-5, 15), flow, z, branches)
    assert computed
    assert max(computed) <= 2
    assert largest(found, expected) < 1e-5


def test_a_limit_of_passes_ends_in_serial_decoding(flow: Flow) -> None:
    branches = Guidance().branches(flow.config.tokens, LABELS)
    z = flow.noise(1, range(5))
    expected, _ = whole(Parallel(1, 0.0, 1), flow, z, branches)
    for batch in (1, 5):
        few = Guidance().branches(flow.config.tokens, LABELS[:batch])
        found, passes = whole(Parallel(8, 1e-5, 1), flow, z[:batch], few)
        assert largest(found, expected[:batch]) < 1e-5
        assert 60 <= passes <= 76


def test_sampling_says_how_it_decoded(flow: Flow) -> None:
    how: dict[str, Any] = {"labels": [1, 2, 3], "seed": 2}
    serial = flow.sample(3, **how)
    assert (report_of(serial).decoding, report_of(serial).passes) == ("serial", (15, 15, 15, 15))
    seen: list[int] = []
    fast = flow.sample(3, **how, decode="fast", progress=lambda p: seen.append(p.done), certify=True)
    report = report_of(fast)
    assert report.decoding == "parallel to 0.001"
    assert sum(report.passes) < 60
    assert seen == list(range(1, 61))
    assert report.certificate is not None
    assert report.certificate.max() < 0.1
    assert largest(fast, serial) < 0.02
    assert "0.001" in report.level
    assert largest(flow.sample(3, **how, decode="exact"), serial) < 1e-4
    assert report_of(flow.sample(3, **how, tolerance=0.1)).decoding == "parallel to 0.1"


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(copy: Exported) -> Path:
    return copy("demo")


def a_plan(flow: Flow, windows: tuple[int, ...]) -> Plan:
    times = (0.01,) * 4
    rows = tuple(Row(n, windows, (6,) * 4, times, times, (0.0,) * 4) for n in (1, 8))
    return Plan(flow.bundle.hash, flow.backend.machine, 24, {"exact": rows, "fast": rows})


def test_sampling_follows_the_plan(folder: Path) -> None:
    flow = Flow.open(folder, "cpu")
    plan = a_plan(flow, (4, 1, 8, 15))
    path = plan.write(flow.bundle)
    assert path.parent == folder / "plans"
    flow = Flow.open(folder, "cpu")
    assert flow.plan == plan
    assert flow.bundle.hash == Bundle.open(DEMO).hash  # a plan is no part of the bundle's identity
    report = report_of(flow.sample(1, labels=3))
    assert report.decoding == "parallel to 1e-05, as calibrated"
    assert report.passes[1] == 15
    assert max(report.passes[0], *report.passes[2:]) < 15
    for arguments in ({"n": 9}, {"n": 5, "labels": 3, "guidance": Guidance(1.0)}):  # more rows than were measured
        report = report_of(flow.sample(**arguments))
        assert (report.decoding, report.passes) == ("serially, as calibrated", (15,) * 4)
    assert report_of(flow.sample(1, reproducible=True)).decoding == "serial"


def test_guided_samples_follow_a_row_of_their_own() -> None:
    times = (0.01,) * 2
    rows = [Row(n, (w, 1), (2, 3), times, times, times, b) for n, w, b in ((1, 2, 1), (2, 3, 2), (8, 4, 1))]
    plan = Plan("", "", 1, {"fast": tuple(rows)})
    cases = {(1, 1): 2, (1, 2): 3, (2, 1): 4, (2, 2): 4, (4, 2): 4, (8, 1): 4}
    for (images, branches), window in cases.items():
        assert plan.ways("fast", images, branches, 0.1) == (Parallel(window, 0.1, 4), None), (images, branches)
    assert plan.ways("fast", 5, 2, 0.1) is None


def test_a_batch_in_lanes_is_the_batch(folder: Path) -> None:
    flow = Flow.open(folder, "cpu", threads=3)
    rows = (replace(a_plan(flow, (1,) * 4).modes["exact"][1], lanes=3),)
    Plan(flow.bundle.hash, flow.backend.machine, 24, dict.fromkeys(("exact", "fast"), rows)).write(flow.bundle)
    planned = Flow.open(folder, "cpu", threads=3)
    for n, labels in ((2, [3, -1]), (7, np.arange(7)), (20, np.arange(20) % 10)):  # the last: more than was measured
        how: dict[str, Any] = {"labels": labels, "guidance": Guidance(1.0), "seed": 4, "certify": True}
        found = planned.sample(n, **how)
        assert largest(found, flow.sample(n, **how, decode="serial")) < 1e-5
        report = report_of(found)
        assert (report.decoding, report.passes) == ("serially in 3 lanes, as calibrated", (15,) * 4)
    assert report_of(planned.sample(1)).decoding == "serially, as calibrated"
    same = planned.sample(7, labels=1, reproducible=True)
    assert np.array_equal(same, flow.sample(7, labels=1, reproducible=True))


def test_lanes_end_together_when_one_is_stopped_or_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = Flow.open(folder, "cpu", threads=2).lanes
    assert lanes is not None
    z = np.zeros((4, 16, 4), np.float32)
    branches = Guidance().branches(16, LABELS[:4])

    with pytest.raises(ValueError, match="not in list"):
        lanes.solve(0, z, branches, [0, 1, 2].remove)
    assert lanes.solve(0, z, branches).shape == z.shape, "it goes on"
    steps = StepwiseDecoding.step
    monkeypatch.setattr(
        StepwiseDecoding, "step", lambda self, position, window=1: steps(self, position + 99 * (position == 5), window)
    )
    with pytest.raises(IndexError):
        lanes.solve(0, z, branches)
    assert Flow.open(folder, "cpu", threads=1).lanes is None
    assert Flow.open(folder, "cpu", memory="least").lanes is None
    assert Flow.open(folder, "cpu", memory=1 << 40).lanes is None, "which it would exceed unseen"


def test_a_plan_of_another_machine_or_bundle_is_not_followed(folder: Path) -> None:
    flow = Flow.open(folder, "cpu")
    plan = a_plan(flow, (4, 4, 4, 4))
    replace(plan, bundle="0" * 64).write(flow.bundle)
    assert find_plan(flow.bundle, flow.backend.machine) is None
    other = replace(plan, machine="another")
    other.write(flow.bundle)
    assert find_plan(flow.bundle, flow.backend.machine) is None
    assert find_plan(flow.bundle, "another") == other


DAMAGED = ["", "[]", "{}", '{"format": "tarflow-plan", "schema": 2}']
DAMAGED_ROWS = [{"rows": 0}, {"windows": [4]}, {"seconds": [float("nan")] * 4}]


@pytest.mark.parametrize("damage", [*DAMAGED, *DAMAGED_ROWS], ids=str)
def test_a_damaged_plan_is_refused_with_the_cure(folder: Path, damage: str | dict[str, Any]) -> None:
    flow = Flow.open(folder, "cpu")
    path = a_plan(flow, (4, 4, 4, 4)).write(flow.bundle)
    if isinstance(damage, dict):
        document = json.loads(path.read_text())
        document["modes"]["fast"][0] |= damage
        damage = json.dumps(document)
    path.write_text(damage)
    with pytest.raises(BundleError, match=r"measure again what is fastest here") as refusal:
        Flow.open(folder, "cpu")
    assert spell(refusal.value).endswith(f"tarflow calibrate {folder}")


@pytest.mark.parametrize(
    ("pace", "lanes", "chosen"),
    [
        ({4: 0.5, 8: 0.4, 15: 0.6}, None, (8, 1)),  # seconds of a window, where serial decoding takes one
        ({4: 0.96, 8: 1.2, 15: 2.0}, None, (1, 1)),  # a gain below 5 % is noise
        ({4: 0.5, 8: 0.4, 15: 0.6}, 0.3, (1, 3)),
        ({4: 0.5, 8: 0.4, 15: 0.6}, 0.39, (8, 1)),
    ],
)
def test_calibration_chooses_by_the_times_it_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pace: dict[int, float], lanes: float | None, chosen: tuple[int, int]
) -> None:
    solved = _Work.time

    def timed(work: _Work, number: int, how: Parallel | None) -> tuple[float, int, Array]:
        _, passes, x = solved(work, number, how)
        return 1.0 if how is None else pace[how.window], passes, x

    monkeypatch.setattr(_Work, "time", timed)
    monkeypatch.setattr(_Work, "_pass_seconds", lambda work, window: 0.01)
    monkeypatch.setattr(_Work, "lanes", lambda work: lanes and _Outcome(1, 15, lanes, 1.0, 0.0))
    flow = Flow.open(folder, "cpu", threads=3)
    plan = calibrate(flow, batches=(4,), samples=5)
    for mode in ("exact", "fast"):
        (row,) = plan.modes[mode]
        assert (row.rows, row.branches, row.lanes) == (4, 1, chosen[1])
        assert row.windows == (chosen[0],) * 4
        assert max(row.errors) <= (1e-4 if mode == "exact" else 0.01)


def test_a_measured_plan_is_kept_and_followed(folder: Path, cli: Cli) -> None:
    with pytest.raises(InputError, match="1 or more"):
        calibrate(Flow.open(folder, "cpu"), batches=(0,))
    document = said(cli("calibrate", folder, "--batch", "2,1", "--samples", 2, "--json"))
    assert Path(document["plan"]).is_file()
    assert [(row["rows"], row["branches"]) for row in document["modes"]["fast"]] == [(1, 1), (2, 2), (2, 1)]
    drawn = cli("generate", folder, "--n", 1, "--decode", "fast", "--json", "--save", folder.parent / "x.npy")
    assert "calibrated" in said(drawn)["decoding"]
    refused(cli("calibrate", folder, "--batch", "0"), 2, "--batch is '0'")

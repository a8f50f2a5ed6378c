"""One rule for a round trip that is suspect, through every door; and what a command says of samples that are broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tarflow.runtime.backend import Array
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.chain import Chain
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.precision import PRECISIONS
from tarflow.runtime.samples import suspect_limit, suspects

from .conftest import DEMO, Cli, report_of, said
from .serving import calling

TINY = 1e-12  # no round trip of floats keeps this


@pytest.fixture
def strict_card(tmp_path: Path) -> Path:
    """The demo, with a parity card that allows no error to speak of."""
    return limited(tmp_path / "strict", TINY)


def limited(folder: Path, certificate: float) -> Path:
    """The demo, with another limit of certificates on its card."""
    shutil.copytree(DEMO, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parity"]["tolerance"]["certificate"] = certificate
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def spoil(monkeypatch: pytest.MonkeyPatch, *rows: int) -> None:
    """Let some rows overflow whenever they are encoded again."""
    honest: Callable[[Chain, Array, Array], Array] = Chain.round_trip

    def round_trip(chain: Chain, found: Array, z: Array) -> Array:
        error = honest(chain, found, z)
        error[list(rows)] = np.nan
        return error

    monkeypatch.setattr(Chain, "round_trip", round_trip)


def test_the_limit_is_the_card_s_or_ten_times_the_tolerance() -> None:
    assert (suspect_limit(1e-2, 0.0), suspect_limit(1e-2, 1e-3), suspect_limit(1e-2, 0.5)) == (1e-2, 1e-2, 5.0)
    errors = np.array([0.0, 0.01, 0.02, np.inf, np.nan], np.float32)
    assert suspects(errors, np.float32(0.01).item(), first=7) == (9, 10, 11)
    assert suspects(None, 0.01) == ()


def test_the_limit_is_that_of_the_precision_drawn_in(tmp_path: Path, flow: Flow) -> None:
    own = Bundle.open(limited(tmp_path / "own", 0.25)).manifest
    assert (own.certificate_limit("fp32"), own.certificate_limit("fp16")) == (0.25, 0.5)
    assert report_of(flow.sample(1)).suspect_above == PRECISIONS["fp32"].tolerance.certificate
    loose = flow.sample(1, decode="fast", tolerance=0.1)
    assert report_of(loose).suspect_above == 1.0


def test_generate_names_suspects_and_only_strictly_they_are_a_failure(strict_card: Path, tarflow: Cli) -> None:
    how = "generate", strict_card, "--n", 3, "--labels", 1, "--first-sample", 5, "--save", "x.npy"
    done = tarflow(*how, "--json")
    found = said(done)
    assert (found["suspects"], found["suspect_above"], found["uncertified"]) == ([5, 6, 7], TINY, [])
    assert "tarflow: suspect: 3 of 3 samples (5, 6, 7) have a round-trip error above 1e-12" in done.stderr
    done = tarflow(*how, "--strict")
    assert done.returncode == 1
    assert "tarflow: check failed: 3 of 3 samples (5, 6, 7) have a round-trip error above 1e-12" in done.stderr
    assert tarflow(*how, "--strict", "--no-certify").returncode == 0


def test_shards_remember_their_suspects(strict_card: Path, tarflow: Cli, tmp_path: Path) -> None:
    how = "generate", strict_card, "--n", 20, "--labels", 1, "--shard-size", 16, "--out", "drawn"
    done = tarflow(*how)
    assert (done.returncode, "20 of 20 samples (0, 1, 2," in done.stderr) == (0, True)
    again = tarflow(*how, "--strict")  # nothing is drawn: the records say it
    assert (again.returncode, "check failed: 20 of 20" in again.stderr) == (1, True)
    index = json.loads((tmp_path / "drawn" / "index.json").read_text())
    assert (index["suspects"], index["suspect_above"]) == (list(range(20)), TINY)
    for record in (tmp_path / "drawn" / "records").iterdir():  # as they were written before
        old = json.loads(record.read_text())
        record.write_text(json.dumps({name: old[name] for name in old if not name.startswith("suspect")}))
    assert tarflow(*how, "--strict").returncode == 0


def test_a_certificate_that_is_not_finite_fails_the_check(tarflow: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    how = "generate", DEMO, "--n", 3, "--labels", 1, "--first-sample", 5, "--save", "x.npy"
    assert tarflow(*how).returncode == 0
    spoil(monkeypatch, 1)
    done = tarflow(*how)
    assert done.returncode == 1
    assert "check failed: 1 of 3 samples (6) are finite, but overflow when they are encoded again" in done.stderr
    assert "nan" not in done.stdout
    found = json.loads(tarflow(*how, "--json").stdout)
    assert found["uncertified"] == [6]
    assert found["certificate"]["per_sample"][1] is None
    assert 0 < found["certificate"]["max"] < 1e-3
    spoil(monkeypatch, 0, 1, 2)
    assert "no sample has a finite round-trip error" in tarflow(*how).stdout


def test_a_report_tells_of_suspects_and_ends_as_generate_does(
    strict_card: Path, tarflow: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = "report", strict_card, "--n", 2, "-o", "page.html"
    done = tarflow(*how, "--json")
    assert (said(done)["suspects"], "suspect: 2 of 2 samples (0, 1)" in done.stderr) == ([0, 1], True)
    page = (tmp_path / "page.html").read_text()
    assert "Above 1e-12 a round trip is suspect, which is that of samples 0, 1." in page
    assert tarflow(*how, "--strict").returncode == 1
    spoil(monkeypatch, 0)
    assert tarflow(*how).returncode == 1


@pytest.mark.anyio
async def test_the_server_names_suspects_by_the_same_rule(strict_card: Path) -> None:
    async with calling(Flow.open(strict_card, threads=1)) as (client, _):
        assert (await client.get("/v1/model")).json()["certificate_limit"] == TINY
        body = {"n": 2, "seed": 3, "first_sample": 4, "certify": True, "format": "npy"}
        answer = await client.post("/v1/samples", json=body)
        assert answer.headers["X-Tarflow-Suspects"] == "4-5"
        assert "X-Tarflow-Suspects" not in (await client.post("/v1/samples", json=body | {"certify": False})).headers
        asked = {"parameters": {"n": 2, "first_sample": 4}, "inputs": [], "outputs": [{"name": "certificate"}]}
        answer = await client.post("/v2/models/sample/infer", json=asked)
        assert answer.json()["parameters"]["suspects"] == "4-5"
        events = (await client.get("/v1/samples/stream?n=2&first_sample=4")).text
        done = json.loads(events.split("event: done\ndata: ")[1].split("\n")[0])
        assert (done["suspects"], done["suspect_above"]) == ([4, 5], TINY)


def test_what_was_drawn_again_and_what_was_not_are_told_apart(tarflow: Cli) -> None:
    how = "generate", DEMO, "--n", 24, "--labels", "0-9", "--guidance", 50, "--redraw-nonfinite", "--no-certify"
    labels = np.arange(24) % 10
    report = report_of(Flow.open(DEMO).sample(24, labels=labels, guidance=Guidance(50.0), redraw_nonfinite=True))
    never = sorted(set(report.nonfinite) - set(report.redrawn))
    assert never, "guidance of 50 must let samples overflow when denoised alone, or this test shows nothing"
    Path("samples.png").touch()
    error = tarflow(*how).stderr
    assert f"{len(never)} overflow not when drawn but when denoised, and were not drawn again" in error
    stayed = len(set(report.nonfinite) & set(report.redrawn))
    assert (f"{stayed} stayed so when drawn again" in error) == bool(stayed)

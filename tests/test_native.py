"""The native engine: one seed, one image, to the bit, however it is asked and wherever it runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.elementary import errors
from tarflow.runtime.bundle import MANIFEST, Bundle
from tarflow.runtime.errors import BundleError, InputError, MachineError
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.native import library
from tarflow.runtime.native.choice import on_cpus, vouched
from tarflow.runtime.opening import Opening

from .conftest import DEMO, Exported, python

HASHES = {  # of 64 guided samples of the demo, before denoising: on any processor
    "fp32": "a879644a0b4f7130",
    "int16": "031eab069c9803c6",
    "int8": "c74c5cf47ab67274",
}
PRECISIONS = (*HASHES, "bf16")
HOW: dict[str, Any] = {"guidance": Guidance(1.0), "denoise": False}
LABELS = np.arange(64) % 10


def digest(samples: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.asarray(samples).tobytes()).hexdigest()[:16]


def opened(precision: str = "fp32", threads: int = 2) -> Flow:
    return Flow.open(DEMO, Opening("native", threads, precision=precision))


@pytest.fixture(scope="module")
def whole() -> dict[str, np.ndarray[Any, Any]]:
    """64 samples in each precision."""
    return {precision: np.asarray(opened(precision).sample(64, labels=LABELS, **HOW)) for precision in PRECISIONS}


def test_sixty_four_samples_are_those_of_every_other_machine(whole: dict[str, np.ndarray[Any, Any]]) -> None:
    assert {precision: digest(whole[precision]) for precision in HASHES} == HASHES


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("threads", [1, 3])
def test_bits_do_not_depend_on_batch_place_or_threads(
    whole: dict[str, np.ndarray[Any, Any]], precision: str, threads: int
) -> None:
    flow = opened(precision, threads)
    for first, n, size in ((0, 8, 1), (5, 6, 3), (20, 20, 8), (31, 33, 33)):
        labels = LABELS[first : first + n]
        part = flow.sample(n, labels=labels, first_sample=first, batch_size=size, **HOW)
        assert np.array_equal(part, whole[precision][first : first + n])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n", [1, 5])
def test_windows_at_tolerance_0_have_the_bits_of_serial_decoding(
    whole: dict[str, np.ndarray[Any, Any]], precision: str, n: int
) -> None:
    found = opened(precision).sample(n, labels=LABELS[:n], decode="exact", tolerance=0.0, **HOW)
    assert np.array_equal(found, whole[precision][:n])


DRAW = f"""
import hashlib, json, sys, numpy as np
from tarflow.runtime.flow import Flow, Guidance
for precision, n in json.loads(sys.argv[1]):
    flow = Flow.open({str(DEMO)!r}, provider="native", precision=precision)
    samples = flow.sample(n, labels=np.arange(64)[:n] % 10, guidance=Guidance(1.0), denoise=False)
    print(hashlib.sha256(np.asarray(samples).tobytes()).hexdigest()[:16], flow.backend.description)
"""


def instruction_sets() -> list[str]:
    """Those of this processor, as the refusal of another names them."""
    done = python("-m", "tarflow.cli.main", "generate", "--provider", "native", env=os.environ | {"TARFLOW_ISA": "mmx"})
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    known = re.search(r"TARFLOW_ISA is 'mmx'; this machine has (.*)", done.stderr)
    assert known is not None
    return known[1].split(", ")


def test_bits_do_not_depend_on_the_instruction_set(whole: dict[str, np.ndarray[Any, Any]]) -> None:
    names = instruction_sets()
    assert names[-1] == "baseline"
    for isa in names:
        wanted = [(precision, 16 if (isa, precision) == ("baseline", "int16") else 64) for precision in PRECISIONS]
        done = python("-c", DRAW, json.dumps(wanted), env=os.environ | {"TARFLOW_ISA": isa})
        expected = [f"{digest(whole[precision][:n])} native {precision} ({isa})" for precision, n in wanted]
        assert [line.partition(",")[0] for line in done.stdout.splitlines()] == expected, done.stderr


def test_precisions_are_as_near_as_their_weights(whole: dict[str, np.ndarray[Any, Any]]) -> None:
    exact = np.asarray(Flow.open(DEMO, provider="cpu").sample(64, labels=LABELS, **HOW))
    rms = {name: float(np.sqrt(np.square(whole[name] - exact).mean())) for name in PRECISIONS}
    assert rms["fp32"] < 5e-6
    assert rms["int16"] < 1e-4
    assert rms["bf16"] < 1e-2
    assert rms["int8"] < 5e-2


def test_threads_may_draw_from_one_flow_at_once(whole: dict[str, np.ndarray[Any, Any]]) -> None:
    flow = opened()
    report = flow.sample(1).report
    assert report.level.startswith("L1: bitwise the same for any n, batch size, thread count and processor")
    with ThreadPoolExecutor(4) as pool:
        runs = [
            pool.submit(partial(flow.sample, 8, labels=LABELS[i * 8 : i * 8 + 8], first_sample=i * 8, **HOW))
            for i in range(8)
        ]
        for i, run in enumerate(runs):
            assert np.array_equal(run.result(), whole["fp32"][i * 8 : i * 8 + 8])


def test_a_forked_child_draws_with_threads_of_its_own(whole: dict[str, np.ndarray[Any, Any]]) -> None:
    flow = opened()
    flow.sample(2, labels=LABELS[:2], **HOW)
    child = os.fork()
    if child == 0:
        same = np.array_equal(flow.sample(8, labels=LABELS[:8], **HOW), whole["fp32"][:8])
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_nothing_runs_on_when_a_flow_is_gone() -> None:
    script = (
        "import gc, os\nfrom tarflow.runtime.flow import Flow\n"
        f"flow = Flow.open({str(DEMO)!r}, provider='native', threads=3)\n"
        "flow.sample(2)\nbefore = len(os.listdir('/proc/self/task'))\n"
        "model = flow.backend.model\nmodel._close()\nprint(before - len(os.listdir('/proc/self/task')))"
    )
    assert python("-c", script).stdout.split() == ["2"]


def test_an_exception_of_progress_cancels() -> None:
    class Enough(Exception):
        pass

    seen = []

    def stop(progress: Any) -> None:
        seen.append(progress.done)
        if len(seen) == 3:
            raise Enough

    flow = opened()
    with pytest.raises(Enough):
        flow.sample(4, progress=stop)
    assert seen == [1, 2, 3]
    assert np.isfinite(flow.sample(2)).all()


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """tarflow as it is installed where there is no compiler."""
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.mark.parametrize("precision", [None, "int16"])
def test_auto_is_the_native_engine_in_the_bundle_s_precision_or_the_one_asked_for(
    whole: dict[str, np.ndarray[Any, Any]], precision: str | None
) -> None:
    flow = Flow.open(DEMO, precision=precision)
    assert flow.backend.description.startswith(f"native {precision or 'fp32'} (")
    assert np.array_equal(flow.sample(8, labels=LABELS[:8], **HOW), whole[precision or "fp32"][:8])


@pytest.mark.usefixtures("not_built")
def test_where_it_was_not_built_auto_is_onnx_runtime_and_says_why() -> None:
    flow = Flow.open(DEMO)
    assert re.match(r"ONNX Runtime \S+, CPU; not native: .* want of a C\+\+ compiler", flow.backend.description)
    assert np.array_equal(flow.sample(2), Flow.open(DEMO, provider="cpu").sample(2))
    with pytest.raises(MachineError, match="want of a C\\+\\+ compiler"):
        Flow.open(DEMO, provider="native")
    assert on_cpus(Bundle.open(DEMO)).startswith("ONNX Runtime; not native: ")


def test_auto_does_not_take_what_is_slower() -> None:
    script = f"from tarflow.runtime.flow import Flow\nprint(Flow.open({str(DEMO)!r}).backend.description)"
    done = python("-c", script, env=os.environ | {"TARFLOW_ISA": "baseline"})
    assert "CPU; not native: without AVX2 and FMA it is the slower one" in done.stdout, done.stderr


def test_an_int8_bundle_is_decoded_in_int8_where_its_card_vouches_for_that(copy: Exported) -> None:
    folder = copy("demo", "int8")
    assert Flow.open(folder).backend.description.startswith("native int8 (")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["parity"]["native"]["int8"]["rms"] = 1.0
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert "CPU; not native: the bundle's parity card has no row within" in Flow.open(folder).backend.description
    for card in ({}, {"native": 1}, {"native": {"int8": {"rms": "small"}}}):
        assert not vouched(card, "int8")


def test_the_limit_of_a_round_trip_is_that_of_the_precision_drawn_in() -> None:
    manifest = Bundle.open(DEMO).manifest
    limits = [manifest.certificate_limit(precision) for precision in ("fp32", "int16", "bf16", "int8")]
    assert limits == sorted(limits)
    assert limits[0] < limits[1] < limits[2]
    row = {"native": {"int16": {"tolerance": {"certificate": 0.25}}}}
    assert replace(manifest, parity={**manifest.parity, **row}).certificate_limit("int16") == 0.25
    assert replace(manifest, precision="fp16", parity={}).certificate_limit("fp32") == 0.5  # encoded again in fp16


@pytest.mark.parametrize("provider", ["native", "cpu"])
def test_weights_that_are_written_to_while_they_are_open_are_refused_every_time(provider: str, tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "demo")
    flow = Flow.open(tmp_path / "demo", provider=provider)
    with (tmp_path / "demo" / "weights.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))
    for _ in range(2):
        with pytest.raises(BundleError, match="is damaged or was changed"):
            flow.sample(1)


def test_a_precision_is_refused_where_another_engine_computes() -> None:
    with pytest.raises(InputError, match="`precision` is 'int8'; expected none but for the native engine"):
        Opening("cpu", precision="int8")
    with pytest.raises(InputError, match="expected one of fp32, int16, bf16, int8"):
        Opening("native", precision="fp64")
    done = subprocess.run(
        [sys.executable, "-m", "tarflow.cli.main", "generate", "--provider", "cpu", "--precision", "int8"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--precision is 'int8'" in done.stderr


def test_exp_and_gelu_are_off_by_what_their_header_says() -> None:
    of_exp, of_gelu = errors()
    assert of_exp <= 1.01  # units of its last place
    assert of_gelu <= 2.5  # of x's

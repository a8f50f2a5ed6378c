"""What ONNX Runtime's CUDA provider makes of the graphs for it: its own host code, on libraries that stand in for
CUDA's and run no kernel.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.checkout import ROOT
from bench.gpu.standin.build import Standin, build
from bench.gpu.standin.kernels import PROVIDER, own, registered

from .conftest import Exported

Step = dict[str, Any]


@pytest.fixture(scope="module")
def standin() -> Standin:
    return build()


@pytest.fixture(scope="module")
def steps(standin: Standin, tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    """A step of each shape of a batch, of eight layers of width 1024."""
    log = tmp_path_factory.mktemp("standin") / "log"
    command = [sys.executable, "-m", "bench.gpu.standin.nodes"]
    done = subprocess.run(command, env=standin.environment(log), stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_step_of_one_position_is_120_kernels_at_most(steps: list[Step]) -> None:
    """Resident's are 291 to 301. In step with docs/ENGINES.md."""
    found = {(step["images"], step["branches"]): step["nodes"] for step in steps}
    assert found == {(1, 1): 120, (32, 1): 120, (1, 2): 135, (32, 2): 135}


def test_nothing_of_it_runs_on_the_cpu_is_copied_there_or_spoils_the_capture(steps: list[Step]) -> None:
    assert [(step["on the CPU"], step["copies"], step["bad"]) for step in steps] == [({}, 0, {})] * len(steps)


def test_the_residual_stream_and_its_statistics_are_float32(steps: list[Step]) -> None:
    for step in steps:
        norms = {name: count for name, count in step["by kernel"].items() if "LayerNorm" in name}
        assert sum(norms.values()) == 2 * 8 + 1
        assert all("SkipLayerNormKernelSmallIf" in name for name in norms)  # of float


def test_attention_is_one_kernel_a_layer(steps: list[Step]) -> None:
    for step in steps:
        attention = [count for name, count in step["by kernel"].items() if "5flash" in name]
        assert attention == [8]


def test_what_is_packed_for_a_gpu_holds_every_kernel_of_a_step(standin: Standin, steps: list[Step]) -> None:
    provider = standin.packages / PROVIDER
    names, kept = registered(provider), own(provider)
    packed = {name for container in kept for name in names[container]}
    launched = {name for step in steps for name in step["by kernel"] if name.startswith("_Z")}
    assert launched <= packed
    assert len(launched) > 10


LIBTARFLOW = """
import json, sys
from pathlib import Path
from bench.gpu.standin.log import LAUNCHES, bad, note, part, read
from tests.cpp_library import PROGRESS, CppFlow

flow = CppFlow(Path(sys.argv[1]), provider=b"cuda")
def told(user, done, total, block, position):
    note(f"block-{block}-{position}")
    return 0
flow.sample(1, labels=0, guidance=float(sys.argv[2]), denoise=0.0, progress=PROGRESS(told))
events, found = read(), set()
for position in range(12):  # the notes stand behind the steps, and the last one brings the patches to the host
    launched = [event for event in part(events, f"block-2-{position}") if event.call in LAUNCHES]
    captured = [event for event in launched if event.captured]
    found.add(len(captured or launched))
print(json.dumps({"nodes": max(found), "bad": dict(bad(events))}))
"""


@pytest.mark.parametrize(("guidance", "nodes"), [(0, 55), (1, 65)])
def test_libtarflow_makes_its_steps_of_the_same_kernels(
    bundle: Exported, standin: Standin, tmp_path: Path, guidance: int, nodes: int
) -> None:
    """Of three layers: 13 each, and 16, or when guided 14 each, and 23."""
    (engine,) = (standin.packages / "onnxruntime" / "capi").glob("libonnxruntime.so.*")
    environment = {**standin.environment(tmp_path / "log"), "TARFLOW_ONNXRUNTIME": str(engine)}
    command = [sys.executable, "-c", LIBTARFLOW, str(bundle("demo", "fp16")), str(guidance)]
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {"nodes": nodes, "bad": {}}

"""What ONNX Runtime's CUDA provider makes of the graphs for it: its own host code, on libraries that stand in for
CUDA's and run no kernel.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from bench.gpu.standin.build import Standin, build
from bench.gpu.standin.kernels import PROVIDER, own, registered

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
    """Resident's are 291 to 297. In step with docs/ENGINES.md."""
    found = {(step["images"], step["branches"]): step["nodes"] for step in steps}
    assert found == {(1, 1): 119, (32, 1): 120, (1, 2): 134, (32, 2): 135}


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

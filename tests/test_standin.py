"""ONNX Runtime's real CUDA provider on libraries that stand in for CUDA's: all it does with a device but the numbers.

No kernel runs. What is placed, captured, allocated, copied and waited for, by which thread, is what a GPU would get.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from bench.gpu.checkout import KEPT
from bench.gpu.standin.__main__ import find
from bench.gpu.standin.build import LIBRARIES, Standin, build, needed_by

from .conftest import DEMO, Exported
from .cpp_library import LIBRARY

PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
Found = dict[str, Any]


@pytest.fixture(scope="module")
def standin() -> Standin:
    """Built once for all workers, and kept."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(KEPT / "lock"):
        return build()


@pytest.mark.parametrize("case", [("demo", "fp32"), ("cond", "fp16")], ids="-".join)
def test_every_node_of_a_step_is_on_the_device_and_captured(
    standin: Standin, bundle: Exported, case: tuple[str, str]
) -> None:
    found = find(standin, "audit", bundle(*case))
    assert found["bad"] == {}
    assert "absent" not in found
    assert "without CUDA graphs" not in found["backend"]
    for name, placed in found["placement"].items():
        assert set(placed["on the CPU"]) <= {"Concat"}, name  # of sizes, which are the host's
        assert placed["copies"] == 0, name
    for guided in ("unguided", "guided"):
        for block in (0, 1):
            first, second, third = (found["phases"][f"{guided}-block-{block}-step-{step}"] for step in range(3))
            assert first["captured"] == second["captured"] > 0  # the position takes turns between two places
            assert third == {"graphs launched": 1}
            assert found["phases"][f"{guided}-block-{block}-window-7"] == third
            again = found["phases"][f"{guided}-block-{block}-step-again"]
            fused = case[1] == "fp16"  # a step of one position is another graph than windows are, on another stream
            assert again == (third | {"waits": 1} if fused else third)
            patches = found["phases"][f"{guided}-block-{block}-patches"]
            assert patches == {"copies": 1, "waits": 2}  # for the steps, then for the copy
    assert set(found["libraries"]) <= set(LIBRARIES)  # neither cuDNN nor cuFFT, whatever was computed


def test_the_provider_is_linked_to_what_the_gpu_extra_brings_and_no_more(standin: Standin) -> None:
    of_cuda = {name for name in needed_by(standin.packages / PROVIDER) if name.startswith(("libcu", "libnv"))}
    assert of_cuda == set(LIBRARIES)  # cudart, cublas with cublasLt, curand; and the driver's own


def test_products_in_fp32_are_not_rounded_to_tf32(standin: Standin) -> None:
    found = find(standin, "tf32", DEMO)
    assert found["products"] > 0
    assert found["in tf32"] == 0


@pytest.mark.parametrize("case", [("demo", "fp32"), ("demo", "fp16")], ids="-".join)
def test_weights_are_copied_to_the_device_once_for_all_graphs_of_a_block(
    standin: Standin, bundle: Exported, case: tuple[str, str]
) -> None:
    found = find(standin, "weights", bundle(*case))
    assert found["right"]
    assert 0.99 * found["weights"] < found["copied"] < 1.05 * found["weights"]
    assert_nothing_is_left(found)


def test_memory_of_the_device_does_not_grow_with_the_batches_that_come(standin: Standin) -> None:
    found = find(standin, "growth", DEMO)
    for sizes in ("bytes after n = 1...8", "certified and denoised"):
        assert found[sizes][-1] - found[sizes][0] <= 0.3 * found["weights"]
    assert found["certified and denoised"][-1] <= 3 * found["weights"]  # and caches, and scratch


def test_guidance_by_turns_is_captured_once_and_destroyed_with_the_flow(standin: Standin) -> None:
    found = find(standin, "alternate", DEMO)
    unguided, both, *later = found["graphs after each"]
    assert 0 < unguided < both
    assert set(later) == {both}
    assert_nothing_is_left(found)


def test_captures_of_more_shapes_than_are_kept_make_room_for_new_ones(standin: Standin) -> None:
    found = find(standin, "crowd", DEMO)
    assert max(found["graphs held after each"]) == 6 * found["blocks"]
    assert_nothing_is_left(found)


def test_nothing_of_another_thread_falls_into_a_capture(standin: Standin) -> None:
    found = find(standin, "threads", DEMO)
    assert found["errors"] == []
    assert found["captures"] > 0
    assert_nothing_is_left(found)


def test_libtarflow_does_the_same(standin: Standin) -> None:
    assert LIBRARY.exists(), f"{LIBRARY} is missing; build it: make cpp-dev"
    found = find(standin, "cpp", DEMO, "cuda:GPU-20202020")
    assert found["backend"] == "ONNX Runtime 1.31.1, CUDA"  # no word of why nothing was captured
    assert found["devices"] == ["1"]
    assert found["errors"] == []
    assert found["bytes after n = 1...8"][-1] - found["bytes after n = 1...8"][0] <= 0.3 * found["weights"]
    unguided, both, *later = found["graphs after each"]
    assert 0 < unguided < both
    assert set(later) == {both}
    assert_nothing_is_left(found)


@pytest.mark.parametrize("provider", ["cuda:1", "cuda:GPU-20202020-2020", "cuda:20202020-2020-2020-2020-202020202020"])
def test_a_gpu_that_is_named_is_the_one_that_is_used(standin: Standin, provider: str) -> None:
    found = find(standin, "device", DEMO, provider)
    assert found["devices"] == ["1"]
    assert found["machine"] == "cuda a pretended GPU 1"  # what its plans are true for
    assert found["refused"] == "`provider` is device '2'; expected one of those that CUDA has here " + (
        "(0: a pretended GPU 0, 10101010-1010-1010-1010-101010101010; "
        "1: a pretended GPU 1, 20202020-2020-2020-2020-202020202020)"
    )


def assert_nothing_is_left(found: Found) -> None:
    """But for a pool of memory that ONNX Runtime keeps for as long as the process lives."""
    assert (found["graphs left"], found["streams left"], found["bad"]) == (0, 0, {})
    assert found["bytes left"] <= 4 << 20


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_cuda_that_is_missing_is_not_complained_of_among_the_results(
    standin: Standin, tmp_path: Path, provider: str
) -> None:
    """The build for GPUs without CUDA's libraries: its own words would break what a program reads."""
    environment = {name: value for name, value in standin.environment().items() if name != "LD_LIBRARY_PATH"}
    asked = ["generate", "--n", "1", "--provider", provider, "-o", str(tmp_path / "grid.png"), "--json"]
    command = [sys.executable, "-m", "tarflow.cli.main", *asked]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    if provider == "cpu":
        assert json.loads(done.stdout)["certificate"]["max"] < 1e-4
    else:
        assert (done.returncode, done.stdout) == (3, "")
        assert "CUDAExecutionProvider could not be started" in done.stderr

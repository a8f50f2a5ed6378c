"""The resident step graph: everything a device keeps, written in place, in ONNX Runtime on shared buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from tarflow.runtime.backend import Branches
from tarflow.runtime.bundle import RESIDENT, Bundle
from tarflow.runtime.opening import Opening
from tarflow.runtime.ort.backend import OrtBackend
from tarflow.runtime.ort.weights import DeviceWeights
from tarflow.runtime.ports import inputs, is_state, outputs

from .backends import open_flow
from .conftest import DEMO, Exported, python


@pytest.mark.parametrize("graph", ["forward", "resident"])
@pytest.mark.parametrize("captured", [True, False])
def test_cuda_multiplies_fp32_in_fp32(monkeypatch: pytest.MonkeyPatch, graph: str, captured: bool) -> None:
    """What the provider is asked for: it needs a GPU to start, so the sessions here open on the CPU."""
    asked, usual = [], onnxruntime.InferenceSession

    class Session(usual):  # type: ignore[misc, valid-type]
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            asked.append(providers)
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda directory: None, raising=False)
    monkeypatch.setattr(DeviceWeights, "give", lambda *_: [])
    OrtBackend(Bundle.open(DEMO), Opening("cuda", cuda_graph=captured)).sessions.get(0, graph)
    options = {
        "use_tf32": "0",
        "device_id": "0",
        **({"enable_cuda_graph": "1"} if captured and graph == "resident" else {}),
    }
    assert asked[-1] == [("CUDAExecutionProvider", options), "CPUExecutionProvider"]


SHARED = """
import sys, numpy as np, onnxruntime as ort
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.ports import Sizes, is_state, next_name, shapes
bundle = Bundle.open(sys.argv[1])
options = ort.SessionOptions()
options.log_severity_level = 2  # warnings
session = ort.InferenceSession(str(bundle.path(bundle.manifest.blocks[1].graphs["resident"])), options)
binding, rng = session.io_binding(), np.random.default_rng(0)
types = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
kind = {value.name: types[value.type] for value in session.get_inputs()}
kept = []
for name, shape in shapes(bundle.manifest.config, "resident", Sizes(3, 2)).items():
    array = np.zeros(shape, kind[name]) if kind[name] == np.int64 else rng.normal(size=shape).astype(kind[name])
    value = ort.OrtValue.ortvalue_from_numpy(array)
    binding.bind_ortvalue_input(name, value)
    kept += [array, value]
    if is_state(name):
        if sys.argv[2] == "apart" or name == "position":
            value = ort.OrtValue.ortvalue_from_numpy(np.zeros_like(array))
            kept.append(value)
        binding.bind_ortvalue_output(next_name(name), value)
for _ in range(3):
    session.run_with_iobinding(binding)
"""


@pytest.mark.parametrize("engine", ["fp32", "fp16"])
def test_nothing_is_copied_when_outputs_share_the_inputs_memory(bundle: Exported, engine: str) -> None:
    def warnings(memory: str) -> str:
        done = python("-c", SHARED, bundle("cond", engine), memory, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "in-place optimization not activated" in warnings("apart")  # it does say so when it copies
    assert warnings("shared") == ""


def test_a_step_writes_one_slot_of_the_cache_and_one_patch(bundle: Exported) -> None:
    flow = open_flow("resident", bundle("cond"))
    config, labels = flow.config, np.array([0, 2, -1])
    z = flow.noise(3, range(3))
    decoding: Any = flow.backend.decoding(1, z, Branches.plain(labels, config.tokens))
    steps = decoding._steps
    for position in range(4):
        names = [port.name for port in inputs(config, "resident") if is_state(port.name) and port.name != "position"]
        before = {name: steps.read(name) for name in names}
        decoding.step(position)
        for name in before:
            axis_changed = np.flatnonzero((steps.read(name) != before[name]).any((0, 1, 3)))
            assert list(axis_changed) == [position + (name == "x")]
        assert steps.read("position") == [position + 1]


def test_memory_serves_block_after_block_until_something_in_it_is_not_finite(bundle: Exported) -> None:
    flow = open_flow("resident", bundle("cond"))
    backend: Any = flow.backend
    flow.sample(3, labels=0)
    (kept,) = backend._idle._free
    noise = flow.noise(0, range(3))
    noise[1] = 3e38
    with np.errstate(all="ignore"):
        flow.sample(noise=noise, labels=0, denoise=False)
    assert kept not in backend._idle._free


def test_the_next_block_is_opened_while_the_steps_of_one_run() -> None:
    backend = OrtBackend(Bundle.open(DEMO), resident=True)
    backend.sessions.captures = True  # as on a GPU: steps are begun, and waited for later
    config, opened = backend.config, backend.sessions._open
    z = np.zeros((1, config.tokens, config.patch_dim), np.float32)
    decoding = backend.decoding(2, z, Branches.plain(np.zeros(1, np.int64), config.tokens))
    for position in range(config.tokens - 1):
        decoding.step(position)
    assert opened.keys() == {(2, RESIDENT)}
    decoding.patches()
    assert opened.keys() == {(2, RESIDENT), (1, RESIDENT)}


def test_graphs_for_devices_keep_the_rules_of_the_parsers(bundle: Exported) -> None:
    opened = Bundle.open(bundle("cond"))
    config = opened.manifest.config
    for entry in opened.manifest.blocks:
        graph = onnx.load(opened.path(entry.graphs["resident"]), load_external_data=False)
        names, results = ([value.name for value in side] for side in (graph.graph.input, graph.graph.output))
        assert names == [port.name for port in inputs(config, "resident")]
        assert results == [port.name for port in outputs(config, "resident")]
        scatters = [node for node in graph.graph.node if node.op_type == "TensorScatter"]
        assert len(scatters) == 2 * config.layers + 1
        for node in scatters:  # only so does TensorRT make it an update in place
            assert node.input[0] in names
            assert node.output[0] in results
        assert [entry.version for entry in graph.opset_import] == [24]

"""Find the first block, step and graph node of a bundle that leaves tolerance of PyTorch.

The oracle's own states are fed to every block, so that one block's error does not reach the next. A graph that is
off is then compared, node by node on the same inputs, with the graph traced anew from the checkpoint.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from tarflow.model import TarFlow

from ..quality.parity import TOLERANCES, Pairs
from ..runtime.backend import Branches
from ..runtime.bundle import WEIGHTS
from ..runtime.files import replacing_folder
from ..runtime.flow import Flow
from ..runtime.ort.backend import OrtBackend, OrtDecoding, load_onnxruntime
from .emulate import emulate_bfloat16
from .precision import PRECISIONS, typed
from .trace import KINDS, place, trace
from .weights import int8_names, rename, write_weights

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Suspect:
    """A graph whose result is off, and the inputs that show it. ``step`` is None for forward and gradient."""

    kind: str
    block: int
    step: int | None
    error: float
    feeds: Feeds


@dataclass(frozen=True, slots=True)
class Finding:
    """The first thing that leaves tolerance. ``error`` is the suspect's, ``node_error`` the node's, relative."""

    kind: str
    block: int
    step: int | None
    error: float
    node: str | None
    op: str | None
    node_error: float | None
    reason: str


def bisect(
    flow: Flow, oracle: Flow, model: TarFlow, pairs: Pairs, tolerance: float | None, watch: Callable[[str], None]
) -> tuple[Finding, dict[str, Any]] | None:
    """The first finding and the tensors that reproduce it, or None if every graph is within ``tolerance``.

    ``tolerance`` is the largest absolute error of patches or gradients; by default ten times the precision's rms.
    """
    precision = flow.bundle.manifest.precision
    limit = 10 * TOLERANCES[precision]["rms"] if tolerance is None else tolerance
    suspect = _suspect(flow, oracle, pairs, limit, watch)
    if suspect is None:
        return None
    watch(f"trace block {suspect.block}'s {suspect.kind} graph anew")
    found_graph = onnx.load(
        flow.bundle.path(flow.bundle.manifest.blocks[suspect.block].graphs[suspect.kind]), load_external_data=False
    )
    with tempfile.TemporaryDirectory(prefix="tarflow-bisect.") as name:
        int8 = int8_names(flow.bundle.path(WEIGHTS))
        expected_graph = _trace_anew(model, precision, int8, suspect, Path(name))
        expected = _run_exposed(expected_graph, Path(name), suspect.feeds)
        found = _run_exposed(found_graph, flow.bundle.folder, suspect.feeds)
        weights = _weights(expected_graph, Path(name)), _weights(found_graph, flow.bundle.folder)
    return _first_node(suspect, (found_graph, expected_graph), (found, expected), weights, limit)


def write_repro(folder: Path, finding: Finding, tensors: dict[str, Any], force: bool) -> None:
    """The guilty node as a graph of its own, with inputs, expected and found outputs, and how to run it."""
    with replacing_folder(folder, force, marker="finding.json") as partial:
        node: NodeProto | None = tensors["node"]
        for part in ("inputs", "expected", "found"):
            np.savez(partial / f"{part}.npz", **tensors[part])
        if node is not None:
            onnx.save(_alone(node, tensors["inputs"], tensors["found"], tensors["opset"]), partial / "node.onnx")
        (partial / "finding.json").write_text(json.dumps({"format": "tarflow-bisect", **asdict(finding)}, indent=1))
        (partial / "README.md").write_text(
            f"# {finding.reason}\n\n`inputs.npz` goes into `node.onnx`; `found.npz` is what the bundle's "
            "graph makes of "
            "it, `expected.npz` what a graph traced anew from the checkpoint makes.\n\n```python\n"
            "import numpy as np, onnxruntime\nsession = onnxruntime.InferenceSession('node.onnx')\n"
            "print(session.run(None, dict(np.load('inputs.npz'))))\nprint(dict(np.load('expected.npz')))\n```\n"
        )


def _suspect(flow: Flow, oracle: Flow, pairs: Pairs, limit: float, watch: Callable[[str], None]) -> Suspect | None:
    """The first graph whose result differs from the oracle's on the oracle's inputs, in the order of sampling."""
    config, backend = flow.config, flow.backend
    assert isinstance(backend, OrtBackend)
    plain = Branches.plain(pairs.labels, config.tokens)
    for place_, block in enumerate(reversed(range(config.blocks))):
        z, x = pairs.states[place_], pairs.states[place_ + 1]
        watch(f"block {block}: step graph")
        decoding = OrtDecoding(backend, block, z, plain)
        for step in range(config.tokens - 1):
            decoding.guess(x)  # every step sees the oracle's patches
            decoding.step(step)
            error = float(np.abs(decoding.patches() - x).max())
            if not error <= limit:
                return Suspect("step", block, step, error, _step_feeds(decoding))
        watch(f"block {block}: forward graph")
        feeds: Feeds = {
            "x": x,
            "labels": plain.labels,
            "mix": plain.mix,
            "inverse_temperature": plain.inverse_temperature,
        }
        error = float(np.abs(backend.forward(block, x, plain)[0] - z).max())
        if not error <= limit:
            return Suspect("forward", block, None, error, feeds)
        watch(f"block {block}: gradient graph")
        ones = np.ones(len(x), np.float32)
        feeds = {"x": x, "labels": plain.labels, "grad_z": -z, "grad_log_det": ones}
        expected = oracle.backend.gradient(block, x, pairs.labels, -z, ones)
        scale = max(1.0, float(np.abs(expected).max()))
        error = float(np.abs(backend.gradient(block, x, pairs.labels, -z, ones) - expected).max()) / scale
        if not error <= limit:
            return Suspect("gradient", block, None, error, feeds)
    return None


def _step_feeds(decoding: OrtDecoding) -> Feeds:
    """The inputs of the step just made. The cache now holds that step's own slot too; the graph masks it."""
    return {name: array.copy() for name, array in decoding.inputs.items()}


def _trace_anew(model: TarFlow, precision: str, int8: Collection[str], suspect: Suspect, folder: Path) -> ModelProto:
    typed_block = typed(model.blocks[suspect.block], PRECISIONS[precision])
    stored = write_weights(model, PRECISIONS[precision], folder / "weights.safetensors", int8)
    graph = trace(suspect.kind, typed_block, PRECISIONS[precision].dtype)
    names = rename(KINDS[suspect.kind](typed_block), suspect.block)
    place(graph, suspect.block, stored, names, folder / "graph.onnx")
    return onnx.load(folder / "graph.onnx", load_external_data=False)


def _run_exposed(graph: ModelProto, folder: Path, feeds: Feeds) -> Feeds:
    """Run a graph with every node's output made an output of the graph."""
    exposed = ModelProto()
    exposed.CopyFrom(graph)
    if any(i.data_type == onnx.TensorProto.BFLOAT16 for i in exposed.graph.initializer):
        exposed = emulate_bfloat16(exposed)
    present = {output.name for output in exposed.graph.output}
    typed_graph = onnx.shape_inference.infer_shapes(exposed).graph
    types = {v.name: v.type.tensor_type.elem_type for v in typed_graph.value_info}
    names = [n for node in exposed.graph.node for n in node.output if n and n not in present and n in types]
    names = [n for n in names if types[n] != onnx.TensorProto.BFLOAT16]  # numpy has no such type
    exposed.graph.output.extend(helper.make_tensor_value_info(n, types[n], None) for n in names)
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # fused nodes have no names
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    session = ort.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = [o.name for o in session.get_outputs() if o.type != "tensor(bfloat16)"]
    half = {i.name for i in session.get_inputs() if i.type == "tensor(bfloat16)"}
    values = {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, onnx.TensorProto.BFLOAT16)
        if name in half
        else ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        for name, array in feeds.items()
    }
    results = session.run_with_ort_values(outputs, values)
    return {name: value.numpy() for name, value in zip(outputs, results, strict=True)}


def _weights(graph: ModelProto, folder: Path) -> Feeds:
    base = str(folder.resolve())
    return {tensor.name: numpy_helper.to_array(tensor, base) for tensor in graph.graph.initializer}


def _first_node(
    suspect: Suspect,
    graphs: tuple[ModelProto, ModelProto],
    results: tuple[Feeds, Feeds],
    weights: tuple[Feeds, Feeds],
    limit: float,
) -> tuple[Finding, dict[str, Any]]:
    """Walk the bundle's graph in order; the first node that differs in kind, weight or value is the culprit."""
    (found_graph, expected_graph), (found, expected), (true_weights, own_weights) = graphs, results, weights
    traced = {output: node for node in expected_graph.graph.node for output in node.output}
    where = f"block {suspect.block}, " + (
        f"step {suspect.step}" if suspect.step is not None else f"{suspect.kind} graph"
    )
    for node in found_graph.graph.node:
        outputs = {name: found[name] for name in node.output if name in found}
        truth = {name: expected[name] for name in outputs if name in expected}
        error = max((_relative(outputs[name], truth[name]) for name in truth), default=0.0)
        twin = traced.get(node.output[0])
        reason = None
        if twin is None or twin.op_type != node.op_type or list(twin.input) != list(node.input):
            reason = f"the node {_spell(node)} is not what the model traces to" + (f": {_spell(twin)}" if twin else "")
        elif changed := [n for n in node.input if n in true_weights and not _same(own_weights.get(n), true_weights[n])]:
            reason = f"the weight {changed[0]} is not the checkpoint's"
        elif not error <= limit:
            reason = f"the node {_spell(node)} gives another result on the same inputs"
        if reason:
            inputs = {**suspect.feeds, **own_weights, **expected}
            tensors = {
                "node": node,
                "opset": found_graph.opset_import[0].version,
                "inputs": {name: inputs[name] for name in node.input if name in inputs},
                "found": outputs,
                "expected": truth,
            }
            finding = Finding(
                suspect.kind,
                suspect.block,
                suspect.step,
                suspect.error,
                node.name,
                node.op_type,
                error,
                f"{where}: {reason}",
            )
            return finding, tensors
    reason = (
        f"{where}: every node agrees with a fresh trace; the error of {suspect.error:.2g} is the "
        "precision's or the provider's own"
    )
    finding = Finding(suspect.kind, suspect.block, suspect.step, suspect.error, None, None, None, reason)
    return finding, {"node": None, "opset": 0, "inputs": suspect.feeds, "found": {}, "expected": {}}


def _relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    if found.shape != expected.shape:
        return float("inf")
    if found.dtype.kind != "f":
        return 0.0 if np.array_equal(found, expected) else float("inf")
    a, b = found.astype(np.float64), expected.astype(np.float64)
    scale = max(1.0, float(np.abs(b).max(initial=0.0)))
    return float(np.abs(a - b).max(initial=0.0)) / scale


def _same(a: NDArray[Any] | None, b: NDArray[Any]) -> bool:
    return a is not None and a.shape == b.shape and a.tobytes() == b.tobytes()


def _spell(node: NodeProto) -> str:
    return f"{node.name} = {node.op_type}({', '.join(node.input)})"


def _alone(node: NodeProto, inputs: Feeds, outputs: Feeds, opset: int) -> ModelProto:
    """A model of one node, its weights among its inputs."""

    def port(name: str, array: NDArray[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

    graph = helper.make_graph(
        [node], "node", [port(n, a) for n, a in inputs.items()], [port(n, a) for n, a in outputs.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)

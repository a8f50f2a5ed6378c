"""Two graphs of the same block, node by node on the same inputs: the first node that differs."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..runtime.bundle import WEIGHTS
from ..runtime.ort.library import load_onnxruntime
from ..runtime.parts import Feeds
from .emulate import WIDE, emulate_bfloat16


@dataclass(frozen=True, slots=True)
class Exposed:
    """A graph, what every node of it makes of some inputs, and its weights. bfloat16 is held in float32."""

    graph: ModelProto
    values: Feeds
    weights: Feeds


@dataclass(frozen=True, slots=True)
class Evidence:
    """A node that differs, what it reads and makes, what it should make, and why it is guilty; None: no node is."""

    node: NodeProto | None
    inputs: Feeds
    found: Feeds = field(default_factory=dict)
    expected: Feeds = field(default_factory=dict)
    reason: str = ""
    error: float = 0.0
    opset: int = 0
    weights: tuple[str, ...] = ()  # by their names in the graph: the one that is wrong, else those behind the node


def expose(path: Path, feeds: Feeds) -> Exposed:
    """Run a graph on ONNX Runtime's CPU with every node's output made an output of the graph."""
    graph = onnx.load(path, load_external_data=False)
    weights = {tensor.name: _weight(tensor, path.with_name(WEIGHTS)) for tensor in graph.graph.initializer}
    exposed = emulate_bfloat16(copy.deepcopy(graph))
    present = {output.name for output in exposed.graph.output}
    inferred = onnx.shape_inference.infer_shapes(exposed).graph.value_info
    types = {value.name: value.type.tensor_type.elem_type for value in inferred}
    exposed.graph.output.extend(
        helper.make_tensor_value_info(name, types[name], None)
        for node in exposed.graph.node
        for name in node.output
        if name and name not in present and types.get(name, TensorProto.BFLOAT16) != TensorProto.BFLOAT16
    )
    values = _run(exposed, path.parent, feeds)
    wide = {name.removesuffix(WIDE): value for name, value in values.items()}
    return Exposed(graph, wide, weights)


def first_difference(shown: Exposed, truth: Exposed, feeds: Feeds, limit: float) -> Evidence:
    """Walk a bundle's graph in order; the first node that differs in kind, weight or value is the culprit."""
    traced = {output: node for node in truth.graph.graph.node for output in node.output}
    inputs = {**feeds, **shown.weights, **truth.values}
    for node in shown.graph.graph.node:
        found = {name: shown.values[name] for name in node.output if name in shown.values}
        expected = {name: truth.values[name] for name in found if name in truth.values}
        error = max((_relative(found[name], expected[name]) for name in expected), default=0.0)
        twin = traced.get(node.output[0])
        changed = [n for n in node.input if n in truth.weights and not _same(shown.weights.get(n), truth.weights[n])]
        if twin is None or twin.op_type != node.op_type or list(twin.input) != list(node.input):
            reason = f"the node {_spell(node)} is not what the model traces to" + (f": {_spell(twin)}" if twin else "")
        elif changed:
            reason = f"the weight {changed[0]} is not the checkpoint's"
        elif not error <= limit:
            reason = f"the node {_spell(node)} gives another result on the same inputs"
        else:
            continue
        read = {name: inputs[name] for name in node.input if name in inputs}
        behind = tuple(changed[:1]) or _weights_behind(shown.graph, node)
        return Evidence(node, read, found, expected, reason, error, shown.graph.opset_import[0].version, behind)
    return Evidence(None, feeds)


def _weights_behind(graph: ModelProto, node: NodeProto) -> tuple[str, ...]:
    """The weights that a node reads; where it reads none, those of the nearest nodes before it that do."""
    stored = {tensor.name for tensor in graph.graph.initializer if tensor.external_data}
    made = {output: node for node in graph.graph.node for output in node.output}
    ahead, seen = [node], {node.name}
    while ahead:
        read = [name for one in ahead for name in one.input]
        if found := tuple(dict.fromkeys(name for name in read if name in stored)):
            return found
        before = {made[name].name: made[name] for name in read if name in made}
        ahead = [one for name, one in before.items() if name not in seen]
        seen |= before.keys()
    return ()


def _run(graph: ModelProto, folder: Path, feeds: Feeds) -> Feeds:
    """All outputs that numpy has a type for; weights are read from ``folder``."""
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # fused nodes have no names
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs() if output.type != "tensor(bfloat16)"]
    half = {value.name for value in session.get_inputs() if value.type == "tensor(bfloat16)"}
    values = {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, TensorProto.BFLOAT16)
        if name in half
        else ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        for name, array in feeds.items()
    }
    results = session.run_with_ort_values(names, values)
    return {name: value.numpy() for name, value in zip(names, results, strict=True)}


def _weight(tensor: TensorProto, path: Path) -> NDArray[Any]:
    """A graph's constant, or a weight read from its place in the file; bfloat16, which numpy lacks, as float32."""
    array = numpy_helper.to_array(tensor) if not tensor.external_data else _stored(tensor, path)
    return array if array.dtype.isbuiltin else array.astype(np.float32)


def _stored(tensor: TensorProto, path: Path) -> NDArray[Any]:
    """Read by hand: onnx and onnx_ir refuse files with several hard links, as emulated bundles have."""
    place = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
    with path.open("rb") as file:
        file.seek(place["offset"])
        content = file.read(place["length"])
    return np.frombuffer(content, helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tensor.dims)


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

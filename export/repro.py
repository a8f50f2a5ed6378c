"""The folder that shows what bisecting found: the guilty node as a graph of its own, its inputs and outputs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from ..runtime.files import replacing_folder
from ..runtime.parts import Feeds
from .bisect import Finding
from .nodes import Evidence

MARKER = "finding.json"
_README = """# {reason}

`inputs.npz` goes into `node.onnx`; `found.npz` is what the bundle's graph makes of it, `expected.npz` what a graph
traced anew from the checkpoint makes.

```python
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession('node.onnx')
print(session.run(None, dict(np.load('inputs.npz'))))
print(dict(np.load('expected.npz')))
```
"""


def write_repro(folder: Path, finding: Finding, evidence: Evidence, force: bool) -> None:
    """Write the folder, whole or not at all. Raises InputError if it is there and not ``force``."""
    with replacing_folder(folder, force, MARKER) as partial:
        for name, tensors in (("inputs", evidence.inputs), ("expected", evidence.expected), ("found", evidence.found)):
            np.savez(partial / f"{name}.npz", **tensors)  # type: ignore[arg-type]  # numpy has arguments of other types
        if evidence.node is not None:
            onnx.save(_alone(evidence.node, evidence), partial / "node.onnx")
        (partial / MARKER).write_text(json.dumps({"format": "tarflow-bisect", **asdict(finding)}, indent=1))
        (partial / "README.md").write_text(_README.format(reason=finding.reason))


def _alone(node: NodeProto, evidence: Evidence) -> ModelProto:
    """A model of one node, its weights among its inputs."""

    def ports(tensors: Feeds) -> list[onnx.ValueInfoProto]:
        return [_port(name, array) for name, array in tensors.items()]

    graph = helper.make_graph([node], "node", ports(evidence.inputs), ports(evidence.found))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", evidence.opset)], ir_version=10)


def _port(name: str, array: NDArray[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

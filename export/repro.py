"""The folder that shows what bisecting found: the guilty node as a graph of its own, its inputs and outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from ..runtime.files import replacing_folder
from .bisect import Finding

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


def write_repro(folder: Path, finding: Finding, force: bool) -> None:
    """Write the folder, whole or not at all. Raises InputError if it is there and not ``force``."""
    evidence = finding.evidence
    with replacing_folder(folder, force, MARKER) as partial:
        for name, tensors in (("inputs", evidence.inputs), ("expected", evidence.expected), ("found", evidence.found)):
            np.savez(partial / f"{name}.npz", **tensors)  # type: ignore[arg-type]  # numpy has arguments of other types
        if evidence.node is not None:
            inputs, outputs = ([_port(*it) for it in part.items()] for part in (evidence.inputs, evidence.found))
            graph = helper.make_graph([evidence.node], "node", inputs, outputs)
            opset = helper.make_opsetid("", evidence.opset)
            onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), partial / "node.onnx")
        (partial / MARKER).write_text(json.dumps({"format": "tarflow-bisect", **finding.to_json()}, indent=1))
        (partial / "README.md").write_text(_README.format(reason=finding.reason))


def _port(name: str, array: NDArray[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

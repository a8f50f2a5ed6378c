"""bfloat16 on a CPU that has no bfloat16 matrix product: the same graph, every bfloat16 value a rounded float32.

ONNX Runtime's CPU provider cannot run a bf16 graph, so a bf16 bundle is verified through this rewriting of the very
files that ship: wherever the graph makes a bfloat16, the float32 in its place is rounded to bfloat16.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..runtime.bundle import GOLDEN, WEIGHTS, Bundle

WIDE = ".float32"  # behind a bfloat16 value's name: the same in float32


def emulate_bfloat16(model: ModelProto) -> ModelProto:
    """Rewrite a graph, in place; its weights stay where they are."""
    names = _bfloat16_values(model)
    nodes: list[NodeProto] = [
        _cast(value.name, value.name + WIDE, TensorProto.FLOAT)
        for value in (*model.graph.input, *model.graph.initializer)
        if value.name in names
    ]
    for node in model.graph.node:
        made = [name for name in node.output if name in names]
        node.input[:] = [name + WIDE if name in names else name for name in node.input]
        if node.op_type != "Cast":  # a cast to bfloat16 already rounds
            node.output[:] = [f"{name}.exact" if name in names else name for name in node.output]
        nodes.append(node)
        for name in made:
            if node.op_type != "Cast":
                nodes.append(_cast(f"{name}.exact", name, TensorProto.BFLOAT16))
            nodes.append(_cast(name, name + WIDE, TensorProto.FLOAT))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@contextlib.contextmanager
def runnable(bundle: Bundle) -> Iterator[Bundle]:
    """A bundle as this machine's CPU can run it: as it is, or for bf16 a temporary one of emulated graphs."""
    if bundle.manifest.precision != "bf16":
        yield bundle
        return
    with tempfile.TemporaryDirectory(prefix="tarflow-bf16.") as name:
        folder = Path(name)
        for file in (WEIGHTS, GOLDEN):  # graphs may only refer to weights in their own folder
            if (bundle.folder / file).exists():
                _link(bundle.path(file).resolve(), folder / file)
        for block in bundle.manifest.blocks:
            for graph in block.graphs.values():
                model = onnx.load(bundle.path(graph), load_external_data=False)
                onnx.save(emulate_bfloat16(model), folder / graph)
        yield Bundle(folder, bundle.manifest, bundle.hash)


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file systems differ."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _bfloat16_values(model: ModelProto) -> set[str]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    typed = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    return typed | {t.name for t in graph.initializer if t.data_type == TensorProto.BFLOAT16}


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"Cast_{target}", to=to)

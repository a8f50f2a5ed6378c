"""What ONNX Runtime's CPU provider has no kernels for: the very files that ship, rewritten so that it can run them.

Of bfloat16 it has no matrix product: wherever a graph makes a bfloat16, the float32 in its place is rounded to it. Of
float16 it lacks some operators that graphs for CUDA are written in: those are verified in float32.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..runtime.bundle import FUSED, GOLDEN, KINDS, RESIDENT, WEIGHTS, Bundle

WIDE = ".float32"  # behind the name of a value in half precision: the same in float32
_ON_DEVICE = (RESIDENT, *FUSED.values())


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
    with _rewritten(bundle, (*KINDS, *_ON_DEVICE), emulate_bfloat16) as found:
        yield found


def widen_float16(model: ModelProto) -> ModelProto:
    """Rewrite a graph, in place, to compute in float32; its weights stay where they are, and are what they were."""
    halves = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    for node in model.graph.node:
        node.input[:] = [name + WIDE if name in halves else name for name in node.input]
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for name in sorted(halves):
        model.graph.node.insert(0, _cast(name, name + WIDE, TensorProto.FLOAT))
    return model


@contextlib.contextmanager
def widened(bundle: Bundle) -> Iterator[Bundle]:
    """Of an fp16 bundle a temporary one in fp32: the graphs that keep their state on a device, and no others."""
    with _rewritten(bundle, _ON_DEVICE, widen_float16) as found:
        yield replace(found, manifest=replace(bundle.manifest, precision="fp32"))


@contextlib.contextmanager
def _rewritten(bundle: Bundle, kinds: Collection[str], rewrite: Callable[[ModelProto], ModelProto]) -> Iterator[Bundle]:
    """A temporary bundle of other graphs on the same weights."""
    with tempfile.TemporaryDirectory(prefix="tarflow-rewritten.") as name:
        folder = Path(name)
        for file in (WEIGHTS, GOLDEN):  # graphs may only refer to weights in their own folder
            if (bundle.folder / file).exists():
                _link(bundle.path(file).resolve(), folder / file)
        for block in bundle.manifest.blocks:
            for kind in block.graphs.keys() & kinds:
                model = onnx.load(bundle.path(block.graphs[kind]), load_external_data=False)
                onnx.save(rewrite(model), folder / block.graphs[kind])
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

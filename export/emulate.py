"""bfloat16 on a CPU that has no bfloat16 matrix product: the same graph, every bfloat16 value a rounded float32.

ONNX Runtime's CPU provider cannot run a bf16 graph, so a bf16 bundle is verified through this rewriting of the very
files that ship: wherever the graph makes a bfloat16, the float32 in its place is rounded to bfloat16.
"""

from __future__ import annotations

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper


def emulate_bfloat16(model: ModelProto) -> ModelProto:
    """Rewrite a graph, in place; its weights stay where they are."""
    names = _bfloat16_values(model)
    nodes: list[NodeProto] = [
        _cast(value.name, _wide(value.name), TensorProto.FLOAT)
        for value in (*model.graph.input, *model.graph.initializer)
        if value.name in names
    ]
    for node in model.graph.node:
        made = [name for name in node.output if name in names]
        node.input[:] = [_wide(name) if name in names else name for name in node.input]
        if node.op_type != "Cast":  # a cast to bfloat16 already rounds
            node.output[:] = [f"{name}.exact" if name in names else name for name in node.output]
        nodes.append(node)
        for name in made:
            if node.op_type != "Cast":
                nodes.append(_cast(f"{name}.exact", name, TensorProto.BFLOAT16))
            nodes.append(_cast(name, _wide(name), TensorProto.FLOAT))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _bfloat16_values(model: ModelProto) -> set[str]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    typed = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    return typed | {t.name for t in graph.initializer if t.data_type == TensorProto.BFLOAT16}


def _wide(name: str) -> str:
    return f"{name}.float32"


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"Cast_{target}", to=to)

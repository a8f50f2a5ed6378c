"""A graph written operator by operator: its nodes in the order in which they run, and the weights that they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

Value = ir.Value
Attributes = Mapping[str, int | float | list[int]]
OWN = "com.microsoft"  # the domain of ONNX Runtime's own operators
_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}


class Tape:
    """``weights`` are read by their names, and have no values yet; ``half`` is the type of products.

    Weights and constants that are cast, gathered or added up among themselves are so when a session opens, and cost
    no step anything.
    """

    def __init__(self, weights: Mapping[str, Tensor], half: torch.dtype) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, Value] = {}
        self.half = _TYPES[half]
        self._weights = weights

    def op(self, name: str, read: Sequence[Value], attributes: Attributes | None = None) -> Value:
        """One of ONNX's operators."""
        (made,) = self.several(name, read, attributes)
        return made

    def own(self, name: str, read: Sequence[Value], attributes: Attributes | None = None) -> Value:
        """One of ONNX Runtime's."""
        (made,) = self.several(name, read, attributes, domain=OWN)
        return made

    def several(
        self,
        name: str,
        read: Sequence[Value | None],
        attributes: Attributes | None = None,
        count: int = 1,
        domain: str = "",
    ) -> Sequence[Value]:
        """An operator that makes ``count`` tensors."""
        node = ir.node(name, read, attributes or {}, domain=domain, num_outputs=count, name=f"{name}_{len(self.nodes)}")
        self.nodes.append(node)
        return node.outputs

    def weight(self, name: str) -> Value:
        """As the weights file has it."""
        if name not in self.initializers:
            tensor = self._weights[name]
            kind = ir.TensorType(_TYPES[tensor.dtype])
            self.initializers[name] = Value(name=name, shape=ir.Shape(tensor.shape), type=kind)
        return self.initializers[name]

    def wide(self, name: str) -> Value:
        """A weight of a product in float32."""
        return self.widen(self.weight(name))

    def constant(self, name: str, array: NDArray[Any]) -> Value:
        if name not in self.initializers:
            tensor = ir.tensor(array, name=name)
            kind = ir.TensorType(tensor.dtype)
            self.initializers[name] = Value(name=name, shape=ir.Shape(array.shape), type=kind, const_value=tensor)
        return self.initializers[name]

    def narrow(self, value: Value) -> Value:
        """float32 -> the type of products."""
        return self._cast(value, self.half)

    def widen(self, value: Value) -> Value:
        """The type of products -> float32."""
        return self._cast(value, ir.DataType.FLOAT)

    def _cast(self, value: Value, to: ir.DataType) -> Value:
        return value if self.half == ir.DataType.FLOAT else self.op("Cast", [value], {"to": to})

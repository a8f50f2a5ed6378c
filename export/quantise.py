"""Weight-only int8: matrix products read int8 weights with one scale an output channel, symmetric, as standard ONNX.

A weight W (out, in) is stored as round(W / scale) in int8, transposed to (in, out), beside scale (out,) in float32. A
graph reads it through DequantizeLinear: TensorRT's parser takes that, and ONNX Runtime makes of it and its MatMul one
product that never leaves int8 (MatMulNBits), a quarter to read in every step. Sums, attention and state stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tarflow.checkpoint import SCALE, reference_name
from tarflow.model import TarFlow

from ..runtime.backend import Array

_LEVELS = 127
_SMALLEST = 32  # inputs and outputs below which int8 saves nothing, and engines have no kernel for it
_SHARE = 8.0  # a layer stays float32 if its share of the error is so many times its share of the weights


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What int8 in one weight alone does to its block: rms error of the latents. ``name`` as in a checkpoint."""

    name: str
    error: float
    size: int


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> int8 (in, out), and scales (out,)."""
    scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / _LEVELS
    levels = (weight / scale.unsqueeze(1)).round().clamp(-_LEVELS, _LEVELS).to(torch.int8)
    return levels.T.contiguous(), scale


def rounded(weight: Tensor) -> Tensor:
    """What int8 makes of a weight, in float32."""
    levels, scale = quantise(weight)
    return levels.T.float() * scale.unsqueeze(1)


@torch.no_grad()
def sensitivities(model: TarFlow, states: Sequence[Array], labels: NDArray[np.int64]) -> list[Sensitivity]:
    """Measure every weight alone. ``states`` are what the blocks encode, (B, T, D) each, the first block's first."""
    classes = torch.from_numpy(labels)

    def encoded(k: int) -> Tensor:
        return model.blocks[k].encode(torch.from_numpy(states[k]), classes)[0]

    found, expected = [], [encoded(k) for k in range(len(model.blocks))]
    for name, (k, linear) in candidates(model).items():
        exact = linear.weight.data
        linear.weight.data = rounded(exact)
        error = (encoded(k) - expected[k]).square().mean().sqrt()
        linear.weight.data = exact
        found.append(Sensitivity(name, float(error), exact.numel()))
    return found


def chosen(measured: Sequence[Sensitivity]) -> frozenset[str]:
    """Weights to store as int8: all but those that carry far more of the error than of the size."""
    error = sum(s.error**2 for s in measured) or 1.0
    size = sum(s.size for s in measured)
    return frozenset(s.name for s in measured if s.error**2 / error <= _SHARE * s.size / size)


def candidates(model: TarFlow) -> dict[str, tuple[int, nn.Linear]]:
    """Weights that could be int8: each one's name in a checkpoint, its block and its module."""
    return {
        reference_name(f"blocks.{k}.{name}.weight"): (k, module)
        for k, block in enumerate(model.blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and min(module.weight.shape) >= _SMALLEST
    }


def read_int8(model: ir.Model, weights: Mapping[str, tuple[ir.ExternalTensor, ir.ExternalTensor]]) -> ir.Model:
    """A copy of a traced float32 graph in which the named weights are (int8, scales) read through DequantizeLinear."""
    model = model.clone()
    graph = model.graph
    for name, (levels, scales) in weights.items():
        nodes = list(dict.fromkeys(node for node, _ in graph.initializers[name].uses()))
        parts = [_external(f"{name}{suffix}", tensor) for suffix, tensor in (("_int8", levels), (SCALE, scales))]
        for part in parts:
            graph.initializers.add(part)
        for node in nodes:  # a DequantizeLinear each: engines fuse one with the product behind it, not with two
            tape = ir.tape.Tape()
            values = tape.op("DequantizeLinear", parts, {"axis": 1})  # (in, out)
            if node.op_type == "Gemm":  # x W^T + bias
                found = tape.op("MatMul", [node.inputs[0], values])
                found = tape.op("Add", [found, node.inputs[2]])
            else:  # MatMul: y W, of a gradient
                found = tape.op("Gemm", [node.inputs[0], values], {"transB": 1})
            ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [found])
        del graph.initializers[name]
    return model


def _external(name: str, tensor: ir.ExternalTensor) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)

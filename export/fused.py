"""Fused: Resident's step of one position in ONNX Runtime's own operators, for its CUDA provider.

A small batch's kernels end sooner than they are launched, so what a step takes is how many there are. Resident has 36
a layer, most of them casts, biases and pieces of attention. Here a layer has 13: SkipLayerNormalization adds a product
and its bias to the residual stream and normalises the sum, BiasGelu takes a bias along, GroupQueryAttention writes the
cache in place and reads the slots that are filled.

Inputs and outputs are Resident's but for ``offsets``: both run by turns on one state. Matrix products and attention are
in the block's precision; the residual stream, its statistics and the patches are float32, and so are the first product
and the last, whose weights are widened when a session opens.

Shapes: B images, T patches, D numbers in a patch, C width, H heads, d head dimension, G guidance branches, R = G * B
rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tarflow.model import Block

from ..runtime.bundle import FUSED, ModelShape
from ..runtime.ports import POSITION, inputs, outputs
from .graphs import BlockGraph
from .tape import OWN, Tape, Value
from .trace import RESIDENT_OPSET, shape_of

_EPSILON = 1e-5  # PyTorch's LayerNorm
_Streams = tuple[Value, Value]  # the residual stream normalised, and as it is


def fits(config: ModelShape) -> bool:
    """Whether attention's kernels take heads of this size."""
    return config.head_dim % 8 == 0 and config.head_dim <= 256


def fuse(block: Block, branches: int) -> ir.Model:
    """The step of a block in the precision of its weights, for 1 or 2 guidance branches.

    Initializers have the names that traced graphs give them, and no values yet.
    """
    tape = Tape(BlockGraph(block).state_dict(), block.proj_in.weight.dtype)
    config, kind = shape_of(block.config), FUSED[branches]
    types = {"number": ir.DataType.FLOAT, "index": ir.DataType.INT64, "cache": tape.half}
    taken = [
        Value(name=port.name, shape=ir.Shape(port.axes), type=ir.TensorType(types[port.holds]))
        for port in inputs(config, kind)
    ]
    step = _Step(tape, config, branches, {value.name or "": value for value in taken})
    made = step.outputs(block.reversed)
    for port, value in zip(outputs(config, kind), made, strict=True):
        value.name, value.shape, value.type = port.name, ir.Shape(port.axes), ir.TensorType(types[port.holds])
    weights = list(tape.initializers.values())
    opsets = {"": RESIDENT_OPSET, OWN: 1}
    graph = ir.Graph(taken, made, nodes=tape.nodes, initializers=weights, opset_imports=opsets, name=kind)
    return ir.Model(graph, ir_version=10, producer_name="tarflow")


class _Step:
    def __init__(self, tape: Tape, config: ModelShape, branches: int, read: dict[str, Value]) -> None:
        self.tape, self.config, self.branches, self.read = tape, config, branches, read

    def outputs(self, reverse: bool) -> list[Value]:
        """x and the position after the step, and every layer's cache."""
        op, position, x = self.tape.op, self.read[POSITION], self.read["x"]
        after = op("Add", [position, self.tape.constant("one", np.array([1]))])
        everywhere = op("Tile", [after, op("Shape", [x], {"start": 0, "end": 1})])  # (B,)
        lengths, sharpness = self.lengths(everywhere), self.sharpness()
        n, h = self.embed(position, reverse)
        caches: list[Value] = []
        for k in range(self.config.layers):
            layer = f"block.layers.{k}"
            mixed, *cache = self.attend(k, n, lengths, sharpness)
            n, h = self.add(mixed, h, f"{layer}.attention.proj", f"{layer}.norm")
            up = self.tape.own("BiasGelu", [self.product(n, f"{layer}.up"), self.tape.weight(f"{layer}.up.bias")])
            last = k + 1 == self.config.layers  # whose sum alone is used: any norm will do
            n, h = self.add(up, h, f"{layer}.down", f"{layer}.norm" if last else f"block.layers.{k + 1}.attention.norm")
            caches += cache
        written = op("TensorScatter", [x, self.patch(self.parameters(h, position), after), everywhere], {"axis": -2})
        return [written, after, *caches]

    def embed(self, position: Value, reverse: bool) -> _Streams:
        """What the first layer's attention reads, (R, 1, C)."""
        op, config = self.tape.op, self.config
        table = op("Add", [self.tape.weight("block.pos_embed"), self.tape.wide("block.proj_in.bias")])  # (T, C)
        if reverse:
            table = op("Gather", [table, self.tape.constant("places", np.arange(config.tokens)[::-1].copy())])
        place = self.view(op("Gather", [table, position]), -1)  # (C,)
        patch = self.view(op("Gather", [self.read["x"], position], {"axis": 2}), -1, config.patch_dim)
        known = self.tape.own("FusedMatMul", [patch, self.tape.wide("block.proj_in.weight")], {"transB": 1})  # (B, C)
        if config.classes:
            classes = self.tape.weight("class_table")
        else:  # one row, of nothing
            classes = self.tape.constant("no_class", np.zeros((1, config.width), np.float32))
        rows = op("Gather", [classes, self.read["labels"]])  # (G, B, C)
        n, h = self.normalise(rows, known, place, "block.layers.0.attention.norm")
        return self.view(n, -1, 1, config.width), self.view(h, -1, 1, config.width)

    def attend(self, k: int, n: Value, lengths: Value, sharpness: Value | None) -> Sequence[Value]:
        """Normalised (R, 1, C) -> what layer ``k``'s attention mixes, (R, 1, C), its keys and its values."""
        qkv, config = f"block.layers.{k}.attention.qkv", self.config
        together = self.tape.op("Add", [self.product(n, qkv), self.tape.weight(f"{qkv}.bias")])  # (R, 1, 3 C)
        if sharpness is not None:
            parts = self.view(together, self.branches, -1, 3, config.width)
            together = self.view(self.tape.op("Mul", [parts, sharpness]), -1, 1, 3 * config.width)
        slots = self.tape.constant("slots", np.array([config.tokens], np.int32))
        read = [together, None, None, self.read[f"key_{k}"], self.read[f"value_{k}"], lengths, slots]
        heads = {"num_heads": config.heads, "kv_num_heads": config.heads, "scale": config.head_dim**-0.5}
        return self.tape.several("GroupQueryAttention", read, heads, 3, OWN)

    def add(self, rows: Value, h: Value, linear: str, norm: str) -> _Streams:
        """The residual stream with a product and its bias added to it."""
        made = self.tape.own("FusedMatMul", [rows, self.tape.weight(f"{linear}.weight")], {"transB": 1})
        return self.normalise(self.tape.widen(made), h, self.tape.wide(f"{linear}.bias"), norm)

    def normalise(self, a: Value, b: Value, bias: Value, norm: str) -> _Streams:
        """Of a + b + bias; b and bias are repeated along the axes that they lack."""
        terms = [a, b, self.tape.weight(f"{norm}.weight"), self.tape.weight(f"{norm}.bias"), bias]
        n, _, _, h = self.tape.several("SkipLayerNormalization", terms, {"epsilon": _EPSILON}, 4, OWN)
        return n, h

    def product(self, n: Value, linear: str) -> Value:
        """Normalised (R, 1, C) -> (R, 1, out), without the bias."""
        rows = self.tape.narrow(n)
        return self.tape.own("FusedMatMul", [rows, self.tape.weight(f"{linear}.weight")], {"transB": 1})

    def parameters(self, h: Value, position: Value) -> Value:
        """(R, 1, C) -> log_scale and shift side by side, (B, 1, 2 D), or shift alone, (B, 1, D)."""
        op, parts = self.tape.op, 2 if self.config.nvp else 1
        made = self.tape.own("FusedMatMul", [h, self.tape.wide("block.proj_out.weight")], {"transB": 1})
        made = op("Add", [made, self.tape.wide("block.proj_out.bias")])
        if self.branches == 1:
            return made
        weights = op("Gather", [self.read["mix"], position], {"axis": 2})  # (2, G, 1)
        if not self.config.nvp:
            weights = op("Gather", [weights, self.tape.constant("of_shift", np.array([1]))])
        weights = self.view(op("Transpose", [weights], {"perm": [1, 2, 0]}), self.branches, 1, parts, 1)
        made = op("Mul", [self.view(made, self.branches, -1, parts, self.config.patch_dim), weights])
        made = op("ReduceSum", [made, self.tape.constant("of_branches", np.array([0]))], {"keepdims": 0})
        return self.view(made, -1, 1, parts * self.config.patch_dim)

    def patch(self, parameters: Value, after: Value) -> Value:
        """The patch behind the position, (B, 1, 1, D)."""
        op = self.tape.op
        z = op("Gather", [self.read["z"], after], {"axis": 1})  # (B, 1, D)
        if self.config.nvp:
            log_scale, shift = self.tape.several("Split", [parameters], {"axis": -1, "num_outputs": 2}, 2)
            found = op("Add", [op("Mul", [z, op("Exp", [log_scale])]), shift])
        else:
            found = op("Add", [z, parameters])
        return self.view(found, -1, 1, 1, self.config.patch_dim)

    def lengths(self, everywhere: Value) -> Value:
        """The position as attention takes it, (R,) int32: looked up by the one behind it, which is one kernel."""
        before = np.arange(self.config.tokens, dtype=np.int32) - 1
        table = self.tape.constant("before", np.tile(before, (self.branches, 1)))  # (G, T)
        return self.view(self.tape.op("Gather", [table, everywhere], {"axis": 1}), -1)

    def sharpness(self) -> Value | None:
        """What multiplies a branch's queries, keys and values, (G, 1, 3, 1); None for a single branch."""
        if self.branches == 1:
            return None
        same = self.tape.constant("same", np.ones((self.branches, 2), np.float32))
        each = self.tape.op("Concat", [self.view(self.read["inverse_temperature"], -1, 1), same], {"axis": 1})
        return self.view(self.tape.narrow(each), self.branches, 1, 3, 1)

    def view(self, value: Value, *shape: int) -> Value:
        """No kernel: another shape for the same numbers."""
        name = f"shape_{'_'.join('rest' if size < 0 else str(size) for size in shape)}"
        return self.tape.op("Reshape", [value, self.tape.constant(name, np.array(shape))])

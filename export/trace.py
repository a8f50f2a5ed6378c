"""One module becomes one ONNX graph whose weights lie, by offset, in the bundle's ``weights.safetensors``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from torch import Tensor

from tarflow.checkpoint import DERIVED, SCALE
from tarflow.model import Block

from .graphs import BlockGraph, Forward, Gradient, Resident, Step
from .quantise import read_int8

OPSET = 20  # the first with Gelu as one operator; ONNX Runtime from 1.17 on and TensorRT's parser take it
RESIDENT_OPSET = 24  # the first with TensorScatter, which TensorRT from 10.15 on makes an update in place
KINDS: dict[str, type[BlockGraph]] = {
    "step": Step,
    "forward": Forward,
    "gradient": Gradient,
    "resident": Resident,
}
DIRECTED = ("forward", "gradient")  # a step graph serves blocks of both directions, a resident one after reverse()
WEIGHTS = "weights.safetensors"
# N = B * W and R = G * B tie the axes of a step graph together: facts for the host, not guards for the tracer.
_DEFER: dict[str, Any] = {"prefer_deferred_runtime_asserts_over_guards": True}
_CONSTANT_LIMIT = 4096  # bytes: constants above this must be weights, or the causal mask (one byte an entry)


class TraceError(RuntimeError):
    """The exporter produced a graph that is not what was asked; a defect, not a user's mistake."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies in the weights file."""

    offset: int
    length: int
    dtype: ir.DataType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Port:
    """A graph input or output: its name, an example, and the names of its axes (None: fixed)."""

    name: str
    example: Tensor
    axes: tuple[str | None, ...]


def inputs(kind: str, block: Block, cache_dtype: torch.dtype) -> list[Port]:
    """The inputs of a kind of graph. Example sizes are chosen all different, so that no two axes are confused."""
    config = block.config
    branches, batch, window, slots = 2, 3, 5, 7
    if kind == "step":
        patches, outputs = batch * window, config.patch_dim * (2 if config.nvp else 1)
        return [
            Port("x", torch.randn(patches, config.patch_dim), ("patches", None)),
            Port("z", torch.randn(patches, config.patch_dim), ("patches", None)),
            Port("index", torch.zeros(patches, dtype=torch.int64), ("patches",)),
            Port("labels", torch.zeros(branches, patches, dtype=torch.int64), ("branches", "patches")),
            Port("mix", torch.ones(branches, patches, outputs), ("branches", "patches", None)),
            Port("query_scale", torch.ones(branches * batch, 1, 1, 1), ("rows", None, None, None)),
            Port("bias", torch.zeros(window, slots + window), ("window", "slots + window")),
            *_cache(block, branches * batch, slots, "slots", cache_dtype),
        ]

    def sequence(name: str) -> Port:
        return Port(name, torch.randn(batch, config.tokens, config.patch_dim), ("batch", None, None))

    labels = torch.zeros(branches, batch, dtype=torch.int64)
    if kind == "gradient":
        log_det = Port("grad_log_det", torch.ones(batch), ("batch",))
        return [sequence("x"), Port("labels", labels[:1], (None, "batch")), sequence("grad_z"), log_det]
    branched = [
        Port("labels", labels, ("branches", "batch")),
        Port("mix", torch.ones(2, branches, config.tokens), (None, "branches", None)),
        Port("inverse_temperature", torch.ones(branches), ("branches",)),
    ]
    if kind == "forward":
        return [sequence("x"), *branched]
    return [
        Port("x", torch.randn(batch, 1, config.tokens, config.patch_dim), ("batch", None, None, None)),
        Port("position", torch.zeros(1, dtype=torch.int64), (None,)),
        sequence("z"),
        Port("offsets", torch.arange(min(window, config.tokens - 1)), ("window",)),
        *branched,
        *_cache(block, branches * batch, config.tokens, None, cache_dtype),
    ]


def _cache(block: Block, rows: int, slots: int, axis: str | None, dtype: torch.dtype) -> list[Port]:
    """Keys and values of every layer, each its own tensor: the tracer takes one object passed twice for one input."""
    shape = (rows, block.config.heads, slots, block.config.head_dim)
    return [
        Port(f"{part}_{layer}", torch.zeros(shape, dtype=dtype), ("rows", None, axis, None))
        for layer in range(block.config.layers)
        for part in ("key", "value")
    ]


def outputs(kind: str, block: Block) -> list[tuple[str, tuple[str | int | None, ...]]]:
    """Names of a graph's outputs, and of their axes."""
    if kind == "step":
        return [("x_next", ("patches", None)), ("fresh", ("2 * layers * rows", None, "window", None))]
    if kind == "forward":
        return [("z", ("batch", None, None)), ("log_det", ("batch",))]
    if kind == "gradient":
        return [("grad_x", ("batch", None, None))]
    cache = [f"{part}_{layer}" for layer in range(block.config.layers) for part in ("key", "value")]
    return [
        ("x_next", ("batch", None, None, None)),
        ("position_next", (None,)),
        *((f"{name}_next", ("rows", None, None, None)) for name in cache),
    ]


def trace(kind: str, block: Block, cache_dtype: torch.dtype) -> ir.Model:
    """Trace one kind of graph of a block. Initializers keep the names the graph module gives its weights."""
    ports = inputs(kind, block, cache_dtype)
    module = KINDS[kind](block).eval()
    arguments: list[Tensor | list[Tensor]] = [port.example for port in ports]
    shapes: list[object] = [_dynamic(port.axes) for port in ports]
    if kind in ("step", "resident"):  # the cache is one argument, a list
        fixed = len(ports) - 2 * block.config.layers
        arguments = [*arguments[:fixed], [port.example for port in ports[fixed:]]]
        shapes = [*shapes[:fixed], shapes[fixed:]]
    with torch.no_grad(), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, tuple(arguments), dynamic_shapes=tuple(shapes), strict=False, **_DEFER)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=RESIDENT_OPSET if kind == "resident" else OPSET,
            custom_translation_table={torch.ops.tarflow.write_slots.default: _tensor_scatter},
            verbose=False,
        )
    assert exported is not None
    model = exported.model
    _name(model, ports, outputs(kind, block))
    _strip(model)
    _check_constants(model, module, block.config.tokens)
    return model


def place(model: ir.Model, block: int, stored: Mapping[str, Stored], rename: Mapping[str, str], path: Path) -> None:
    """Write a traced graph for one block: every weight becomes a reference into the weights file beside it.

    ``rename`` maps initializer names to names, in block ``block``, in the weights file. A graph traced from one
    block serves every block of its direction, and of both if its kind is not in ``DIRECTED``.
    """
    int8 = {}
    for name, value in model.graph.initializers.items():
        if name not in rename:
            continue
        weight = _external(name, stored[rename[name]], path.parent)
        if weight.dtype == ir.DataType.INT8:
            int8[name] = weight, _external(name + SCALE, stored[f"{DERIVED}{rename[name]}{SCALE}"], path.parent)
        else:
            value.const_value = weight
    if int8:
        model = read_int8(model, int8)
    model.graph.name = f"block_{block:02d}"
    ir.save(model, path)


def _external(name: str, where: Stored, folder: Path) -> ir.ExternalTensor:
    shape = ir.Shape(where.shape)
    return ir.ExternalTensor(WEIGHTS, where.offset, where.length, where.dtype, shape=shape, name=name, base_dir=folder)


def reverse(model: ir.Model, tokens: int) -> ir.Model:
    """A copy of a resident graph for blocks of the other direction: it takes places from the sequence's other end."""
    model = model.clone()
    last = ir.tensor([tokens - 1], ir.DataType.INT64)
    table = model.graph.initializers["block.pos_embed"]
    (embed,) = (node for node, _ in table.uses())
    tape = ir.tape.Tape()
    place = tape.op("Sub", [tape.initializer(last, "last_place"), embed.inputs[1]])
    for value in tape.initializers:
        model.graph.initializers.add(value)
    model.graph.insert_before(embed, tape.nodes)
    embed.replace_input_with(1, place)
    _strip(model)
    return model


def pingpong(model: ir.Model) -> ir.Model:
    """A copy of a resident graph for parsers without TensorScatter: its state outputs are new tensors, not updates.

    Every update becomes Where(slot is in the window, the window's entry for it, the old slot).
    """
    model = model.clone()
    model.opset_imports[""] = OPSET
    for node in [node for node in model.graph if node.op_type == "TensorScatter"]:
        slots, fresh, positions = node.inputs
        tape = ir.tape.Tape()
        numbers = tape.initializer(ir.tensor(range(_slots(slots)), ir.DataType.INT64), f"{node.name}.numbers")
        zero, one = (tape.initializer(ir.tensor([k], ir.DataType.INT64), f"{node.name}.{k}") for k in (0, 1))
        window = tape.op("Shape", [fresh], {"start": 2, "end": 3})
        offset = tape.op("Sub", [numbers, tape.op("Gather", [positions, zero])])  # (T,), slot 0 of the window is 0
        inside = tape.op("And", [tape.op("GreaterOrEqual", [offset, zero]), tape.op("Less", [offset, window])])
        nearest = tape.op("Min", [tape.op("Max", [offset, zero]), tape.op("Sub", [window, one])])
        entry = tape.op("Gather", [fresh, nearest], {"axis": 2})
        written = tape.op("Where", [tape.op("Unsqueeze", [inside, one]), entry, slots])
        for value in tape.initializers:
            model.graph.initializers.add(value)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [written])
    _strip(model)
    return model


def _slots(cache: ir.Value | None) -> int:
    assert cache is not None
    assert cache.shape is not None
    size = cache.shape[2]
    assert isinstance(size, int)
    return size


def weight_names(module: BlockGraph) -> list[str]:
    """Names of the weights a graph may refer to."""
    return [name for name, _ in (*module.named_parameters(), *module.named_buffers())]


def _dynamic(axes: tuple[str | None, ...]) -> dict[int, object]:
    return {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(axes) if axis is not None}


def _tensor_scatter(slots: Any, fresh: Any, positions: Any) -> Any:
    """``write_slots`` in ONNX (TensorScatter-24); onnxscript has no module for that opset yet."""
    return onnxscript.values.Opset("", RESIDENT_OPSET).TensorScatter(slots, fresh, positions, axis=-2, mode="linear")


def _name(model: ir.Model, ports: list[Port], results: list[tuple[str, tuple[str | int | None, ...]]]) -> None:
    """Give inputs, outputs and axes the names of the field instead of the tracer's."""
    if len(model.graph.inputs) != len(ports):
        raise TraceError(f"traced {len(model.graph.inputs)} inputs; expected {len(ports)}")
    for value, port in zip(model.graph.inputs, ports, strict=True):
        value.name = port.name
        value.shape = ir.Shape([axis or size for axis, size in zip(port.axes, port.example.shape, strict=True)])
    for value, (name, axes) in zip(model.graph.outputs, results, strict=True):
        value.name = name
        assert value.shape is not None
        value.shape = ir.Shape([axis or size for axis, size in zip(axes, value.shape, strict=True)])


def _strip(model: ir.Model) -> None:
    """Drop what no runtime reads: the tracer's notes, and inferred shapes that still use its axis names."""
    kept = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    model.producer_name, model.producer_version, model.doc_string = "tarflow", None, None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for number, node in enumerate(model.graph.all_nodes()):
        node.metadata_props.clear()
        node.doc_string = None
        node.name = f"{node.op_type}_{number}"
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in kept:
                value.shape, value.type = None, None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _check_constants(model: ir.Model, module: BlockGraph, tokens: int) -> None:
    """Every large constant must be a weight under its own name: a folded copy could not be shared."""
    known = set(weight_names(module))
    for name, value in model.graph.initializers.items():
        size = value.const_value.nbytes if value.const_value is not None else 0
        if name not in known and size > max(_CONSTANT_LIMIT, tokens * tokens):
            raise TraceError(f"the exporter folded weights into a private constant '{name}' of {size} bytes")


class _quiet:
    """Silences the exporter's logging; its errors are exceptions anyway."""

    def __enter__(self) -> None:
        self.previous = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(self.previous)

"""One module becomes one ONNX graph whose weights lie, by offset, in the bundle's ``weights.safetensors``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript
import torch

from tarflow.checkpoint import DERIVED, SCALE
from tarflow.config import Config
from tarflow.model import Block

from ..runtime.bundle import RESIDENT, ModelShape
from ..runtime.ports import Port, Sizes, inputs, outputs, shape
from .gradient import Gradient
from .graphs import BlockGraph, Forward, Resident, Step
from .quantise import read_int8

OPSET = 20  # the first with Gelu as one operator; ONNX Runtime from 1.17 on and TensorRT's parser take it
RESIDENT_OPSET = 24  # the first with TensorScatter, which TensorRT from 10.15 on makes an update in place
KINDS: dict[str, type[BlockGraph]] = {"step": Step, "forward": Forward, "gradient": Gradient, RESIDENT: Resident}
DIRECTED = ("forward", "gradient")  # a step graph serves blocks of both directions, a resident one after reverse()
_SIZES = Sizes(batch=3, branches=2, window=5, slots=7)  # all different, so that no two axes are confused
# N = B * W and R = G * B tie the axes of a step graph together: facts for the host, not guards for the tracer.
_DEFER: dict[str, Any] = {"prefer_deferred_runtime_asserts_over_guards": True}
_CONSTANT_LIMIT = 4096  # bytes: constants above this must be weights, or the causal mask (one byte an entry)


class TraceError(RuntimeError):
    """The exporter produced a graph that is not what was asked; a defect, not a user's mistake."""


def shape_of(config: Config) -> ModelShape:
    """A model's numbers as a bundle states them."""
    return ModelShape(**asdict(config))


def trace(kind: str, block: Block, cache_dtype: torch.dtype) -> ir.Model:
    """Trace one kind of graph of a block. Initializers keep the names the graph module gives its weights."""
    config = shape_of(block.config)
    module = KINDS[kind](block).eval()
    sizes = replace(_SIZES, window=min(_SIZES.window, config.tokens - 1)) if kind == RESIDENT else _SIZES
    types = {"number": torch.float32, "index": torch.int64, "cache": cache_dtype}
    ports = inputs(config, kind)
    arguments: list[Any] = [torch.zeros(shape(port, sizes), dtype=types[port.holds]) for port in ports]
    axes: list[Any] = [_dynamic(port) for port in ports]
    fixed = sum(port.holds != "cache" for port in ports)
    if fixed < len(ports):  # the cache is one argument, a list
        arguments = [*arguments[:fixed], arguments[fixed:]]
        axes = [*axes[:fixed], axes[fixed:]]
    with torch.no_grad(), warnings.catch_warnings(action="ignore"), _quiet():
        program = torch.export.export(module, tuple(arguments), dynamic_shapes=tuple(axes), strict=False, **_DEFER)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=RESIDENT_OPSET if kind == RESIDENT else OPSET,
            custom_translation_table={torch.ops.tarflow.write_slots.default: _tensor_scatter},
            verbose=False,
        )
    assert exported is not None
    model = exported.model
    _name(model.graph.inputs, ports)
    _name(model.graph.outputs, outputs(config, kind))
    _strip(model)
    _check_constants(model, module, config.tokens)
    return model


def place(
    model: ir.Model, block: int, stored: Mapping[str, ir.ExternalTensor], rename: Mapping[str, str], path: Path
) -> None:
    """Write a traced graph for one block: every weight becomes a reference into the weights file beside it.

    ``rename`` maps initializer names to names, in block ``block``, in the weights file. A graph traced from one
    block serves every block of its direction, and of both if its kind is not in ``DIRECTED``.
    """
    int8 = {}
    for name, value in model.graph.initializers.items():
        if name not in rename:
            continue
        weight = stored[rename[name]]
        if weight.dtype == ir.DataType.INT8:
            int8[name] = weight, stored[f"{DERIVED}{rename[name]}{SCALE}"]
        else:
            value.const_value = weight
    if int8:
        model = read_int8(model, int8)
    model.graph.name = f"block_{block:02d}"
    ir.save(model, path)


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


def _dynamic(port: Port) -> dict[int, object]:
    return {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(port.axes) if isinstance(axis, str)}


def _tensor_scatter(slots: Any, fresh: Any, positions: Any) -> Any:
    """``write_slots`` in ONNX (TensorScatter-24); onnxscript has no module for that opset yet."""
    return onnxscript.values.Opset("", RESIDENT_OPSET).TensorScatter(slots, fresh, positions, axis=-2, mode="linear")


def _name(values: Sequence[ir.Value], ports: Sequence[Port]) -> None:
    """Give inputs or outputs and their axes the names of the field instead of the tracer's."""
    if len(values) != len(ports):
        raise TraceError(f"traced {len(values)} inputs or outputs; expected {len(ports)}")
    for value, port in zip(values, ports, strict=True):
        value.name, value.shape = port.name, ir.Shape(port.axes)


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
    known = module.state_dict()
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

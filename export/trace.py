"""One module becomes one ONNX graph whose weights lie, by offset, in the bundle's ``weights.safetensors``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from tarflow.model import Block

from .graphs import BlockGraph, Forward, Gradient, Step

OPSET = 20  # the first with Gelu as one operator; ONNX Runtime from 1.17 on and TensorRT's parser take it
KINDS: dict[str, type[BlockGraph]] = {"step": Step, "forward": Forward, "gradient": Gradient}
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
        shape = (branches * batch, config.heads, slots, config.head_dim)
        return [
            Port("x", torch.randn(patches, config.patch_dim), ("patches", None)),
            Port("z", torch.randn(patches, config.patch_dim), ("patches", None)),
            Port("index", torch.zeros(patches, dtype=torch.int64), ("patches",)),
            Port("labels", torch.zeros(branches, patches, dtype=torch.int64), ("branches", "patches")),
            Port("mix", torch.ones(branches, patches, outputs), ("branches", "patches", None)),
            Port("query_scale", torch.ones(branches * batch, 1, 1, 1), ("rows", None, None, None)),
            Port("bias", torch.zeros(window, slots + window), ("window", "slots + window")),
            *(  # each its own tensor: the tracer takes one object passed twice for one input
                Port(f"{part}_{layer}", torch.zeros(shape, dtype=cache_dtype), ("rows", None, "slots", None))
                for layer in range(config.layers)
                for part in ("key", "value")
            ),
        ]

    def sequence(name: str) -> Port:
        return Port(name, torch.randn(batch, config.tokens, config.patch_dim), ("batch", None, None))

    labels = torch.zeros(branches, batch, dtype=torch.int64)
    if kind == "gradient":
        log_det = Port("grad_log_det", torch.ones(batch), ("batch",))
        return [sequence("x"), Port("labels", labels[:1], (None, "batch")), sequence("grad_z"), log_det]
    return [
        sequence("x"),
        Port("labels", labels, ("branches", "batch")),
        Port("mix", torch.ones(2, branches, config.tokens), (None, "branches", None)),
        Port("inverse_temperature", torch.ones(branches), ("branches",)),
    ]


OUTPUTS: dict[str, list[tuple[str, tuple[str | int | None, ...]]]] = {
    "step": [("x_next", ("patches", None)), ("fresh", ("2 * layers * rows", None, "window", None))],
    "forward": [("z", ("batch", None, None)), ("log_det", ("batch",))],
    "gradient": [("grad_x", ("batch", None, None))],
}


def trace(kind: str, block: Block, cache_dtype: torch.dtype) -> ir.Model:
    """Trace one kind of graph of a block. Initializers keep the names the graph module gives its weights."""
    ports = inputs(kind, block, cache_dtype)
    module = KINDS[kind](block).eval()
    arguments: list[Tensor | list[Tensor]] = [port.example for port in ports]
    shapes: list[object] = [_dynamic(port.axes) for port in ports]
    if kind == "step":  # the cache is one argument, a list
        fixed = len(ports) - 2 * block.config.layers
        arguments = [*arguments[:fixed], [port.example for port in ports[fixed:]]]
        shapes = [*shapes[:fixed], shapes[fixed:]]
    with torch.no_grad(), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, tuple(arguments), dynamic_shapes=tuple(shapes), strict=False, **_DEFER)
        exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    assert exported is not None
    model = exported.model
    _name(model, kind, ports)
    _strip(model)
    _check_constants(model, module, block.config.tokens)
    return model


def place(model: ir.Model, block: int, stored: Mapping[str, Stored], rename: Mapping[str, str], path: Path) -> None:
    """Write a traced graph for one block: every weight becomes a reference into the weights file beside it.

    ``rename`` maps initializer names to names, in block ``block``, in the weights file. A graph traced from one
    block serves every block that reads the sequence in the same direction.
    """
    for name, value in model.graph.initializers.items():
        if name not in rename:
            continue
        where = stored[rename[name]]
        value.const_value = ir.ExternalTensor(
            WEIGHTS,
            where.offset,
            where.length,
            where.dtype,
            shape=ir.Shape(where.shape),
            name=name,
            base_dir=path.parent,
        )
    model.graph.name = f"block_{block:02d}"
    ir.save(model, path)


def weight_names(module: BlockGraph) -> list[str]:
    """Names of the weights a graph may refer to."""
    return [name for name, _ in (*module.named_parameters(), *module.named_buffers())]


def _dynamic(axes: tuple[str | None, ...]) -> dict[int, object]:
    return {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(axes) if axis is not None}


def _name(model: ir.Model, kind: str, ports: list[Port]) -> None:
    """Give inputs, outputs and axes the names of the field instead of the tracer's."""
    if len(model.graph.inputs) != len(ports):
        raise TraceError(f"{kind}: traced {len(model.graph.inputs)} inputs; expected {len(ports)}")
    for value, port in zip(model.graph.inputs, ports, strict=True):
        value.name = port.name
        value.shape = ir.Shape([axis or size for axis, size in zip(port.axes, port.example.shape, strict=True)])
    for value, (name, axes) in zip(model.graph.outputs, OUTPUTS[kind], strict=True):
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

"""Does TensorRT take these graphs? Asked of its own parser for every node, and of its builder for every graph."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...quality.parity import Watch
from ...runtime.bundle import Bundle
from ...runtime.errors import BundleError
from ...runtime.tensorrt.library import make_logger
from .blueprint import Blueprint
from .network import Parsed, builder_config
from .options import Options
from .progress import apart, monitor


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a graph, and whether the parser takes it."""

    name: str
    operator: str
    supported: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one graph. ``reason`` says why it was refused or did not build; empty if it did."""

    graph: str
    kind: str
    nodes: tuple[Node, ...]
    built: bool
    seconds: float
    reason: str

    @property
    def refused(self) -> list[Node]:
        return [node for node in self.nodes if not node.supported]


def check(
    bundle: Bundle, options: Options | None = None, watch: Watch = lambda stage: None
) -> tuple[str, list[Verdict]]:
    """Parse and build every graph of a bundle, keeping nothing: TensorRT's name and version, a verdict for each graph.

    Raises MachineError where TensorRT is not installed.
    """
    bundle.check_runnable()
    blueprint = Blueprint.of(bundle, options or Options(batch=(1, 2, 4)))
    verdicts = []
    for entry in bundle.manifest.blocks:
        for kind, graph in entry.graphs.items():
            watch(f"check {graph}")
            verdicts.append(apart(partial(verdict, blueprint, kind, graph)))
    return f"{blueprint.record.package} {blueprint.record.version}", verdicts


def verdict(blueprint: Blueprint, kind: str, graph: str, cancelled: threading.Event) -> Verdict:
    """Parse and build one graph."""
    started = time.monotonic()
    trt, path = blueprint.trt, blueprint.bundle.path(graph)
    nodes = _nodes(trt, path)
    reason = ""
    if all(node.supported for node in nodes):
        try:
            parsed = Parsed(trt, path)
            config = builder_config(parsed, blueprint, kind)
            config.progress_monitor = monitor(trt, lambda fraction: None, cancelled)
            if parsed.built(config) is None:
                reason = parsed.log.take()
        except BundleError as error:
            reason = str(error)
    else:
        reason = "the parser does not take every node"
    return Verdict(graph, kind, nodes, not reason, round(time.monotonic() - started, 2), reason)


def _nodes(trt: Any, path: Path) -> tuple[Node, ...]:
    """Every node of a graph with the parser's verdict on it."""
    import onnx

    names = [(node.name, node.op_type) for node in onnx.load(path, load_external_data=False).graph.node]
    log = make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)  # must outlive its parser
    parser = trt.OnnxParser(network, log)
    whole, taken = parser.supports_model_v2(path.read_bytes(), str(path)), set[int]()
    for number in range(parser.num_subgraphs):
        if parser.is_subgraph_supported(number):
            taken.update(parser.get_subgraph_nodes(number))
    return tuple(Node(name, operator, whole or number in taken) for number, (name, operator) in enumerate(names))

"""Does TensorRT take these graphs? Asked of its own parser for every node, and of its builder for every graph."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...runtime.bundle import Bundle, ModelShape
from ...runtime.errors import BundleError
from ...runtime.resident import cache_names
from ...runtime.tensorrt.backend import make_logger
from ...runtime.tensorrt.record import Record
from .build import (
    Options,
    Parsed,
    Sizes,
    apart,
    builder_config,
    find_tensorrt,
    new_record,
    profile_sizes,
    progress_monitor,
)


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
    bundle: Bundle,
    options: Options | None = None,
    watch: Callable[[str], None] = lambda stage: None,
    package: str | None = None,
) -> tuple[str, list[Verdict]]:
    """Parse and build every graph of a bundle, keeping nothing: TensorRT's name and version, a verdict for each graph.

    Raises MachineError where TensorRT is not installed.
    """
    bundle.check_runnable()
    options = options or Options(batch=(1, 2, 4))
    trt, package = find_tensorrt(package)
    record = new_record(bundle, trt, package, options)
    verdicts = []
    for entry in bundle.manifest.blocks:
        for kind, graph in entry.graphs.items():
            watch(f"check {graph}")
            verdicts.append(apart(partial(_verdict, trt, bundle, record, options, kind, graph)))
    return f"{package} {trt.__version__}", verdicts


def _verdict(
    trt: Any, bundle: Bundle, record: Record, options: Options, kind: str, graph: str, cancelled: threading.Event
) -> Verdict:
    """Parse and build one graph."""
    started = time.monotonic()
    nodes = _nodes(trt, bundle.path(graph))
    reason = ""
    if all(node.supported for node in nodes):
        try:
            parsed = Parsed(trt, bundle.path(graph))
            config = builder_config(parsed, record, options, _profiles(bundle, record, kind))
            config.progress_monitor = progress_monitor(trt, lambda fraction: None, cancelled)
            if parsed.builder.build_serialized_network(parsed.network, config) is None:
                reason = parsed.log.take()
        except BundleError as error:
            reason = str(error)
    else:
        reason = "the parser does not take every node"
    return Verdict(graph, kind, nodes, not reason, round(time.monotonic() - started, 2), reason)


def _profiles(bundle: Bundle, record: Record, kind: str) -> list[Sizes]:
    """What a graph is built for: as its engine is; the host's step graph, of which there is none, likewise."""
    if kind != "step":
        return profile_sizes(bundle.manifest.config, record, "step" if kind in ("resident", "pingpong") else kind)
    config = bundle.manifest.config
    found: list[Sizes] = []
    for profile in record.profiles["step"]:
        slots = 1, max(1, config.tokens // 2), config.tokens  # the host's cache grows from step to step
        found.append(
            [
                _host_step(config, batch, profile.branches, window, filled)
                for batch, window, filled in zip(profile.batch, profile.window, slots, strict=True)
            ]
        )
    return found


def _host_step(config: ModelShape, batch: int, branches: int, window: int, slots: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs of the step graph, whose cache is the host's."""
    patches, rows = batch * window, branches * batch
    outputs = config.patch_dim * (2 if config.nvp else 1)
    return {
        "x": (patches, config.patch_dim),
        "z": (patches, config.patch_dim),
        "index": (patches,),
        "labels": (branches, patches),
        "mix": (branches, patches, outputs),
        "query_scale": (rows, 1, 1, 1),
        "bias": (window, slots + window),
        **dict.fromkeys(cache_names(config), (rows, config.heads, slots, config.head_dim)),
    }


def _nodes(trt: Any, path: Path) -> tuple[Node, ...]:
    """Every node of a graph with the parser's verdict on it."""
    import onnx

    names = [(node.name, node.op_type) for node in onnx.load(path, load_external_data=False).graph.node]
    log = make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)  # must outlive its parser
    parser = trt.OnnxParser(network, log)
    taken = set(range(len(names)))
    if not parser.supports_model_v2(path.read_bytes(), str(path)):
        taken = set()
        for number in range(parser.num_subgraphs):
            if parser.is_subgraph_supported(number):
                taken |= set(parser.get_subgraph_nodes(number))
    return tuple(Node(name, operator, number in taken) for number, (name, operator) in enumerate(names))

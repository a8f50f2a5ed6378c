"""Where the nodes of every graph go, and what passes, steps and windows do on the device."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from bench.gpu.opening import resident_flow
from bench.gpu.standin.log import LAUNCHES, WAITS, Event, bad, calls, note, part, read
from tarflow.runtime.backend import Branches
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.flow import Flow

BATCH, STEPS, WINDOW = 4, 3, 2
PLACED: dict[str, dict[str, Any]] = {}  # by graph


class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
    """A session that remembers where its nodes went, and what was copied between providers for it."""

    def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        with tempfile.TemporaryDirectory() as place:
            options.optimized_model_filepath = str(Path(place) / "optimized.onnx")
            super().__init__(path, options, providers=providers)
            graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
        on_host: Counter[str] = Counter()
        for group in self.get_provider_graph_assignment_info():
            if group.ep_name == "CPUExecutionProvider":
                on_host.update(node.op_type for node in group.get_nodes())
        copies = sum(node.op_type.startswith("Memcpy") for node in graph.node)
        PLACED[Path(path).stem] = {"nodes": len(graph.node), "on the CPU": dict(on_host), "copies": copies}


def audit(bundle: Bundle) -> dict[str, Any]:
    """Open and run all graphs, unguided and guided."""
    onnxruntime.InferenceSession = Session
    flow = resident_flow(bundle, "cuda")
    phases = []
    for guided in (False, True):
        phases += run(flow, guided)
    events = read()
    did = {name: summary(part(events, name)) for name in phases}
    found = {"backend": flow.backend.description, "placement": PLACED, "phases": did, "bad": dict(bad(events))}
    return found | {"libraries": libraries()}


def libraries() -> list[str]:
    """CUDA's, or what stands in for them, that this process has loaded."""
    words = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    return sorted({name for name in (Path(word).name for word in words) if name.startswith(("libcu", "libnv"))})


def run(flow: Flow, guided: bool) -> list[str]:
    """Every kind of work once, each after a note; the names of the notes."""
    config, names, word = flow.config, [], "guided" if guided else "unguided"

    def phase(name: str) -> None:
        names.append(f"{word}-{name}")
        note(names[-1])

    branches = some_branches(flow, 2 if guided else 1)
    z = np.zeros((BATCH, config.tokens, config.patch_dim), np.float32)
    phase("forward")
    flow.backend.forward(0, z, branches)
    if not guided:
        phase("gradient")
        flow.backend.gradient(0, z, branches.labels[0], z, np.zeros(BATCH, np.float32))
    for block in (0, 1):
        phase(f"block-{block}-opened")
        decoding = flow.backend.decoding(block, z, branches)
        for position in range(STEPS):
            phase(f"block-{block}-step-{position}")
            decoding.step(position)
        for position in range(STEPS, STEPS + 3 * WINDOW, WINDOW):
            phase(f"block-{block}-window-{position}")
            decoding.step(position, WINDOW)
        phase(f"block-{block}-step-again")
        decoding.step(STEPS + 3 * WINDOW)
        phase(f"block-{block}-patches")
        decoding.patches()
        decoding.close()
    phase("end")
    return names


def some_branches(flow: Flow, count: int) -> Branches:
    labels = np.zeros((count, BATCH), np.int64) % max(flow.config.classes, 1)
    mix = np.full((2, count, flow.config.tokens), 1 / count, np.float32)
    return Branches(labels, mix, np.ones(count, np.float32))


def summary(events: list[Event]) -> dict[str, int]:
    """What a phase did; zeros left out."""
    found = {
        "launches": calls([event for event in events if not event.captured], *LAUNCHES),
        "captured": sum(event.captured for event in events),
        "graphs launched": calls(events, "cudaGraphLaunch"),
        "copies": calls(events, "cudaMemcpyAsync", "cudaMemcpy2DAsync", "cudaMemcpy"),
        "waits": calls(events, *WAITS),
        "allocations": calls(events, "cudaMalloc", "cudaHostAlloc", "cudaMallocHost"),
    }
    return {name: count for name, count in found.items() if count}

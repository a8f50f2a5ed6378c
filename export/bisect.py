"""Find the first block, step and graph node of a bundle that leaves tolerance of PyTorch.

The oracle's own states are fed to every block, so that one block's error does not reach the next. A graph that is
off is then compared, node by node on the same inputs, with the graph traced anew from the checkpoint.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tarflow.checkpoint import reference_name
from tarflow.model import TarFlow

from ..quality.parity import Pairs, Watch
from ..runtime.backend import Branches
from ..runtime.bundle import WEIGHTS, Bundle
from ..runtime.errors import InputError
from ..runtime.flow import Flow
from ..runtime.ort.backend import OrtBackend
from ..runtime.ort.library import PROVIDERS
from ..runtime.ort.stepwise import StepwiseDecoding
from ..runtime.parts import Feeds, forward_feeds, gradient_feeds
from ..runtime.precision import PRECISIONS
from .comparison import Comparison, oracle_pairs
from .nodes import Evidence, expose, first_difference
from .precision import torch_type, typed
from .trace import KINDS, place, trace
from .weights import int8_names, rename, write_weights


@dataclass(frozen=True, slots=True)
class Suspect:
    """A graph's largest error, absolute, and the inputs that show it. ``step`` is None for forward and gradient."""

    kind: str
    block: int
    step: int | None
    error: float
    feeds: Feeds


@dataclass(frozen=True, slots=True)
class Finding:
    """The first graph that leaves tolerance, and what is wrong with a node of it."""

    suspect: Suspect
    evidence: Evidence

    @property
    def reason(self) -> str:
        where, node = self.suspect, self.evidence.node
        what = f"{where.kind} graph" if where.step is None else f"step {where.step}"
        why = self.evidence.reason
        if node is None:
            why = f"every node agrees with a fresh trace; the error of {where.error:.2g} is the precision's or the "
            why += "provider's own"
        return f"block {where.block}, {what}: {why}"

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        """What the checkpoint calls the weights that the node reads, or the last ones read before it."""
        names = (name.removeprefix("block.").replace("class_table", "class_embed") for name in self.evidence.weights)
        return tuple(reference_name(f"blocks.{self.suspect.block}.{name}") for name in names)

    def to_json(self) -> dict[str, Any]:
        """Without tensors; ``node_error`` is the node's own, relative."""
        node, where = self.evidence.node, self.suspect
        return {
            **{name: getattr(where, name) for name in ("kind", "block", "step", "error")},
            "node": node and node.name,
            "op": node and node.op_type,
            "node_error": node and self.evidence.error,
            "checkpoint_names": list(self.checkpoint_names),
            "reason": self.reason,
        }


def bisect_bundle(
    comparison: Comparison, tolerance: float | None = None, watch: Watch = lambda stage: None
) -> Finding | None:
    """Where a bundle leaves PyTorch, with the node and tensors that show it; None if nowhere.

    ``tolerance`` is the largest absolute error of patches or gradients; by default ten times the precision's rms.
    Raises InputError for a provider that does not run graphs, and as :meth:`Comparison.open`.
    """
    comparison = replace(comparison, opening=comparison.opening.else_on("cpu"))
    provider = comparison.opening.provider_name
    if provider not in PROVIDERS:
        why = "bisecting looks inside ONNX graphs, and engines have none"
        raise InputError.of("provider", f"'{provider}'", f"one of {', '.join(PROVIDERS)}", why)
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise InputError.of("tolerance", tolerance, "a number of 0 or more, such as 1e-3")
    with comparison.open(watch) as found:
        bundle, precision = found.oracle.bundle, PRECISIONS[found.flow.bundle.manifest.precision]
        backend = OrtBackend(found.flow.bundle, comparison.opening, resident=False)
        limit = 10 * precision.tolerance.rms if tolerance is None else tolerance
        suspects = _suspects(backend, found.oracle, oracle_pairs(found.model, bundle, watch), watch)
        suspect = next((one for one in suspects if not one.error <= limit), None)
        if suspect is None:
            return None
        watch(f"trace block {suspect.block}'s {suspect.kind} graph anew")
        graph = bundle.path(bundle.manifest.blocks[suspect.block].graphs[suspect.kind])
        with tempfile.TemporaryDirectory(prefix="tarflow-bisect.") as folder:
            truth = expose(_traced_anew(found.model, bundle, suspect, Path(folder)), suspect.feeds)
        return Finding(suspect, first_difference(expose(graph, suspect.feeds), truth, suspect.feeds, limit))


def _suspects(backend: OrtBackend, oracle: Flow, pairs: Pairs, watch: Watch) -> Iterator[Suspect]:
    """Every result of every graph on the oracle's inputs, and how far it is off, in the order of sampling."""
    plain = Branches.plain(pairs.labels, oracle.config.tokens)
    for block, z, x in pairs.inverses():
        watch(f"block {block}: step graph")
        decoding = backend.decoding(block, z, plain)
        assert isinstance(decoding, StepwiseDecoding)
        for step in range(x.shape[1] - 1):
            decoding.guess(x)  # every step sees the oracle's patches
            decoding.step(step)
            error = float(np.abs(decoding.patches() - x).max())
            yield Suspect("step", block, step, error, decoding.inputs)  # whose cache holds the step's own slot: masked
        watch(f"block {block}: forward graph")
        feeds = forward_feeds(oracle.config, x, plain)
        yield Suspect("forward", block, None, float(np.abs(backend.forward(block, x, plain)[0] - z).max()), feeds)
        watch(f"block {block}: gradient graph")
        ones = np.ones(len(x), np.float32)
        feeds = gradient_feeds(oracle.config, x, pairs.labels, -z, ones)
        expected = oracle.backend.gradient(block, x, pairs.labels, -z, ones)
        scale = max(1.0, float(np.abs(expected).max()))
        error = float(np.abs(backend.gradient(block, x, pairs.labels, -z, ones) - expected).max()) / scale
        yield Suspect("gradient", block, None, error, feeds)


def _traced_anew(model: TarFlow, bundle: Bundle, suspect: Suspect, folder: Path) -> Path:
    """The graph that the checkpoint's block gives, with its weights beside it."""
    precision = PRECISIONS[bundle.manifest.precision]
    block = typed(model.blocks[suspect.block], precision)
    stored = write_weights(model, precision, folder / WEIGHTS, int8_names(bundle.path(WEIGHTS)))
    graph = trace(suspect.kind, block, torch_type(precision))
    place(graph, suspect.block, stored, rename(KINDS[suspect.kind](block), suspect.block), folder / "graph.onnx")
    return folder / "graph.onnx"

"""A bundle opened as this folder opens it: on ONNX Runtime, the state of decoding where the provider computes."""

from __future__ import annotations

from tarflow.runtime.bundle import Bundle
from tarflow.runtime.flow import Flow
from tarflow.runtime.opening import Opening
from tarflow.runtime.ort.backend import OrtBackend


def resident_flow(bundle: Bundle, provider: str, cuda_graph: bool = True) -> Flow:
    """``provider`` is "cuda", "cuda:1" or "cpu". Raises MachineError if it does not start."""
    return Flow(bundle, OrtBackend(bundle, Opening(provider, cuda_graph=cuda_graph), resident=True))


def captures(flow: Flow) -> bool:
    """Whether its steps are recorded as CUDA graphs: asked for, and not given up."""
    backend = flow.backend
    return isinstance(backend, OrtBackend) and backend.sessions.captures

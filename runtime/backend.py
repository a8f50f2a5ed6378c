"""What a flow needs from an engine. A backend satisfies this by having these methods; there is no base class.

Arrays are numpy float32 in patch order; a backend reorders for reversed blocks and owns all device memory.
Shapes: B images, T patches, D numbers in a patch, G guidance branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .errors import InputError, MachineError

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Branches:
    """The guidance branches of a batch: one row of labels, weights and temperature each.

    ``labels`` (G, B) int64, below 0 for the null class. ``mix`` (2, G, T) weighs, at each step in block order, the
    branches' log_scale (row 0) and shift (row 1). ``inverse_temperature`` (G,) multiplies attention logits.
    """

    labels: NDArray[np.int64]
    mix: Array
    inverse_temperature: Array

    @staticmethod
    def plain(labels: NDArray[np.int64], tokens: int) -> Branches:
        """One unguided branch; ``labels`` (B,)."""
        return Branches(labels[None], np.ones((2, 1, tokens), np.float32), np.ones(1, np.float32))


class Decoding(Protocol):
    """One block being inverted for one batch: owns z, the patches found so far, and the KV cache."""

    def guess(self, patches: Array) -> None:
        """Replace the patches found so far, (B, T, D) in patch order: what a window larger than 1 reads."""

    def step(self, position: int, window: int = 1) -> None:
        """From the patches at ``position ... position + window - 1`` (block order), compute the next ones."""

    def patches(self) -> Array:
        """(B, T, D), patch order."""

    def close(self) -> None:
        """Let go of device memory. Optional: a decoding that is dropped lets go of it too."""


class Backend(Protocol):
    """The three graphs of every block, on one engine."""

    description: str  # which engine on which device, for people

    def decoding(self, block: int, z: Array, branches: Branches) -> Decoding:
        """Begin inverting ``block`` on z (B, T, D)."""

    def forward(self, block: int, x: Array, branches: Branches) -> tuple[Array, Array]:
        """x (B, T, D) -> z (B, T, D) and log-determinant in nats (B,)."""

    def gradient(self, block: int, x: Array, labels: NDArray[np.int64], grad_z: Array, grad_log_det: Array) -> Array:
        """Vector-Jacobian product of an unguided ``forward``: (B, T, D)."""


def block_order(sequence: NDArray[Any], reverse: bool) -> NDArray[Any]:
    """Patch order (B, T, ...) to block order and back."""
    return sequence[:, ::-1] if reverse else sequence


def open_backend(
    provider: str,
    bundle: Bundle,
    threads: int | None = None,
    spinning: bool | None = None,
    low_memory: bool = False,
) -> Backend:
    """Open a bundle's graphs on a provider: "cpu" or "cuda" (ONNX Runtime), or "auto" for the best that is here.

    Raises InputError for an unknown provider, MachineError when the machine cannot run it.
    """
    from .ort import PROVIDERS, OrtBackend, load_onnxruntime

    if provider == "auto":
        if PROVIDERS["cuda"] in load_onnxruntime().get_available_providers():
            try:
                return OrtBackend(bundle, "cuda", threads, spinning, low_memory)
            except MachineError:  # compiled in, but there is no GPU: the CPU it is, and ``description`` says so
                pass
        provider = "cpu"
    if provider not in PROVIDERS:
        raise InputError(f"provider '{provider}' is unknown; expected one of auto, {', '.join(PROVIDERS)}")
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; expected 1 or more, or nothing for one a core")
    if bundle.manifest.precision == "bf16" and provider == "cpu":
        raise MachineError(
            "this bundle is bf16, and ONNX Runtime has no bf16 matrix product on CPUs; open it with --provider cuda, "
            "or export for this machine: tarflow export CHECKPOINT --engine fp32"
        )
    return OrtBackend(bundle, provider, threads, spinning, low_memory)

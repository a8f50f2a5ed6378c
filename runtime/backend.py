"""What a flow needs from an engine. A backend satisfies this by having these methods; there is no base class.

Arrays are numpy float32 in patch order; a backend reorders for reversed blocks and owns all device memory.
Shapes: B images, T patches, D numbers in a patch, G guidance branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .errors import BundleError, InputError, MachineError
from .memory import USUAL, Budget

Array = NDArray[np.float32]
WINDOW = 64  # on a device a pass costs the same for any small window; larger ones gain little more
_LONGEST_REASON = 300  # characters, of why "auto" did not take a provider
NAMES = ("auto", "cpu", "cuda", "tensorrt", "ort-tensorrt")


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

    def of(self, rows: slice) -> Branches:
        """The branches of some of the images."""
        return Branches(self.labels[:, rows], self.mix, self.inverse_temperature)


class Decoding(Protocol):
    """One block being inverted for one batch: owns z, the patches found so far, and the KV cache."""

    @property
    def x(self) -> Array:
        """The patches found so far, (B, T, D) in block order, at first the latents; what is written to it is read."""

    def guess(self, patches: Array) -> None:
        """Replace the patches found so far, (B, T, D) in patch order: what a window larger than 1 reads."""

    def step(self, position: int, window: int = 1) -> None:
        """From the patches at ``position ... position + window - 1`` (block order), compute the next ones."""

    def evaluate(
        self, position: int, window: int, rows: NDArray[np.bool_] | None = None, steady: bool = False
    ) -> Array:
        """What :meth:`step` would write, (B, W, D), without writing it; valid until the next call.

        Keys and values of the window are stored. Images not in ``rows`` (B,) need not be computed, and what is returned
        for them means nothing; ``steady`` computes them nevertheless, so that the batch keeps its shape.
        """

    def patches(self) -> Array:
        """(B, T, D), patch order."""

    def close(self) -> None:
        """Let go of device memory. Optional: a decoding that is dropped lets go of it too."""


class Backend(Protocol):
    """The three graphs of every block, on one engine."""

    description: str  # which engine on which device, for people
    machine: str  # provider and device: what a measured plan is true for
    largest_batch: int | None  # images a decoding takes at once; None: what memory holds
    window: int  # positions a parallel pass takes where nothing was measured

    def lanes(self) -> tuple[Backend, int] | None:
        """This engine for callers that are threads themselves, one thread each, and for how many; None on a device."""

    def decoding(self, block: int, z: Array, branches: Branches) -> Decoding:
        """Begin inverting ``block`` on z (B, T, D)."""

    def forward(self, block: int, x: Array, branches: Branches) -> tuple[Array, Array]:
        """x (B, T, D) -> z (B, T, D) and log-determinant in nats (B,)."""

    def gradient(self, block: int, x: Array, labels: NDArray[np.int64], grad_z: Array, grad_log_det: Array) -> Array:
        """Vector-Jacobian product of an unguided ``forward``: (B, T, D)."""


def block_order(sequence: NDArray[Any], reverse: bool) -> NDArray[Any]:
    """Patch order (B, T, ...) to block order and back."""
    return sequence[:, ::-1] if reverse else sequence


def pad_rows(array: NDArray[Any], least: int, axis: int = 0) -> NDArray[Any]:
    """The array with its last row repeated until there are ``least`` of them."""
    missing = least - array.shape[axis]
    if missing <= 0:
        return array
    last = np.take(array, [-1], axis)
    return np.concatenate([array, np.repeat(last, missing, axis)], axis)


def open_backend(
    provider: str,
    bundle: Bundle,
    threads: int | None = None,
    spinning: bool | None = None,
    budget: Budget = USUAL,
    cuda_graph: bool = True,
) -> Backend:
    """Open a bundle on a provider: "cpu", "cuda" or "ort-tensorrt" (ONNX Runtime), "tensorrt" (engines made by
    ``tarflow build``), or "auto": the first of TensorRT, CUDA, CPU that works here; its ``description`` says why not
    the others. ``cuda_graph`` False launches every kernel of every step anew, on "cuda" and "tensorrt".

    Raises InputError for an unknown provider, MachineError when the machine cannot run it, BundleError when the
    bundle has no engines that fit.
    """
    if provider not in NAMES:
        raise InputError(f"provider '{provider}' is unknown; expected one of {', '.join(NAMES)}")
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; expected 1 or more, or nothing for one a core")
    opening = partial(_open, bundle, threads, spinning, budget, cuda_graph)
    if provider != "auto":
        return opening(provider)
    reasons = []
    for name in ("tensorrt", "cuda"):
        try:
            backend = opening(name)
        except (MachineError, BundleError) as error:
            reasons.append(f"not {name}: {briefly(error)}")
        else:
            break
    else:
        backend = opening("cpu")
    backend.description = "; ".join([backend.description, *reasons])
    return backend


def briefly(error: Exception) -> str:
    """The reason in a message, without its advice: the lines of its list if it has one, else its first clause."""
    first, *more = str(error).splitlines()
    listed = [line.strip() for line in more if line.startswith("  ")]
    text = ", ".join(listed) if listed else first.split("; ")[0]
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."


def _open(
    bundle: Bundle, threads: int | None, spinning: bool | None, budget: Budget, cuda_graph: bool, name: str
) -> Backend:
    if name == "tensorrt":
        from .tensorrt.backend import open_tensorrt

        return open_tensorrt(bundle, budget.low_memory, cuda_graph)
    from .ort.backend import OrtBackend

    if bundle.manifest.precision == "bf16" and name == "cpu":
        raise MachineError(
            "this bundle is bf16, and ONNX Runtime has no bf16 matrix product on CPUs; open it with --provider cuda, "
            "or export for this machine: tarflow export CHECKPOINT --engine fp32"
        )
    return OrtBackend(bundle, name, threads, spinning, budget, cuda_graph=cuda_graph)

"""What a flow needs from an engine. A backend satisfies this by having these methods; there is no base class.

Arrays are numpy float32 in patch order; a backend reorders for reversed blocks and owns all device memory.
Shapes: B images, T patches, D numbers in a patch, G guidance branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, Remedy

Array = NDArray[np.float32]
Doubles = NDArray[np.float64]
Labels = NDArray[np.int64]  # below 0 for the null class
Mask = NDArray[np.bool_]
REPRODUCIBLE_TILE = 16  # rows: small enough for one request, large enough to fill a core
WINDOW = 64  # on a device a pass costs the same for any small window; larger ones gain little more


@dataclass(frozen=True, slots=True)
class Branches:
    """The guidance branches of a batch: one row of labels, weights and temperature each.

    ``labels`` (G, B) int64, below 0 for the null class. ``mix`` (2, G, T) weighs, at each step in block order, the
    branches' log_scale (row 0) and shift (row 1). ``inverse_temperature`` (G,) multiplies attention logits.
    """

    labels: Labels
    mix: Array
    inverse_temperature: Array

    @staticmethod
    def plain(labels: Labels, tokens: int) -> Branches:
        """One unguided branch; ``labels`` (B,)."""
        return Branches(labels[None], np.ones((2, 1, tokens), np.float32), np.ones(1, np.float32))

    def of(self, rows: slice) -> Branches:
        """The branches of some of the images."""
        return Branches(self.labels[:, rows], self.mix, self.inverse_temperature)


class Decoding(Protocol):
    """One block being inverted for one batch: owns z, the patches found so far, and the KV cache.

    One whose steps cost no more than a call may have ``walk(stop, on_step)`` besides: steps at the first ``stop``
    positions, of which ``on_step`` is told, perhaps some steps later.
    """

    @property
    def x(self) -> Array:
        """The patches found so far, (B, T, D) in block order, at first the latents; what is written to it is read."""

    def guess(self, patches: Array) -> None:
        """Replace the patches found so far, (B, T, D) in patch order: what a window larger than 1 reads."""

    def step(self, position: int, window: int = 1) -> None:
        """From the patches at ``position ... position + window - 1`` (block order), compute the next ones."""

    def evaluate(self, position: int, window: int, rows: Mask | None = None, steady: bool = False) -> Array:
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
    precision: str  # that blocks are decoded in
    largest_batch: int | None  # images a decoding takes at once; None: what memory holds
    window: int  # positions a parallel pass takes where nothing was measured
    portable: bool  # whether serial decoding has the same bits whatever the batch, the threads and the processor

    def lanes(self) -> tuple[Backend, int] | None:
        """This engine for callers that are threads themselves, one thread each, and for how many; None on a device."""

    def decoding(self, block: int, z: Array, branches: Branches) -> Decoding:
        """Begin inverting ``block`` on z (B, T, D)."""

    def forward(self, block: int, x: Array, branches: Branches) -> tuple[Array, Array]:
        """x (B, T, D) -> z (B, T, D) and log-determinant in nats (B,)."""

    def gradient(self, block: int, x: Array, labels: Labels, grad_z: Array, grad_log_det: Array) -> Array:
        """Vector-Jacobian product of an unguided ``forward``: (B, T, D)."""


class _Closed:
    """What is left of an engine that was let go of: a description, and an InputError for every other use."""

    description = "nothing, as it was closed"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks whether it is there
            raise AttributeError(name)
        message = "this flow was closed; open the bundle again"
        raise InputError(message, field="flow", found="closed", expected="an open one")


CLOSED = cast(Backend, _Closed())  # what to put in the place of an engine to let go of it


def check_window(position: int, window: int, tokens: int) -> None:
    """Raise IndexError for a window whose last position has no next patch: a device drops such writes silently."""
    if position < 0 or window < 1 or position + window >= tokens:
        raise IndexError(f"window {position}...{position + window - 1} has no next patch in {tokens}")


def check_batch(images: int, most: int | None, remedy: Remedy) -> None:
    """Raise InputError for more images than engines take at once."""
    if most is not None and images > most:
        expected = f"{most} at most, which is what these engines take"
        raise InputError.of("batch_size", images, expected, "or build others", remedy)


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

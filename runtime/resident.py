"""Decoding with everything on the device: what lives there, and in which order steps are launched.

Sequence, cache and position are state of the resident graph (FORMAT.md): each step reads them and writes them in
place, so nothing crosses the bus between the first step of a block and the last.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .backend import Array, Branches, Mask, block_order, check_window, pad_rows
from .ports import POSITION
from .spare import Spare


class Steps(Protocol):
    """A resident graph with its tensors in place on some device, ``shape`` (images, branches). One owner at a time."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Copy an array to an input."""

    def read(self, name: str) -> NDArray[Any]:
        """A copy of an input, after everything launched has ended."""

    def launch(self, window: int) -> None:
        """One step from the current position on; may return before it has ended."""


class ResidentDecoding:
    """One block being inverted by :class:`Steps`, which are ``idle`` afterwards; labels as graphs take them.

    Steps of more images than there are compute the last one several times.
    """

    def __init__(self, steps: Steps, idle: Spare[Any], reverse: bool, z: Array, branches: Branches) -> None:
        self._steps, self._idle, self._reversed, self._least = steps, idle, reverse, steps.shape[0]
        self._batch, self._tokens, _ = z.shape
        self._mirror: Array | None = None  # the device's patches, once the host has looked at them
        ordered = self._ordered(z)
        steps.write("z", ordered)
        steps.write("x", ordered[:, None])
        steps.write("labels", np.ascontiguousarray(pad_rows(branches.labels, self._least, 1)))
        steps.write("mix", np.ascontiguousarray(branches.mix))
        steps.write("inverse_temperature", branches.inverse_temperature)
        self._position = -1  # where the device believes it is; -1: whatever an earlier block left
        self._clean = False

    @property
    def x(self) -> Array:
        """The host's copy, which :meth:`evaluate` and :meth:`step` put on the device before they compute."""
        if self._mirror is None:
            self._mirror = self._steps.read("x")[:, 0].copy()
        return self._mirror[: self._batch]

    def guess(self, patches: Array) -> None:
        self._mirror = None
        self._steps.write("x", self._ordered(patches)[:, None])

    def evaluate(self, position: int, window: int, rows: Mask | None = None, steady: bool = False) -> Array:
        """Of all rows, always: what was captured has one shape."""
        before = self.x
        self.step(position, window)
        found: Array = self._steps.read("x")[: self._batch, 0, position + 1 : position + 1 + window]
        self._mirror = pad_rows(before, self._least)
        return found

    def step(self, position: int, window: int = 1) -> None:
        check_window(position, window, self._tokens)
        if self._mirror is not None:
            self._steps.write("x", np.ascontiguousarray(self._mirror[:, None]))
            self._mirror = None
        if position != self._position:
            self._steps.write(POSITION, np.array([position], np.int64))
        self._steps.launch(window)
        self._position = position + window

    def patches(self) -> Array:
        found = self._steps.read("x")[: self._batch, 0] if self._mirror is None else self.x
        # A value that is not finite shows in the patch it leads to. Masked or not, it must not stay in the cache.
        self._clean = bool(np.isfinite(found).all())
        return np.ascontiguousarray(block_order(found, self._reversed))

    def close(self) -> None:
        """Hand the memory to the next block. The decoding must not be used afterwards."""
        if self._clean:
            self._idle.give(self._steps)

    def _ordered(self, patches: Array) -> Array:
        """As the device holds them: in block order, at least so many rows."""
        return np.ascontiguousarray(pad_rows(block_order(patches, self._reversed), self._least))

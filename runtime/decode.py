"""Inverting one block: how many positions a step solves at once, and in which order."""

from __future__ import annotations

from collections.abc import Callable

from .backend import Array, Decoding


def serial(decoding: Decoding, tokens: int, on_step: Callable[[int], None] | None = None) -> Array:
    """One position after the other, T - 1 dependent steps: exact (arXiv 2412.06329).

    ``on_step`` is told each finished position; an exception it raises cancels. Returns patches (B, T, D).
    """
    for position in range(tokens - 1):
        decoding.step(position)
        if on_step is not None:
            on_step(position)
    return decoding.patches()

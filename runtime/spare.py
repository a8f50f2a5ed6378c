"""Memory that one block's decoding leaves to the next: fresh memory costs allocations, and a page fault every 4 KiB."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Spare(Generic[T]):
    """What is free to be used again; nothing where not ``keep``. Safe to use from several threads."""

    def __init__(self, keep: bool) -> None:
        self._keep, self._lock = keep, threading.Lock()
        self._free: list[T] = []

    def take(self, fits: Callable[[T], bool], make: Callable[[], T]) -> T:
        """One that ``fits``, or a new one; what is of another shape is let go of before there are two."""
        with self._lock:
            self._free = [one for one in self._free if fits(one)]
            if self._free:
                return self._free.pop()
        return make()

    def give(self, *spare: T) -> None:
        with self._lock:
            if self._keep:
                self._free += spare

"""Memory that one block's decoding leaves to the next: fresh memory costs allocations, and a page fault every 4 KiB."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class Spare(Generic[T]):
    """What is free to be used again; nothing where not ``keep``. Safe to use from several threads.

    What does not fit is let go of before there are two, but for the last few that have ``room`` (bytes) together.
    """

    def __init__(self, keep: bool, room: int = 0) -> None:
        self._keep, self._room, self._lock = keep, room, threading.Lock()
        self._free: list[T] = []  # the last used last

    def take(self, fits: Callable[[T], bool], make: Callable[[], T]) -> T:
        """One that ``fits``, or a new one."""
        with self._lock:
            found = [one for one in self._free if fits(one)]
            others = self._last([one for one in self._free if not fits(one)])
            dropped, self._free = self._free, others + found
            taken = self._free.pop() if found else None
        del dropped  # not under the lock: what ends may have to wait for another one
        return make() if taken is None else taken

    def give(self, *spare: T) -> None:
        with self._lock:
            if self._keep:
                self._free += spare

    def _last(self, spare: list[T]) -> list[T]:
        """As many of the last as there is room for."""
        sizes = list(accumulate(one.nbytes for one in reversed(spare)))
        return spare[len(spare) - bisect_right(sizes, self._room) :]

"""What lives on a device for as long as somebody here holds it: memory, captured graphs."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from .cuda import Cuda


class Memory:
    """Device memory that is given back when nobody holds it any more."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.address, self.size = cuda.allocate(size), size
        weakref.finalize(self, cuda.free, self.address).atexit = False


class Captured:
    """A captured graph that is destroyed when nobody holds it any more."""

    def __init__(self, cuda: Cuda, launch: Callable[[], None]) -> None:
        self.graph = cuda.capture(launch)
        weakref.finalize(self, cuda.forget, self.graph).atexit = False

"""One block being inverted by the native library."""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backend import Array, Branches, Mask, block_order, check_window
from . import library

_LONGEST = 50e-3  # seconds of steps in one call, in which threads go their own ways: how long a cancellation may wait


class NativeDecoding:
    """What :class:`~tarflow.runtime.backend.Decoding` says. ``model`` (an open model of the library) outlives it."""

    def __init__(self, model: Any, block: int, reverse: bool, z: Array, branches: Branches) -> None:
        self._model, self._reversed = model, reverse
        arrays: list[NDArray[Any]] = [
            np.ascontiguousarray(block_order(z, reverse), np.float32),
            np.ascontiguousarray(branches.labels, np.int64),
            np.ascontiguousarray(branches.mix, np.float32),
            np.ascontiguousarray(branches.inverse_temperature, np.float32),
        ]
        batch = library.Batch(len(z), len(branches.labels), *(array.ctypes.data for array in arrays))
        self._handle = ctypes.c_void_p()
        library.call("begin", model.handle, block, ctypes.byref(batch), ctypes.byref(self._handle))
        self._end = weakref.finalize(self, library.load().tarflow_native_end, self._handle)
        self.x: Array = np.ctypeslib.as_array(library.load().tarflow_native_x(self._handle), z.shape)
        self._together = 1  # steps in one call

    def guess(self, patches: Array) -> None:
        self.x[:] = block_order(patches, self._reversed)

    def step(self, position: int, window: int = 1) -> None:
        check_window(position, window, self.x.shape[1])
        if window == 1:
            library.call("run", self._handle, position, position + 1)
        else:
            self.x[:, position + 1 : position + 1 + window] = self.evaluate(position, window)

    def walk(self, stop: int, on_step: Callable[[int], None]) -> None:
        """Steps from the first position to the one before ``stop``, as many in one call as take 50 milliseconds."""
        position = 0
        while position < stop:
            end, started = min(position + self._together, stop), time.perf_counter()
            library.call("run", self._handle, position, end)
            if 2 * (time.perf_counter() - started) < _LONGEST:
                self._together *= 2
            for finished in range(position, end):
                on_step(finished)
            position = end

    def evaluate(self, position: int, window: int, rows: Mask | None = None, steady: bool = False) -> Array:
        images, tokens, patch_dim = self.x.shape
        check_window(position, window, tokens)
        found = np.zeros((images, window, patch_dim), np.float32)
        chosen = None if rows is None else np.ascontiguousarray(rows, np.uint8)
        place = None if chosen is None else chosen.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        result = found.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        library.call("evaluate", self._handle, position, window, place, result)
        return found

    def patches(self) -> Array:
        return np.array(block_order(self.x, self._reversed))

    def close(self) -> None:
        """Hand its memory to the next block. The decoding must not be used afterwards."""
        self.x = self.x[:0].copy()
        self._end()

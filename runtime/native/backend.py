"""The backend for CPUs: blocks are decoded by the native library, encoded and differentiated by ONNX Runtime.

So a certificate checks one engine by another.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from dataclasses import replace

import numpy as np

from ..backend import Array, Branches, Decoding, Labels
from ..bundle import WEIGHTS, Bundle
from ..errors import InputError
from ..machine import MOST_THREADS, cores_each, processor
from ..memory import spend
from ..opening import Opening
from ..ort.backend import OrtBackend
from . import library
from .decoding import NativeDecoding


class Model:
    """The weights of a bundle, open in the library: each block packed for ``precision`` when it is first decoded."""

    def __init__(self, bundle: Bundle, precision: str, threads: int, one_block: bool) -> None:
        config, self._bundle, self._one_block = bundle.manifest.config, bundle, one_block
        with bundle.path(WEIGHTS).open("rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        weights = np.frombuffer(self._mapped, np.uint8)
        bundle.confirm()  # what is mapped is what was hashed
        shape = library.Shape.of(config)
        kinds = (ctypes.c_int32 * config.blocks)(*[library.PRECISIONS[precision]] * config.blocks)
        self.handle = ctypes.c_void_p()
        place = ctypes.byref(self.handle)
        library.call("open", weights.ctypes.data, len(weights), ctypes.byref(shape), kinds, threads, one_block, place)
        self._close = weakref.finalize(self, _close, library.load(), self.handle, weights)
        self._packed: set[int] = set()  # blocks

    def packed(self, block: int) -> None:
        """A block has been packed by now, of the file that was hashed: its weights are in memory once, and the file's
        pages are let go of. Raises BundleError if the file was changed before that.
        """
        if block not in self._packed:
            self._bundle.confirm()
            self._packed = {block} if self._one_block else {*self._packed, block}
            if hasattr(mmap, "MADV_DONTNEED"):
                self._mapped.madvise(mmap.MADV_DONTNEED)


def _close(loaded: ctypes.CDLL, handle: ctypes.c_void_p, weights: object) -> None:
    """End the library's threads; only then may the ``weights`` be unmapped."""
    loaded.tarflow_native_close(handle)


class NativeBackend:
    """Safe to use from several threads. Raises MachineError where the library was not built."""

    portable = True

    def __init__(self, bundle: Bundle, opening: Opening) -> None:
        self.bundle, self.config = bundle, bundle.manifest.config
        self.precision = opening.weights_in(bundle.manifest.precision)
        if (opening.threads or 0) > MOST_THREADS:
            expected = f"1 to {MOST_THREADS} on the native engine, or nothing for one a core"
            raise InputError.of("threads", opening.threads, expected)
        threads = opening.threads or cores_each(1)
        isa = library.isa()
        budget = spend(bundle, opening.memory, self.precision)
        self.graphs = OrtBackend(bundle, replace(opening, provider="cpu", precision=None), budget=budget)
        self.model = Model(bundle, self.precision, threads, budget.one_block)
        self.description = f"native {self.precision} ({isa}), {self.graphs.description}"
        self.machine = f"native {self.precision} {isa} {processor()}, {threads} threads"
        self.largest_batch: int | None = None
        self.window = self.graphs.window

    def lanes(self) -> None:
        """None: one batch is divided among the library's own threads."""

    def decoding(self, block: int, z: Array, branches: Branches) -> Decoding:
        decoding = NativeDecoding(self.model, block, self.bundle.manifest.blocks[block].reversed, z, branches)
        self.model.packed(block)
        return decoding

    def forward(self, block: int, x: Array, branches: Branches) -> tuple[Array, Array]:
        return self.graphs.forward(block, x, branches)

    def gradient(self, block: int, x: Array, labels: Labels, grad_z: Array, grad_log_det: Array) -> Array:
        return self.graphs.gradient(block, x, labels, grad_z, grad_log_det)

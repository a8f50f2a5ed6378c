"""The little of CUDA that engines need: a device, memory, one stream, captured graphs. Calls go through cuda-python."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import MachineError, Remedy
from ..gpus import numbered

INSTALL = "pip install 'tarflow[tensorrt]'"


class Cuda:
    """A CUDA device, the first or the one named by number or UUID, and a stream on it. Whoever uses either holds it:
    ``with cuda``. Raises MachineError, with one sentence, where there is none, InputError for one that is not here.

    ``api`` is cuda-python's ``cuda.bindings.runtime``; tests bring another with the same functions.
    """

    def __init__(self, api: Any = None, device: str = "") -> None:
        self.api = api if api is not None else _load()
        error, count = self.api.cudaGetDeviceCount()
        if error != self.api.cudaError_t.cudaSuccess or not count:
            raise MachineError(
                f"no NVIDIA GPU can be used here ({_spell(error)}): engines need one, with its driver; "
                "use `provider` cpu, or run on a machine whose nvidia-smi shows a GPU",
                field="provider",
            )
        self.number = numbered(device)
        properties = self._call(self.api.cudaGetDeviceProperties, self.number)
        name = properties.name
        self.name = (name.decode() if isinstance(name, bytes) else str(name)).rstrip("\0")
        self.capability = f"{properties.major}.{properties.minor}"
        self._lock, self._capturing = threading.RLock(), False
        self._waiting: list[tuple[Callable[[Any], None], Any]] = []  # what was let go of during a capture
        with self:
            self.stream = self._call(self.api.cudaStreamCreateWithFlags, self.api.cudaStreamNonBlocking)
        weakref.finalize(self, self.api.cudaStreamDestroy, self.stream).atexit = False

    def __enter__(self) -> Self:
        self._lock.acquire()
        self.api.cudaSetDevice(self.number)  # which is each thread's own, and may be another library's choice
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def allocate(self, size: int) -> int:
        """The address of ``size`` bytes of device memory, all zero. Raises MachineError when there is not so much."""
        error, address = self.api.cudaMalloc(max(size, 1))
        if error != self.api.cudaError_t.cudaSuccess:
            raise MachineError(
                f"the GPU has no {size / 2**30:.2f} GiB of free memory left ({_spell(error)}); use a smaller "
                "`batch_size`, or `memory` least",
                field="batch_size",
            )
        self._call(self.api.cudaMemsetAsync, address, 0, size, self.stream)
        return int(address)

    def let_go(self, end: Callable[[Any], None], what: Any) -> None:
        """End something that nobody holds any more: now, or behind a capture that is going on, which it would spoil.

        Such things end at any time and in any thread, even between the calls of a capture.
        """
        with self:
            if self._capturing:
                self._waiting.append((end, what))
            else:
                end(what)

    def free(self, address: int) -> None:
        """Give device memory back, once everything launched has ended."""
        self.synchronize()
        self._call(self.api.cudaFree, address)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy an array to the device, in the order of the stream."""
        assert array.flags.c_contiguous
        kind = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self.api.cudaMemcpyAsync, address, array.ctypes.data, array.nbytes, kind, self.stream)
        self.synchronize()  # the array may be gone before the copy has been made

    def download(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """A copy of device memory, after everything launched has ended."""
        array: NDArray[Any] = np.empty(shape, dtype)
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self.api.cudaMemcpyAsync, array.ctypes.data, address, array.nbytes, kind, self.stream)
        self.synchronize()
        return array

    def copy(self, target: int, source: int, size: int) -> None:
        """Device to device, in the order of the stream."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call(self.api.cudaMemcpyAsync, target, source, size, kind, self.stream)

    def capture(self, launch: Callable[[], None]) -> Any:
        """Record what ``launch`` puts on the stream, without running it, as a graph to :meth:`replay`."""
        mode = self.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self.api.cudaStreamBeginCapture, self.stream, mode)
        self._capturing = True
        try:
            launch()
        except BaseException:
            with contextlib.suppress(MachineError):
                self._end_capture()  # the stream must leave capture mode, whatever it recorded
            raise
        graph = self._end_capture()
        try:
            return self._call(self.api.cudaGraphInstantiate, graph, 0)
        finally:
            self._call(self.api.cudaGraphDestroy, graph)

    def _end_capture(self) -> Any:
        """What was captured, once all that waited for its end has ended too."""
        try:
            return self._call(self.api.cudaStreamEndCapture, self.stream)
        finally:
            self._capturing = False
            while self._waiting:
                end, what = self._waiting.pop()
                end(what)

    def replay(self, graph: Any) -> None:
        self._call(self.api.cudaGraphLaunch, graph, self.stream)

    def forget(self, graph: Any) -> None:
        """Destroy a captured graph."""
        self._call(self.api.cudaGraphExecDestroy, graph)

    def synchronize(self) -> None:
        """Wait until everything launched has ended; errors of launches surface here."""
        self._call(self.api.cudaStreamSynchronize, self.stream)

    def _call(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        error, *results = function(*arguments)
        if error != self.api.cudaError_t.cudaSuccess:
            name = getattr(function, "__name__", "CUDA")
            raise MachineError(
                f"CUDA failed in {name}: {_spell(error)}. Start the program again; if it stays, see what is wrong here",
                remedy=Remedy("doctor"),
            )
        return results[0] if results else None


class Memory:
    """Device memory that is given back when nobody holds it any more."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.address, self.size = cuda.allocate(size), size
        weakref.finalize(self, cuda.let_go, cuda.free, self.address).atexit = False


class Captured:
    """A captured graph that is destroyed when nobody holds it any more."""

    def __init__(self, cuda: Cuda, launch: Callable[[], None]) -> None:
        self.graph = cuda.capture(launch)
        weakref.finalize(self, cuda.let_go, cuda.forget, self.graph).atexit = False


def _load() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MachineError(f"cuda-python is not installed ({error}); {INSTALL}") from None
    return runtime


def _spell(error: Any) -> str:
    """CUDA's name of an error."""
    return str(getattr(error, "name", error))

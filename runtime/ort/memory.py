"""Memory of a GPU that is given back when nobody holds it any more: ONNX Runtime keeps what it allocates for values.

It takes memory of others by DLPack, as a tensor that whoever handed it in keeps alive.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MachineError
from .device import touching

_LIBRARIES = ("libcudart.so.13", "libcudart.so.12")
_TO_DEVICE = 1  # cudaMemcpyHostToDevice
_CUDA, _FLOAT, _BFLOAT = 2, 2, 4  # DLPack's numbers of a device and of kinds of types
_CAPSULE = b"dltensor"


class _Tensor(ctypes.Structure):
    """DLPack's DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("axes", ctypes.c_int32),
        ("kind", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class DeviceArray:
    """An array of floats on GPU ``number``; uint16 is bfloat16. Whoever makes one touches the device, and holds it for
    as long as anything uses :meth:`lent`. Raises MachineError when there is no memory left.
    """

    def __init__(self, number: int, array: NDArray[Any]) -> None:
        runtime, address = cudart(number), ctypes.c_void_p()
        assert runtime is not None
        if runtime.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(array.nbytes)):
            runtime.cudaGetLastError()  # or others would take it for theirs
            raise MachineError("out of GPU memory for the model's weights; use `memory` least", field="memory")
        weakref.finalize(self, _free, runtime, number, address).atexit = False
        source = ctypes.c_void_p(array.ctypes.data)
        runtime.cudaMemcpy(address, source, ctypes.c_size_t(array.nbytes), _TO_DEVICE)
        runtime.cudaStreamSynchronize(None)  # a copy may be under way when it returns
        self._address, self._number, self._shape, self._type = address, number, array.shape, array.dtype

    def lent(self) -> Any:
        """A capsule of DLPack, for one taker."""
        libc, size = ctypes.CDLL(None), ctypes.sizeof(_Tensor)
        libc.malloc.restype = ctypes.c_void_p
        place = libc.malloc(ctypes.c_size_t(size + 8 * len(self._shape)))  # given back by the taker, with free()
        (ctypes.c_int64 * len(self._shape)).from_address(place + size)[:] = list(self._shape)
        tensor = _Tensor.from_address(place)
        tensor.data, tensor.axes, tensor.shape, tensor.strides = self._address, len(self._shape), place + size, None
        tensor.device[:] = [_CUDA, self._number]
        tensor.kind = _BFLOAT if self._type == np.uint16 else _FLOAT
        tensor.bits, tensor.lanes, tensor.offset, tensor.context = 8 * self._type.itemsize, 1, 0, None
        tensor.deleter = ctypes.cast(libc.free, ctypes.c_void_p)
        wrap = ctypes.pythonapi.PyCapsule_New
        wrap.restype, wrap.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return wrap(place, _CAPSULE, None)


def cudart(number: int) -> Any:
    """CUDA's runtime, on that GPU in this thread; None where it is not to be had, which the provider will explain."""
    runtime = _load()
    return None if runtime is None or runtime.cudaSetDevice(number) else runtime


@functools.cache
def _load() -> Any:
    for name in _LIBRARIES:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _free(runtime: Any, number: int, address: ctypes.c_void_p) -> None:
    with touching:
        runtime.cudaSetDevice(number)
        runtime.cudaFree(address)

"""The compiled library: found beside this file if it was built, its functions with their types. See src/native.h."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_uint8, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import BundleError, InputError, MachineError, Remedy, TarflowError
from ..manifest import ModelShape
from ..opening import NATIVE_PRECISIONS

PRECISIONS = {name: number for number, name in enumerate(NATIVE_PRECISIONS)}  # native.h has them in this order
_WRONG, _MEMORY = 1, 2


class Shape(Structure):
    """``tarflow_native_shape``."""

    sizes = ("tokens", "patch_dim", "width", "head_dim", "layers", "blocks", "classes")
    _fields_ = [*((name, c_int64) for name in sizes), ("nvp", c_int32)]

    @classmethod
    def of(cls, config: ModelShape) -> Shape:
        return cls(nvp=config.nvp, **{name: getattr(config, name) for name in cls.sizes})


class Batch(Structure):
    """``tarflow_native_batch``."""

    _arrays = ("z", "labels", "mix", "inverse_temperature")
    _fields_ = [("images", c_int64), ("branches", c_int64), *((name, c_void_p) for name in _arrays)]


_ARGUMENTS = {
    "open": [c_void_p, c_uint64, POINTER(Shape), POINTER(c_int32), c_int32, c_int32, POINTER(c_void_p)],
    "begin": [c_void_p, c_int64, POINTER(Batch), POINTER(c_void_p)],
    "run": [c_void_p, c_int64, c_int64],
    "evaluate": [c_void_p, c_int64, c_int64, POINTER(c_uint8), POINTER(c_float)],
}


@cache
def load() -> ctypes.CDLL:
    """The library. Raises MachineError where it was not built, or cannot be loaded."""
    built = sorted(Path(__file__).parent.glob("_decoder*.so"))
    if not built:
        raise MachineError(
            "the native engine was not built when tarflow was installed, for want of a C++ compiler; install one and "
            "tarflow again, or use `provider` cpu",
            field="provider",
            found="native",
            expected="cpu",
        )
    try:
        library = ctypes.CDLL(str(built[0]))
    except OSError as error:
        raise MachineError(f"the native engine '{built[0]}' cannot be loaded: {error}; install tarflow again") from None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, f"tarflow_native_{name}")
        function.argtypes, function.restype = arguments, c_int32
    for name in ("close", "end", "x"):
        getattr(library, f"tarflow_native_{name}").argtypes = [c_void_p]
    library.tarflow_native_close.restype = library.tarflow_native_end.restype = None
    library.tarflow_native_x.restype = POINTER(c_float)
    for name in ("message", "isa", "slower"):
        getattr(library, f"tarflow_native_{name}").restype = c_char_p
    return library


def isa() -> str:
    """The instruction set it uses, by the names that TARFLOW_ISA takes. Raises InputError if that names another."""
    found: bytes | None = load().tarflow_native_isa()
    if found is None:
        raise InputError(_message())
    return found.decode()


def slower() -> str | None:
    """Why ONNX Runtime is the better choice on this machine, or None. Raises MachineError and InputError."""
    isa()
    found: bytes | None = load().tarflow_native_slower()
    return None if found is None else found.decode()


def call(name: str, *arguments: Any) -> None:
    """Call a function. Raises what its code means."""
    code = getattr(load(), f"tarflow_native_{name}")(*arguments)
    if code:
        raise _error(code)


def _error(code: int) -> TarflowError:
    if code == _WRONG:
        return BundleError(f"the native engine cannot run this bundle: {_message()}", remedy=Remedy("export"))
    if code == _MEMORY:
        return MachineError(f"the native engine: {_message()}; use smaller batches, or `memory` least")
    return MachineError(f"the native engine failed: {_message()}")


def _message() -> str:
    text: bytes = load().tarflow_native_message()
    return text.decode(errors="replace")

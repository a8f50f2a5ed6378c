"""libtarflow through ctypes: the C API as a C program sees it, for tests that hold the two runtimes together."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

SOURCE = Path(__file__).parent.parent / "runtime" / "cpp"
LIBRARY = Path(os.environ.get("TARFLOW_LIBRARY", SOURCE / "build" / "dev" / "libtarflow.so"))
OK, INPUT, MACHINE, BUNDLE, CANCELLED, BUSY, DEFECT = 0, 2, 3, 4, 5, 6, 7
Array = NDArray[np.float32]
PROGRESS = ctypes.CFUNCTYPE(c_int, c_void_p, c_int64, c_int64, c_int, c_int)
PREVIEW = ctypes.CFUNCTYPE(c_int, c_void_p, c_int, c_uint64, c_int64, POINTER(c_float))
LOG = ctypes.CFUNCTYPE(c_int, c_void_p, c_int, c_char_p)


class OpenOptions(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        *((name, c_char_p) for name in ("provider", "onnxruntime")),
        *((name, c_int32) for name in ("threads", "spinning", "low_memory")),
        ("log", LOG),
        ("user", c_void_p),
        ("cuda_graph", c_int32),
        ("precision", c_char_p),
    ]


class Shape(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        *((name, c_int32) for name in ("channels", "image_size", "patch_size", "tokens", "patch_dim")),
        *((name, c_int32) for name in ("blocks", "layers", "width", "classes", "denoises")),
        ("image_numbers", c_int64),
        *((name, c_char_p) for name in ("name", "precision", "backend", "bundle")),
    ]


class SampleOptions(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        *((name, c_uint64) for name in ("seed", "first_sample")),
        ("guidance", c_double),
        ("guided", c_char_p),
        *((name, c_int32) for name in ("annealed", "certify")),
        *((name, c_double) for name in ("attention_temperature", "denoise")),
        ("batch_size", c_int64),
        *((name, c_int32) for name in ("reproducible", "redraw_nonfinite")),
        ("progress", PROGRESS),
        ("preview", PREVIEW),
        ("user", c_void_p),
    ]


def onnxruntime_library() -> str:
    """The library inside pip's onnxruntime package."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    (found,) = (Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*")
    return str(found)


class CppError(Exception):
    """A status other than TARFLOW_OK, and the handle's message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.tarflow_error.restype = library.tarflow_version.restype = c_char_p
    library.tarflow_error.argtypes = library.tarflow_close.argtypes = [c_void_p]
    library.tarflow_open.argtypes = [c_char_p, POINTER(OpenOptions), POINTER(c_void_p)]
    library.tarflow_get_shape.argtypes = [c_void_p, POINTER(Shape)]
    library.tarflow_sample.argtypes = [c_void_p, c_int64, c_void_p, POINTER(SampleOptions), c_void_p]
    library.tarflow_decode.argtypes = [c_void_p, c_int64, c_void_p, c_void_p, POINTER(SampleOptions), c_void_p]
    library.tarflow_certificate.argtypes = [c_void_p, c_int64, c_void_p]
    library.tarflow_log_prob.argtypes = [c_void_p, c_int64, c_void_p]
    library.tarflow_encode.argtypes = [c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p]
    library.tarflow_log_likelihood.argtypes = [c_void_p, c_int64, c_void_p, c_void_p, c_void_p]
    library.tarflow_denoise.argtypes = [c_void_p, c_int64, c_void_p, c_void_p, c_double, c_void_p]
    library.tarflow_noise.argtypes = [c_void_p, c_uint64, c_uint64, c_int64, c_void_p]
    return library


class CppFlow:
    """An open handle. Methods mirror Flow's, and raise CppError."""

    def __init__(self, bundle: str | os.PathLike[str], **options: Any) -> None:
        self.library = load()
        self.handle = c_void_p()
        given = OpenOptions(
            ctypes.sizeof(OpenOptions), b"cpu", onnxruntime_library().encode(), 0, 1, 0, LOG(), None, 1, None
        )
        for name, value in options.items():
            setattr(given, name, value)
        self._check(self.library.tarflow_open(os.fsencode(bundle), byref(given), byref(self.handle)))
        self.shape = Shape(ctypes.sizeof(Shape))
        self._check(self.library.tarflow_get_shape(self.handle, byref(self.shape)))

    def sample(
        self, n: int | None = None, *, noise: Array | None = None, labels: ArrayLike | None = None, **options: Any
    ) -> Array:
        n = len(noise) if noise is not None else int(n or 0)
        shape = (max(n, 0), self.shape.channels, self.shape.image_size, self.shape.image_size)
        images, classes = np.full(shape, np.nan, np.float32), self._labels(labels, n)
        last = pointer(classes), byref(sample_options(**options)), pointer(images)
        if noise is None:
            self._check(self.library.tarflow_sample(self.handle, n, *last))
        else:
            noise = np.ascontiguousarray(noise, np.float32)
            self._check(self.library.tarflow_decode(self.handle, n, pointer(noise), *last))
        return images

    def certificate(self, n: int) -> Array:
        errors = np.empty(n, np.float32)
        self._check(self.library.tarflow_certificate(self.handle, n, pointer(errors)))
        return errors

    def log_prob(self, n: int) -> NDArray[np.float64]:
        nats = np.empty(n, np.float64)
        self._check(self.library.tarflow_log_prob(self.handle, n, pointer(nats)))
        return nats

    def encode(self, images: Array, labels: ArrayLike | None = None) -> tuple[Array, Array]:
        latents = np.empty((len(images), self.shape.tokens, self.shape.patch_dim), np.float32)
        log_det = np.empty(len(images), np.float32)
        classes, images = self._labels(labels, len(images)), np.ascontiguousarray(images, np.float32)
        given = (pointer(array) for array in (images, classes, latents, log_det))
        self._check(self.library.tarflow_encode(self.handle, len(images), *given))
        return latents, log_det

    def log_likelihood(self, images: Array, labels: ArrayLike | None = None) -> Array:
        return self._of_images(self.library.tarflow_log_likelihood, images, labels, (len(images),))

    def denoise(self, images: Array, labels: ArrayLike | None = None, strength: float = 1.0) -> Array:
        return self._of_images(self.library.tarflow_denoise, images, labels, images.shape, strength)

    def noise(self, seed: int, first: int, n: int) -> Array:
        noise = np.empty((n, self.shape.tokens, self.shape.patch_dim), np.float32)
        self._check(self.library.tarflow_noise(self.handle, seed, first, n, pointer(noise)))
        return noise

    def __del__(self) -> None:
        self.library.tarflow_close(self.handle)

    def _of_images(
        self, call: Callable[..., int], images: Array, labels: ArrayLike | None, shape: tuple[int, ...], *more: float
    ) -> Array:
        out = np.empty(shape, np.float32)
        classes, images = self._labels(labels, len(images)), np.ascontiguousarray(images, np.float32)
        self._check(call(self.handle, len(images), pointer(images), pointer(classes), *more, pointer(out)))
        return out

    def _labels(self, labels: ArrayLike | None, n: int) -> NDArray[np.int64] | None:
        return None if labels is None else np.array(np.broadcast_to(np.asarray(labels, np.int64), (max(n, 0),)))

    def _check(self, status: int) -> None:
        if status != OK:
            raise CppError(status, self.library.tarflow_error(self.handle).decode())


def sample_options(**options: Any) -> SampleOptions:
    """The defaults of tarflow.h, changed."""
    given = SampleOptions(ctypes.sizeof(SampleOptions), guided=b"ab", attention_temperature=1.0, denoise=-1.0)
    for name, value in options.items():
        setattr(given, name, value)
    return given


def pointer(array: NDArray[Any] | None) -> c_void_p | None:
    return None if array is None else c_void_p(array.ctypes.data)

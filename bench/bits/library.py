"""What libtarflow draws, through its C API, for a program compiled against the header of version 0.1."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from ctypes import byref, c_char_p, c_double, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.bits.commands import ROOT
from bench.bits.draws import HUGE
from bench.bits.entries import Found, digest

LIBRARY = Path(os.environ.get("TARFLOW_LIBRARY", ROOT / "runtime" / "cpp" / "build" / "dev" / "libtarflow.so"))
Array = NDArray[Any]


class Opening(ctypes.Structure):
    """tarflow_open_options."""

    _fields_ = [
        *(("size", c_size_t), ("provider", c_char_p), ("onnxruntime", c_char_p), ("threads", c_int32)),
        *(("spinning", c_int32), ("low_memory", c_int32), ("log", c_void_p), ("user", c_void_p)),
        ("cuda_graph", c_int32),
    ]


class Shape(ctypes.Structure):
    """tarflow_shape."""

    _fields_ = [
        ("size", c_size_t),
        *((name, c_int32) for name in ("channels", "image_size", "patch_size", "tokens", "patch_dim")),
        *((name, c_int32) for name in ("blocks", "layers", "width", "classes", "denoises")),
        ("image_numbers", c_int64),
        *((name, c_char_p) for name in ("name", "precision", "backend", "bundle")),
    ]


class Drawing(ctypes.Structure):
    """tarflow_sample_options."""

    _fields_ = [
        *(("size", c_size_t), ("seed", c_uint64), ("first_sample", c_uint64), ("guidance", c_double)),
        *(("guided", c_char_p), ("annealed", c_int32), ("certify", c_int32), ("attention_temperature", c_double)),
        *(("denoise", c_double), ("batch_size", c_int64), ("reproducible", c_int32), ("redraw_nonfinite", c_int32)),
        *((name, c_void_p) for name in ("progress", "preview", "user")),
    ]


class Library:
    """A bundle, open in libtarflow."""

    def __init__(self, bundle: Path) -> None:
        package = importlib.util.find_spec("onnxruntime")
        assert package is not None
        assert package.origin is not None
        (engine,) = (Path(package.origin).parent / "capi").glob("libonnxruntime.so.*")
        self.library, self.handle = ctypes.CDLL(str(LIBRARY)), c_void_p()
        self.library.tarflow_error.restype = c_char_p
        options = Opening(ctypes.sizeof(Opening), b"cpu", os.fsencode(engine), 0, 1, 0, None, None, 1)
        self._check(self.library.tarflow_open(os.fsencode(bundle), byref(options), byref(self.handle)))
        self.shape = Shape(ctypes.sizeof(Shape))
        self.call("get_shape", byref(self.shape))

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function on the handle, with arrays as pointers."""
        passed = [c_void_p(given.ctypes.data) if isinstance(given, np.ndarray) else given for given in arguments]
        self._check(getattr(self.library, f"tarflow_{name}")(self.handle, *passed))

    def close(self) -> None:
        self.library.tarflow_close(self.handle)

    def images(self, n: int) -> Array:
        return np.empty((n, self.shape.channels, self.shape.image_size, self.shape.image_size), np.float32)

    def latents(self, n: int) -> Array:
        return np.empty((n, self.shape.tokens, self.shape.patch_dim), np.float32)

    def labels(self, n: int) -> Array | None:
        return np.arange(n) % self.shape.classes if self.shape.classes else None

    def _check(self, status: int) -> None:
        if status:
            raise SystemExit(f"libtarflow: {self.library.tarflow_error(self.handle).decode()}")


def ways(shape: Shape) -> dict[str, dict[str, Any]]:
    """Names, and what differs from tarflow_sample_defaults()."""
    found: dict[str, dict[str, Any]] = {
        "plain": {"seed": 3},
        "batches of 3": {"seed": 3, "batch_size": 3},
        "reproducible": {"first_sample": 13, "reproducible": 1},
        "not denoised": {"denoise": 0.0},
        "denoised by half": {"denoise": 0.5},
        "guided temperature": {"guidance": 1.2, "attention_temperature": 0.7, "annealed": 1},
    }
    if shape.classes:
        found |= {"guided ab": {"guidance": 1.5}, "guided b": {"guidance": 1.0, "guided": b"b"}}
    if shape.name == b"digits":
        found |= {"guided a": {"guidance": 1.0, "guided": b"a"}}
        found |= {"overflowing, redrawn": {"guidance": HUGE, "redraw_nonfinite": 1}}
    return found


def by_library(folder: Path) -> Found:
    """What libtarflow draws from a bundle, and what it says of images."""
    opened = Library(folder)
    noise = opened.latents(5)
    opened.call("noise", c_uint64(2**63 + 5), c_uint64(2**33), c_int64(5), noise)
    yield "noise", digest(noise)
    for name, options in ways(opened.shape).items():
        drawing = Drawing(ctypes.sizeof(Drawing), guided=b"ab", attention_temperature=1.0, denoise=-1.0, certify=1)
        for key, value in options.items():
            setattr(drawing, key, value)
        images, errors = opened.images(20), np.empty(20, np.float32)
        opened.call("sample", c_int64(20), opened.labels(20), byref(drawing), images)
        opened.call("certificate", c_int64(20), errors)
        yield name, digest(images, errors)
        if not drawing.redraw_nonfinite:
            images = opened.images(5)
            opened.call("decode", c_int64(5), noise, opened.labels(5), byref(drawing), images)
            yield f"{name}, of given noise", digest(images)
    given = np.random.default_rng(7).uniform(-1, 1, opened.images(5).shape).astype(np.float32)
    for name, labels in {"labels": opened.labels(5), "no labels": None}.items():
        latents, numbers, denoised = opened.latents(5), np.empty(5, np.float32), opened.images(5)
        opened.call("encode", c_int64(5), given, labels, latents, numbers)
        yield f"encode, {name}", digest(latents, numbers)
        opened.call("log_likelihood", c_int64(5), given, labels, numbers)
        yield f"log-likelihood, {name}", digest(numbers)
        opened.call("denoise", c_int64(5), given, labels, c_double(0.8), denoised)
        yield f"denoise, {name}", digest(denoised)
    opened.close()

"""Every way there is to run a bundle, behind one shape: what each of them must do alike is in test_backends.py."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarflow.checkpoint import load
from tarflow.export.comparison import oracle_flow
from tarflow.runtime.backend import Array, Doubles
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.native.backend import NativeBackend
from tarflow.runtime.opening import Opening
from tarflow.runtime.ort.backend import OrtBackend
from tarflow.runtime.request import UNGUIDED
from tarflow.runtime.tensorrt import cuda as cuda_module
from tarflow.runtime.tensorrt.backend import open_tensorrt

from .cpp_library import CANCELLED, PROGRESS, CppError, CppFlow
from .device_double import DoubleCuda, DoubleTensorRT

STEPS = ("stepwise", "resident", "native", "tensorrt", "twin")  # whose blocks can be stepped from Python
C_PROVIDERS = {"libtarflow": b"cpu", "libtarflow-native": b"native"}
ALL = (*STEPS, *C_PROVIDERS)


class Cancelled(Exception):
    """Raised by a test's progress, or said by the library."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Images (N, channels, size, size), and the round-trip error and log-density of each, if they were asked for."""

    images: Array
    certificate: Array | None
    log_prob: Doubles | None


class OfPython:
    def __init__(self, flow: Flow) -> None:
        self.flow, self.encode, self.denoise = flow, flow.encode, flow.denoise

    def sample(self, n: int | None = None, *, guidance: Guidance = UNGUIDED, **how: Any) -> Drawn:
        with np.errstate(all="ignore"):
            found = self.flow.sample(n, guidance=guidance, **how)
        return Drawn(np.asarray(found), found.certificate, found.log_prob)


class OfC:
    def __init__(self, flow: CppFlow) -> None:
        self.flow, self.encode, self.denoise = flow, flow.encode, flow.denoise

    def sample(self, n: int | None = None, *, guidance: Guidance = UNGUIDED, **how: Any) -> Drawn:
        certify, progress = how.get("certify", False), how.pop("progress", None)
        if "denoise" in how:
            how["denoise"] = float(how["denoise"])
        if how.get("batch_size") is None:
            how.pop("batch_size", None)
        if progress is not None:
            how["progress"] = PROGRESS(lambda _user, done, total, block, position: _told(progress, done))
        how |= {"guidance": guidance.scale, "guided": guidance.what.encode(), "annealed": guidance.annealed}
        try:
            images = self.flow.sample(n, attention_temperature=guidance.attention_temperature, **how)
        except CppError as error:
            if error.status != CANCELLED:
                raise
            raise Cancelled from None
        checked = (self.flow.certificate(len(images)), self.flow.log_prob(len(images))) if certify else (None, None)
        return Drawn(images, *checked)


Drawer = OfPython | OfC


def _told(progress: Callable[[int], None], done: int) -> int:
    try:
        progress(done)
    except Cancelled:
        return 1
    return 0


@contextmanager
def double_device() -> Iterator[tuple[DoubleCuda, DoubleTensorRT]]:
    """CUDA and TensorRT doubles in place of the real ones; everything on them is given back at the end."""
    cuda = DoubleCuda()
    trt = DoubleTensorRT(cuda)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_module, "_load", lambda: cuda)
        patch.setitem(sys.modules, "tensorrt", trt)
        yield cuda, trt
        gc.collect()
        assert not cuda.allocated, "device memory was not given back"
        assert not cuda.graphs, "captured graphs were not destroyed"
        assert not cuda.streams, "streams were not destroyed"


def open_flow(kind: str, folder: Path, opening: Opening = Opening()) -> Flow:  # noqa: B008 (frozen)
    """A bundle on one of STEPS; for "tensorrt" inside :func:`double_device`, with engines of :func:`build_double`."""
    bundle = Bundle.open(folder)
    if kind == "twin":
        return oracle_flow(load(folder), bundle)
    if kind == "tensorrt":
        return Flow(bundle, open_tensorrt(bundle, opening))
    if kind == "native":
        return Flow(bundle, NativeBackend(bundle, replace(opening, provider="native")))
    return Flow(bundle, OrtBackend(bundle, replace(opening, provider="cpu"), kind == "resident"))


def open_drawer(kind: str, folder: Path, opening: Opening = Opening()) -> Drawer:  # noqa: B008 (frozen)
    """A bundle on one of ALL."""
    if kind not in C_PROVIDERS:
        return OfPython(open_flow(kind, folder, opening))
    how = {"threads": opening.threads or 0, "low_memory": int(opening.memory == "least")}
    return OfC(CppFlow(folder, provider=C_PROVIDERS[kind], **how))

"""A check: what it is run on, what it says."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu.opening import resident_flow
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.flow import Flow, Guidance

EVERY = ("fp32", "fp16", "bf16", "int8")
USUAL = ("fp32", "fp16")


@dataclass(frozen=True, slots=True)
class Case:
    """A bundle, and the provider that is checked with it."""

    bundle: Bundle
    provider: str

    def open(self, cuda_graph: bool = True) -> Flow:
        return resident_flow(self.bundle, self.provider, cuda_graph)

    @property
    def precision(self) -> str:
        return self.bundle.manifest.precision


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether it holds, ``bar`` in words, and what was found, as JSON takes it."""

    ok: bool
    bar: str
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Check:
    """``limit`` in seconds. ``precisions`` it means something in; ``once`` a run, on the first bundle, is enough of it;
    ``on_cpu`` False: on a CPU there is nothing to check.
    """

    run: Callable[[Case], Outcome]
    limit: int
    precisions: tuple[str, ...] = USUAL
    once: bool = False
    on_cpu: bool = True

    @property
    def name(self) -> str:
        return self.run.__name__


def labels(flow: Flow, n: int) -> NDArray[np.int64] | None:
    return np.arange(n) % flow.config.classes if flow.config.classes else None


def draw(flow: Flow, n: int, guidance: float = 0.0, decode: str = "serial", reproducible: bool = False) -> NDArray[Any]:
    """The first ``n`` raw samples of one seed."""
    classes, scale = labels(flow, n), Guidance(guidance)
    return flow.sample(
        n, labels=classes, guidance=scale, seed=3, decode=decode, reproducible=reproducible, denoise=False
    )


def distance(one: NDArray[Any], other: NDArray[Any]) -> dict[str, float]:
    apart = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    return {"max": float(np.abs(apart).max()), "rms": float(np.sqrt((apart**2).mean()))}


def free_memory() -> int | None:
    """Bytes the device has left, by the CUDA runtime that is loaded here; None where none is."""
    paths = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcudart.so" in line]
    if not paths:
        return None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    failed = ctypes.CDLL(paths[0]).cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    return None if failed else free.value

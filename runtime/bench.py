"""What a step cannot be faster than: the weights it must read over the memory's bandwidth."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np

from .bundle import WEIGHTS, Bundle


def read_bandwidth(threads: int, size: int = 256 << 20, repeats: int = 5) -> float:
    """Bytes per second that ``threads`` together read from memory: the sum of an array larger than the caches."""
    parts = np.array_split(np.ones(size // 8, np.float64), threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:  # numpy sums without holding the interpreter's lock
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(np.sum, parts))
            seconds.append(time.perf_counter() - started)
    return size / median(seconds)


def step_floor(bundle: Bundle, bandwidth: float) -> float:
    """Seconds: one block's weights at ``bandwidth``. Caches of the processor may beat it for small models."""
    return bundle.manifest.files[WEIGHTS].size / bundle.manifest.config.blocks / bandwidth

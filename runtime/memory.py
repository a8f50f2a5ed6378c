"""How much memory a flow may take, and how it is spent."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from typing import NamedTuple

from .bundle import WEIGHTS, Bundle, ModelShape
from .errors import InputError
from .files import size_text
from .opening import Memory
from .precision import PRECISIONS

_PROGRAM = 256 << 20  # bytes: Python, numpy, ONNX Runtime and its scratch memory
_LARGEST_CACHE = 4 << 30  # without a limit
_LARGEST_ACTIVATIONS = 1 << 30
_SPENT = 0.8  # of what is left: allocators round up
_PACKED = {"fp32": 4, "int16": 2 + 1 / 16, "bf16": 2, "int8": 1 + 1 / 16}  # bytes of a weight: a float scales 64
_CACHE_COPIES = 2  # a cache grows by moving to another buffer


class Budget(NamedTuple):
    """Bytes for the KV cache of a batch, and for what forward and gradient hold at once.

    ``one_block`` opens one block's graphs at a time.
    """

    cache: int = _LARGEST_CACHE
    activations: int = _LARGEST_ACTIVATIONS
    one_block: bool = False

    def batch(self, row: int) -> int:
        """Images whose caches fit, of ``row`` bytes each (:func:`cache_row`); at least one."""
        return max(1, self.cache // (_CACHE_COPIES * row))

    def rows(self, row: int) -> int:
        """Images whose arrays fit, of ``row`` bytes each (:func:`forward_row`, :func:`gradient_row`); at least one."""
        return max(1, self.activations // row)


USUAL = Budget()


def spend(bundle: Bundle, limit: Memory, native: str | None = None) -> Budget:
    """The budget under a ``limit`` in bytes on the process; None: what suits any machine; "least": one block at a time.
    ``native`` is the precision that the native engine packs weights in, None where ONNX Runtime or TensorRT decodes.

    Weights come first: those of all blocks, or of one where all would leave too little. The rest is shared between
    cache and activations, and the samples themselves come on top. Raises InputError for a limit that one image exceeds,
    by an estimate that is more than is measured rather than less.
    """
    if limit is None or limit == "least":
        return Budget(one_block=limit is not None)
    config = bundle.manifest.config
    mapped = bundle.manifest.files[WEIGHTS].size  # of the file; and the same as the kernels of steps want them
    weights = mapped + (mapped if native is None else packed(config, native))
    cache = 2 * _CACHE_COPIES * cache_row(config, bundle.manifest.precision)  # of a guided image
    activations = gradient_row(config)
    for one_block in (False, True):
        held = _PROGRAM + (weights // config.blocks if one_block else weights)
        rest = limit - held
        if rest >= cache + activations:
            spare = int(_SPENT * (rest - cache - activations))
            return Budget(cache + spare // 2, activations + spare // 2, one_block)
    needed = held + cache + activations
    raise InputError(
        f"`memory` of {size_text(limit)} is too little to promise for this model: one block's weights, a cache for one "
        f"image and its gradient are estimated, on the safe side, at {size_text(needed)}; give that, or 'least', which "
        "promises nothing and takes as little as it can",
        field="memory",
        found=limit,
        expected=f"{needed} bytes or more, by an estimate",
    )


def packed(config: ModelShape, precision: str) -> int:
    """Bytes of all blocks' products as the native engine keeps them, scales among them."""
    return int(12 * config.blocks * config.layers * config.width**2 * _PACKED[precision])


def cache_row(config: ModelShape, precision: str) -> int:
    """Bytes of KV cache of one image in one guidance branch, for one block."""
    return 2 * config.layers * config.width * config.tokens * PRECISIONS[precision].cache_bytes


def forward_row(config: ModelShape, branches: int) -> int:
    """Bytes of what a forward pass holds at once of one image in so many guidance branches."""
    return _arrays(config, 3 * branches, 12 * branches)


def gradient_row(config: ModelShape) -> int:
    """Bytes of what a gradient holds at once of one image: some of every layer, until the way back is over."""
    return _arrays(config, config.layers + 4, 12 * (config.layers + 1))


def _arrays(config: ModelShape, attention: int, hidden: int) -> int:
    """Bytes of so many (H, T, T) and (T, C) float32 arrays."""
    return 4 * config.tokens * (attention * config.heads * config.tokens + hidden * config.width)


def peak() -> int:
    """Bytes: the most this process has held in memory so far."""
    try:  # what getrusage says begins with the parent's memory
        status = Path("/proc/self/status").read_text()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0

"""Decoding step by step: the step graph reads its cache and returns the window's keys and values.

The host owns the cache, stores them, and lets it grow in buckets, so that early steps do not pay for slots that are
still empty.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backend import Array, Branches, Mask, block_order, check_window
from ..parts import Feeds
from ..ports import MASKED
from ..precision import PRECISIONS
from ..spare import Spare
from .sessions import Sessions


class StepwiseDecoding:
    """One block being inverted: every buffer is allocated here, none inside the loop of steps."""

    def __init__(
        self, sessions: Sessions, spare: Spare[NDArray[np.uint8]], block: int, z: Array, branches: Branches
    ) -> None:
        manifest = sessions.bundle.manifest
        config = self._config = manifest.config
        self._sessions, self._spare, self._block = sessions, spare, block
        self._session = sessions.get(block, "step")
        self._reversed = manifest.blocks[block].reversed
        self._z = np.ascontiguousarray(block_order(z, self._reversed))
        self.x = self._z.copy()
        self._labels = branches.labels
        # Per step and branch, what multiplies each of the network's outputs: (T, G, 1, outputs)
        parts = branches.mix if config.nvp else branches.mix[1:]
        self._mix = np.repeat(parts.transpose(2, 1, 0), config.patch_dim, 2)[:, :, None]
        self._mix_varies = bool((self._mix != self._mix[:1]).any())
        scale = branches.inverse_temperature / np.float32(np.sqrt(config.head_dim))
        self._query_scale = np.repeat(scale, len(z)).reshape(-1, 1, 1, 1)
        self._cache_type = np.dtype(PRECISIONS[manifest.precision].storage)
        rows = branches.labels.size
        self._cache = np.zeros((2 * config.layers, rows, config.heads, 0, config.head_dim), self._cache_type)
        size = 2 * config.layers * rows * config.width * config.tokens * self._cache.itemsize
        self._memory = [spare.take(lambda one: len(one) == size, lambda: np.empty(size, np.uint8)) for _ in range(2)]
        self._cache_names = [f"{part}_{layer}" for layer in range(config.layers) for part in ("key", "value")]
        # Larger buckets make attention read more empty slots, smaller ones copy the cache more often: 16, 32, 64 slots
        # for 64, 256, 1024 patches balance the two.
        self._bucket = 16 * math.ceil(math.sqrt(3 * config.tokens) / 16)
        self._window, self._position = 0, 0

    def guess(self, patches: Array) -> None:
        self.x[:] = block_order(patches, self._reversed)

    def step(self, position: int, window: int = 1) -> None:
        self.x[:, position + 1 : position + 1 + window] = self.evaluate(position, window)

    def evaluate(self, position: int, window: int, rows: Mask | None = None, steady: bool = False) -> Array:
        tokens = self.x.shape[1]
        check_window(position, window, tokens)
        end = position + window
        if window != self._window or end > self._cache.shape[3]:
            self._prepare(end, window)
        self._unmask(position)
        self._x_in[:] = self.x[:, position:end]
        self._z_in[:] = self._z[:, position + 1 : end + 1]
        index = np.arange(position, end)
        self._index_in[:] = tokens - 1 - index if self._reversed else index
        if self._mix_varies:
            self._mix_in[:] = self._mix[position:end].transpose(1, 2, 0, 3)
        if rows is not None and not steady and 2 * np.count_nonzero(rows) <= len(rows):
            return self._evaluate_few(position, end, rows)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise self._sessions.failed(self._block, "step", error) from None
        if rows is None or rows.all():
            self._cache[:, :, :, position:end] = self._fresh
        else:
            cached = self._cached(rows)
            self._cache[:, cached, :, position:end] = self._fresh[:, cached]
        return self._x_out

    def _evaluate_few(self, position: int, end: int, rows: Mask) -> Array:
        """The same for ``rows`` alone, whose part of the cache is copied: cheap beside the products it saves."""
        cached = self._cached(rows)
        parts: Feeds = {"x": self._x_in, "z": self._z_in, "index": self._index_in}
        feeds: Feeds = {name: array[rows].reshape(-1, *array.shape[2:]) for name, array in parts.items()}
        feeds |= {"labels": self._labels[:, rows].repeat(end - position, 1), "bias": self._bias}
        feeds["mix"] = self._mix_in[:, rows].reshape(len(self._labels), -1, self._mix_in.shape[3])
        feeds["query_scale"] = self._query_scale[cached]
        feeds |= zip(self._cache_names, self._cache[:, cached], strict=True)
        found, fresh = self._sessions.run(self._block, "step", feeds)
        self._x_out[rows] = found.reshape(-1, *self._x_out.shape[1:])
        self._cache[:, cached, :, position:end] = fresh.reshape(len(self._cache), -1, *fresh.shape[1:])
        return self._x_out

    def _cached(self, rows: Mask) -> NDArray[np.intp]:
        """The rows of the cache that hold these images, in every branch."""
        return np.flatnonzero(np.tile(rows, len(self._labels)))

    def patches(self) -> Array:
        return np.ascontiguousarray(block_order(self.x, self._reversed))

    def close(self) -> None:
        """Hand the memory of the cache to the next block. The decoding must not be used afterwards."""
        self._spare.give(*self._memory)
        self._memory = []

    def _unmask(self, position: int) -> None:
        """Let attention see the slots before ``position``, and those alone."""
        low, high = sorted((self._position, position))
        self._bias[:, low:high] = 0 if position > self._position else MASKED
        self._position = position

    def _prepare(self, filled: int, window: int) -> None:
        """Grow the cache to hold ``filled`` slots, and bind buffers for ``window``."""
        config = self._config
        batch, _, patch_dim = self.x.shape
        branches, outputs = len(self._labels), self._mix.shape[3]
        capacity = self._cache.shape[3]
        if filled > capacity:
            grown = min(config.tokens, -(-filled // self._bucket) * self._bucket)
            shape = (*self._cache.shape[:3], grown, config.head_dim)
            self._memory.reverse()  # what the cache is now lies in the other half, and is copied from there
            cache = self._memory[0].view(self._cache_type)[: math.prod(shape)].reshape(shape)
            cache[:, :, :, :capacity] = self._cache
            cache[:, :, :, capacity:] = 0  # masked, but must be finite
            self._cache, capacity = cache, grown
        self._window, self._position = window, 0
        self._x_in, self._z_in, self._x_out = (np.empty((batch, window, patch_dim), np.float32) for _ in range(3))
        self._index_in = np.empty((batch, window), np.int64)
        self._mix_in = np.empty((branches, batch, window, outputs), np.float32)
        self._mix_in[:] = self._mix[:window].transpose(1, 2, 0, 3)
        own = np.where(np.tri(window, dtype=bool), np.float32(0), np.float32(MASKED))
        self._bias = np.concatenate([np.full((window, capacity), MASKED, np.float32), own], 1)
        self._fresh = np.empty((*self._cache.shape[:3], window, config.head_dim), self._cache_type)
        self.inputs: Feeds = {
            "x": self._x_in.reshape(-1, patch_dim),
            "z": self._z_in.reshape(-1, patch_dim),
            "index": self._index_in.reshape(-1),
            "labels": self._labels.repeat(window, 1),
            "mix": self._mix_in.reshape(branches, -1, outputs),
            "query_scale": self._query_scale,
            "bias": self._bias,
        }
        self.inputs |= zip(self._cache_names, self._cache, strict=True)
        fresh = self._fresh.reshape(-1, *self._fresh.shape[2:])
        try:
            self._bind({"x_next": self._x_out.reshape(-1, patch_dim), "fresh": fresh})
        except Exception as error:  # a graph with other inputs than the manifest lets expect
            raise self._sessions.failed(self._block, "step", error) from None

    def _bind(self, outputs: Feeds) -> None:
        """Bind all arrays. A value borrows its array on the CPU, so both must outlive the binding."""
        binding = self._session.io_binding()
        values = {name: self._value(array) for name, array in (self.inputs | outputs).items()}
        for name, value in values.items():
            bind = binding.bind_ortvalue_output if name in outputs else binding.bind_ortvalue_input
            bind(name, value)
        self._binding, self._bound = binding, values

    def _value(self, array: NDArray[Any]) -> Any:
        ort = self._sessions.ort
        if array.dtype == np.uint16:
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, PRECISIONS["bf16"].onnx)
        return ort.OrtValue.ortvalue_from_numpy(array)

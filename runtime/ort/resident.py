"""The resident graph on ONNX Runtime, or the provider's own of the same state: their tensors, bound once."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import FUSED, RESIDENT
from ..ports import POSITION, Port, Sizes, inputs, is_state, next_name, shape
from ..precision import PRECISIONS
from ..spare import Spare
from .sessions import Sessions

_GRAPH_IDS = itertools.count(1)  # a number for every captured CUDA graph of the process


class OrtSteps:
    """Every tensor is allocated here, once for all blocks of a ``shape``: (images, guidance branches). ``fused`` lets
    steps of one position be made by the provider's own graph, where the bundle has one.

    State outputs are bound to their inputs' memory. The position is not: a step reads it until its end, so two of
    them take turns. So a step can be run twice without harm, which ONNX Runtime does to capture a CUDA graph.
    """

    def __init__(self, sessions: Sessions, shape: tuple[int, int], fused: bool, idle: Spare[OrtSteps]) -> None:
        self._sessions, self.shape, self.block, self._fused, self._idle = sessions, shape, 0, fused, idle
        self._precision = PRECISIONS[sessions.bundle.manifest.precision]
        self._values: dict[str, Any] = {}
        for port in inputs(sessions.bundle.manifest.config, RESIDENT):
            if port.name != "offsets":
                self._values[port.name] = self._allocate(np.zeros(self._shape(port), self._type(port)))
        self._values[next_name(POSITION)] = self._allocate(np.zeros(1, np.int64))
        self._bindings: dict[tuple[int, int, int], tuple[Any, Any, Any]] = {}
        self._turn = 0

    def write(self, name: str, array: NDArray[Any]) -> None:
        self._values[self._current(name)].update_inplace(array)

    def read(self, name: str) -> NDArray[Any]:
        return np.array(self._values[self._current(name)].numpy())

    def launch(self, window: int) -> None:
        key = self.block, window, self._turn
        if key not in self._bindings:
            self._bindings[key] = self._bind(window)
        session, binding, options = self._bindings[key]
        try:
            with self._sessions.launching:
                session.run_with_iobinding(binding, options)
        except Exception as error:
            raise self._sessions.failed(self.block, self._kind(window), error) from None
        self._turn = 1 - self._turn

    def close(self, clean: bool) -> None:
        if clean:
            self._idle.give(self)

    def _kind(self, window: int) -> str:
        """Of the graph that makes a step."""
        fused = FUSED[self.shape[1]]
        has = fused in self._sessions.bundle.manifest.blocks[self.block].graphs
        return fused if window == 1 and self._fused and has else RESIDENT

    def _bind(self, window: int) -> tuple[Any, Any, Any]:
        batch, branches = self.shape
        axes = (("batch", batch), ("branches", branches), ("rows", batch * branches), ("window", window))
        kind = self._kind(window)
        session = self._sessions.get(self.block, kind, axes)
        if f"offsets {window}" not in self._values:
            self._values[f"offsets {window}"] = self._allocate(np.arange(window))
        binding = session.io_binding()
        for port in inputs(self._sessions.bundle.manifest.config, kind):
            source = f"offsets {window}" if port.name == "offsets" else self._current(port.name)
            place = self._sessions.device, 0, self._element(port), self._shape(port, window)
            binding.bind_input(port.name, *place, self._values[source].data_ptr())
            if is_state(port.name):
                target = self._current(port.name, 1 - self._turn)
                binding.bind_output(next_name(port.name), *place, self._values[target].data_ptr())
        options = self._sessions.ort.RunOptions()
        if self._sessions.captures:
            options.add_run_config_entry("gpu_graph_id", str(next(_GRAPH_IDS)))
        return session, binding, options

    def _current(self, name: str, turn: int | None = None) -> str:
        """Which tensor is an input's now: the position alone changes."""
        turn = self._turn if turn is None else turn
        return next_name(POSITION) if name == POSITION and turn else name

    def _shape(self, port: Port, window: int = 1) -> tuple[int, ...]:
        return shape(port, Sizes(*self.shape, window))

    def _type(self, port: Port) -> Any:
        """As numpy holds it."""
        return {"index": np.int64, "cache": np.dtype(self._precision.storage).type, "number": np.float32}[port.holds]

    def _element(self, port: Port) -> Any:
        """The element type as bindings take it."""
        return self._precision.onnx if port.holds == "cache" and self._precision.name == "bf16" else self._type(port)

    def _allocate(self, array: NDArray[Any]) -> Any:
        return self._sessions.ort.OrtValue.ortvalue_from_numpy(array, self._sessions.device, 0)

"""The resident graph on ONNX Runtime, or the provider's own of the same state: their tensors, bound once."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle import FUSED, RESIDENT
from ..ports import POSITION, Port, Sizes, inputs, is_state, next_name, shape
from ..precision import PRECISIONS
from .device import drop, touching
from .sessions import Sessions

_MOST_RUNNING = 256  # steps begun before they are waited for: a call that is stopped ends soon


class _Bound(NamedTuple):
    """A step, as ONNX Runtime runs it."""

    block: int
    kind: str
    session: Any
    binding: Any
    options: Any

    def run(self) -> None:
        """Begin a step. A GPU may go on with it for a while."""
        self.session.run_with_iobinding(self.binding, self.options)

    def wait(self) -> None:
        """Until everything that was begun has ended."""
        self.binding.synchronize_outputs()


class OrtSteps:
    """Every tensor is allocated here, once for all blocks of a ``shape``: (images, guidance branches). ``fused`` lets
    steps of one position be made by the provider's own graph, where the bundle has one.

    State outputs are bound to their inputs' memory. The position is not: a step reads it until its end, so two of
    them take turns. So a step can be run twice without harm, which ONNX Runtime does to capture a CUDA graph.
    """

    def __init__(self, sessions: Sessions, shape: tuple[int, int], fused: bool) -> None:
        self._sessions, self.shape, self.block, self._fused = sessions, shape, 0, fused
        self._precision = PRECISIONS[sessions.bundle.manifest.precision]
        self._values: dict[str, Any] = {}
        self._bindings: dict[tuple[int, int, int], _Bound] = {}  # by block, window and turn
        self._running: list[_Bound] = []  # begun, and not waited for, in one session
        self._turn = 0
        self._ports = inputs(sessions.bundle.manifest.config, RESIDENT)
        with sessions.touching:
            for port in self._ports:
                if port.name != "offsets":
                    self._values[port.name] = self._allocate(np.zeros(self._shape(port), self._type(port)))
            self._values[next_name(POSITION)] = self._allocate(np.zeros(1, np.int64))
            if sessions.captures:
                sessions.holders.add(self)
        if sessions.device != "cpu":
            weakref.finalize(self, _end, self._running, self._bindings, self._values).atexit = False

    @property
    def nbytes(self) -> int:
        """All that it holds on the device."""
        return sum(math.prod(self._shape(port)) * np.dtype(self._type(port)).itemsize for port in self._ports)

    def write(self, name: str, array: NDArray[Any]) -> None:
        with self._sessions.touching:
            self._wait()
            self._values[self._current(name)].update_inplace(array)

    def read(self, name: str) -> NDArray[Any]:
        with self._sessions.touching:
            self._wait()
            return np.array(self._values[self._current(name)].numpy())

    def launch(self, window: int) -> None:
        key = self.block, window, self._turn
        with self._sessions.touching:
            if key not in self._bindings:
                self._bindings[key] = self._bind(window)
            bound = self._bindings[key]
            if self._running and self._running[-1].kind != bound.kind:
                self._wait()  # another graph's session has a stream of its own
            self._tell(bound, bound.run)
            self._turn = 1 - self._turn
            if self._sessions.captures:
                self._running.append(bound)
            if len(self._running) == _MOST_RUNNING:
                self._wait()

    def forget(self, block: int, kind: str) -> None:
        """Let go of a graph's captures, whose session is about to end."""
        self._wait()
        for key in [key for key, bound in self._bindings.items() if (bound.block, bound.kind) == (block, kind)]:
            del self._bindings[key]

    def _wait(self) -> None:
        if self._running:
            self._sessions.look_ahead(self.block, self._running[-1].kind)
            self._tell(self._running[-1], self._running[-1].wait)
            self._running.clear()

    def _tell(self, bound: _Bound, work: Callable[[], None]) -> None:
        """Do it, and say whose failure it is."""
        try:
            work()
        except Exception as error:
            raise self._sessions.failed(bound.block, bound.kind, error) from None

    def _kind(self, window: int) -> str:
        """Of the graph that makes a step."""
        fused = FUSED[self.shape[1]]
        has = fused in self._sessions.bundle.manifest.blocks[self.block].graphs
        return fused if window == 1 and self._fused and has else RESIDENT

    def _bind(self, window: int) -> _Bound:
        kind = self._kind(window)
        session, number = self._sessions.to_capture(self.block, kind)
        if f"offsets {window}" not in self._values:
            self._values[f"offsets {window}"] = self._allocate(np.arange(window))
        binding = session.io_binding()
        for port in inputs(self._sessions.bundle.manifest.config, kind):
            source = f"offsets {window}" if port.name == "offsets" else self._current(port.name)
            place = self._sessions.device, self._sessions.number, self._element(port), self._shape(port, window)
            binding.bind_input(port.name, *place, self._values[source].data_ptr())
            if is_state(port.name):
                target = self._current(port.name, 1 - self._turn)
                binding.bind_output(next_name(port.name), *place, self._values[target].data_ptr())
        options = self._sessions.ort.RunOptions()
        if self._sessions.captures:
            options.add_run_config_entry("gpu_graph_id", str(number))
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return _Bound(self.block, kind, session, binding, options)

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
        return self._sessions.ort.OrtValue.ortvalue_from_numpy(array, self._sessions.device, self._sessions.number)


def _end(running: list[_Bound], *held: dict[Any, Any]) -> None:
    """Let go of everything, once no step works with it any more."""
    with touching:
        for bound in running[-1:]:
            bound.wait()
        drop(running, *held)

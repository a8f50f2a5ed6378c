"""The step engines' tensors in device memory, and one captured graph a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import RESIDENT
from ..errors import BundleError
from ..ports import POSITION, Sizes, inputs, is_state, next_name, shape
from ..precision import PRECISIONS
from .cuda import Captured, Memory
from .engines import Engines


class TrtSteps:
    """Every tensor is allocated here, once for all blocks of a ``shape``: (images, guidance branches).

    Every state output is bound to its input, which the engine aliases; the position alone may be an output of its own,
    and is copied back behind the step, as part of it. ``cuda_graph`` False launches every kernel of every step anew.
    """

    def __init__(self, engines: Engines, shape: tuple[int, int], cuda_graph: bool) -> None:
        self._engines, self.shape, self._cuda_graph = engines, shape, cuda_graph
        self._ports = {port.name: port for port in inputs(engines.bundle.manifest.config, RESIDENT)}
        self._memory: dict[tuple[str, int], Memory] = {}
        self._graphs: dict[tuple[int, int], Captured] = {}  # by block and window
        self._block, self._moves = 0, False  # whether the position has to be copied back

    def begin(self, block: int) -> None:
        """Decode this block next. Raises BundleError for an engine that does not update its cache in place."""
        engine = self._engines.get(block, "step")
        apart = [name for name in filter(is_state, self._ports) if not engine.get_aliased_input_tensor(next_name(name))]
        if set(apart) - {POSITION}:
            raise BundleError(
                f"block {block}'s step engine does not update its cache in place: it was built from a graph of an "
                "older bundle. Build the engines again",
                remedy=self._engines.rebuild(),
            )
        self._block, self._moves = block, bool(apart)

    def write(self, name: str, array: NDArray[Any]) -> None:
        with self._engines.cuda:
            self._engines.cuda.upload(self._address(name), array)

    def read(self, name: str) -> NDArray[Any]:
        with self._engines.cuda:
            found = shape(self._ports[name], Sizes(*self.shape))
            return self._engines.cuda.download(self._address(name), found, np.float32)

    def launch(self, window: int) -> None:
        cuda = self._engines.cuda
        with self._engines.cuda:
            key = self._block, window
            launch = self._prepare(window)
            if key in self._graphs:
                cuda.replay(self._graphs[key].graph)
                return
            launch()
            if self._cuda_graph:  # at once: the run loaded what these shapes need, and others share the context
                self._graphs[key] = Captured(cuda, launch)

    @property
    def nbytes(self) -> int:
        """All that it holds on the device."""
        return sum(memory.size for memory in self._memory.values())

    def forget(self, kept: int | None = None) -> None:
        """Destroy what was captured of all blocks but one: their engine, or memory it works in, is about to go."""
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[0] == kept}

    def _prepare(self, window: int) -> Callable[[], None]:
        """A function that puts one step on the stream."""
        engines, block, sizes = self._engines, self._block, Sizes(*self.shape, window)
        profile = engines.profile("step", self.shape[1], window)
        engines.get(block, "step")
        shapes = {name: shape(port, sizes) for name, port in self._ports.items()}
        addresses = {name: self._address(name, window) for name in self._ports}
        addresses |= {next_name(name): addresses[name] for name in self._ports if is_state(name)}
        if self._moves:
            addresses[next_name(POSITION)] = self._address(next_name(POSITION))

        def launch() -> None:
            engines.launch(block, "step", profile, shapes, addresses)
            if self._moves:
                engines.cuda.copy(addresses[POSITION], addresses[next_name(POSITION)], 8)

        return launch

    def _address(self, name: str, window: int = 1) -> int:
        """Where a tensor lies; allocated when first asked for, offsets once a window."""
        place = name, window if name == "offsets" else 1
        if place not in self._memory:
            port = self._ports.get(name, self._ports[POSITION])
            cache = PRECISIONS[self._engines.record.precision].cache_bytes
            itemsize = {"cache": cache, "index": 8, "number": 4}[port.holds]
            size = math.prod(shape(port, Sizes(*self.shape, window))) * itemsize
            memory = Memory(self._engines.cuda, size)
            if name == "offsets":
                self._engines.cuda.upload(memory.address, np.arange(window))
            self._memory[place] = memory
        return self._memory[place].address

"""The backend on ONNX Runtime.

On a CPU decoding is stepwise: the step graph reads a cache that the host owns. On a GPU it is resident: sequence, cache
and position stay on the device.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..backend import REPRODUCIBLE_TILE, WINDOW, Array, Branches, Decoding, Labels
from ..bundle import RESIDENT, Bundle
from ..errors import BundleError, Remedy
from ..files import size_text
from ..gpus import named
from ..machine import cores, processor
from ..memory import USUAL, Budget, forward_row, gradient_row, spend
from ..opening import Opening
from ..parts import Feeds, classes, forward_feeds, gradient_feeds, in_parts
from ..resident import ResidentDecoding
from ..spare import Spare
from .resident import OrtSteps
from .sessions import Sessions
from .stepwise import StepwiseDecoding

_CPU_WINDOW = 16  # costs two to three steps at batch 1, and finds about as many patches where a block is hard
_ON_CPU = Opening("cpu")


class OrtBackend:
    """Every block's graphs on ONNX Runtime's provider "cpu" or "cuda". Safe to use from several threads.

    ``resident`` keeps the state of decoding on the device; None does so on a GPU. ``fused`` lets it run graphs of ONNX
    Runtime's own operators then; None does so on a GPU, whose provider has them in half precision. ``budget`` is what
    another engine, which decodes, leaves it. Raises MachineError if the provider does not start, BundleError for a
    bundle without the graphs that it needs there.
    """

    portable = False

    def __init__(
        self,
        bundle: Bundle,
        opening: Opening = _ON_CPU,
        resident: bool | None = None,
        fused: bool | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.bundle, self.config, self.opening = bundle, bundle.manifest.config, opening
        self.budget = spend(bundle, opening.memory) if budget is None else budget
        on_cpu = opening.provider_name == "cpu"
        self.resident = not on_cpu if resident is None else resident
        self.fused = not on_cpu if fused is None else fused
        if self.resident and RESIDENT not in bundle.manifest.blocks[0].graphs:
            raise BundleError(
                f"'{bundle.folder}' was exported before there were graphs for devices, and runs on CPUs alone; use "
                "`provider` cpu, or export it again: its weights are a checkpoint",
                field="provider",
                remedy=Remedy("export", {"checkpoint": bundle.folder}),
            )
        self.sessions = Sessions(bundle, opening, self.budget.one_block)
        self.description = self.sessions.description
        if isinstance(opening.memory, int) and self._of_a_tile(self.budget) != self._of_a_tile(USUAL):
            self.description += f", within {size_text(opening.memory)}"  # parts of another size round differently
        self.machine = f"cpu {processor()}, {opening.threads or cores()} threads"
        if not on_cpu:
            self.machine = f"cuda {named(self.sessions.number)}"
        self.precision = bundle.manifest.precision
        self.largest_batch: int | None = None
        self.window = _CPU_WINDOW if on_cpu else WINDOW
        self._begin()
        _all.add(self)
        if not on_cpu:
            self.sessions.get(0, "forward")  # fails here and now if the provider does not start

    def _begin(self) -> None:
        """With nothing kept from earlier calls, and no lock held."""
        self._buffers: Spare[NDArray[np.uint8]] = Spare(keep=not self.budget.one_block)
        room = 0 if self.sessions.device == "cpu" else self.budget.cache
        self._idle: Spare[OrtSteps] = Spare(keep=not self.budget.one_block, room=room)

    def after_fork(self) -> None:
        """Begin anew in a child process."""
        self.sessions.after_fork()
        self._begin()

    def lanes(self) -> tuple[OrtBackend, int] | None:
        threads = self.opening.threads or cores()
        # It holds the weights of the steps once more.
        if self.sessions.device != "cpu" or threads == 1 or self.budget != USUAL:
            return None
        alone = replace(self.opening, threads=1, spinning=None)
        return OrtBackend(self.bundle, alone, self.resident, self.fused), threads

    def decoding(self, block: int, z: Array, branches: Branches) -> Decoding:
        branches = replace(branches, labels=classes(self.config, branches.labels))
        if not self.resident:
            return StepwiseDecoding(self.sessions, self._buffers, block, z, branches)
        images = len(z) if self.sessions.device == "cpu" else rounded(len(z))
        shape = images, len(branches.labels)
        steps = self._idle.take(lambda one: one.shape == shape, lambda: OrtSteps(self.sessions, shape, self.fused))
        steps.block = block
        return ResidentDecoding(steps, self._idle, self.bundle.manifest.blocks[block].reversed, z, branches)

    def forward(self, block: int, x: Array, branches: Branches) -> tuple[Array, Array]:
        most = self.budget.rows(forward_row(self.config, len(branches.labels)))
        z, log_det = self._run(block, "forward", forward_feeds(self.config, x, branches), most)
        return z, log_det

    def gradient(self, block: int, x: Array, labels: Labels, grad_z: Array, grad_log_det: Array) -> Array:
        feeds = gradient_feeds(self.config, x, labels, grad_z, grad_log_det)
        return self._run(block, "gradient", feeds, self.budget.rows(gradient_row(self.config)))[0]

    def _of_a_tile(self, budget: Budget) -> list[int]:
        """How many images of a reproducible tile are computed at once: plain, guided, and in the gradient."""
        rows = forward_row(self.config, 1), forward_row(self.config, 2), gradient_row(self.config)
        return [min(budget.rows(row), REPRODUCIBLE_TILE) for row in rows]

    def _run(self, block: int, kind: str, feeds: Feeds, most: int) -> list[Array]:
        return in_parts(self.config, kind, feeds, (1, most), partial(self.sessions.run, block, kind))


def rounded(images: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16 ...: a device computes a few more as fast, and captures each size anew."""
    power = 1 << (images - 1).bit_length()
    return power * 3 // 4 if power > 2 and images <= power * 3 // 4 else power


def _after_fork() -> None:
    for backend in _all:
        backend.after_fork()


_all: weakref.WeakSet[OrtBackend] = weakref.WeakSet()
os.register_at_fork(after_in_child=_after_fork)

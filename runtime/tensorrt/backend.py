"""The backend on TensorRT: engines deserialised directly, decoding state in device memory, one CUDA graph a step.

TensorRT and TensorRT-RTX have the same interface; which of the two an engine needs is in its record.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import WINDOW, Array, Branches, Decoding, Labels, check_batch
from ..bundle import Bundle
from ..errors import BundleError, MachineError, Remedy
from ..memory import spend
from ..opening import Opening
from ..parts import Feeds, classes, forward_feeds, gradient_feeds, in_parts
from ..ports import Sizes, outputs, shape
from ..resident import ResidentDecoding
from ..spare import Spare
from .cuda import Cuda, Memory
from .engines import Engines
from .library import import_tensorrt
from .record import Here, Record, folders
from .record_reader import read_record
from .resident import TrtSteps

_ON_TENSORRT = Opening("tensorrt")


def open_tensorrt(bundle: Bundle, opening: Opening = _ON_TENSORRT, folder: Path | None = None) -> TrtBackend:
    """The engines in ``folder``, or the first of a bundle that fit this machine.

    Raises MachineError without a GPU or TensorRT, BundleError if no engines fit, with the reason for each.
    """
    cuda = Cuda(
        device=opening.device
    )  # before any Runtime(): without a driver TensorRT returns one that crashes when used
    found = folders(bundle) if folder is None else [folder]
    reasons, remedy, anew = [], None, Remedy("build", {"bundle": bundle.folder})
    if not found:
        raise BundleError(f"'{bundle.folder}' has no TensorRT engines; build engines on this machine", remedy=anew)
    for place in found:
        try:
            record = read_record(place)
        except BundleError as error:  # one damaged folder is no reason against another
            reasons.append(f"{place.name}: {error}")
            continue
        try:
            trt = import_tensorrt(record.package)
        except MachineError as error:
            wrong = [str(error)]
        else:
            wrong = record.misfits(bundle, Here(record.package, str(trt.__version__), cuda.name, cuda.capability))
            if not wrong:
                return TrtBackend(bundle, record, place, trt, opening)
        reasons.append(f"{place.name}: {'; '.join(wrong)}")
        remedy = remedy or record.rebuild(bundle.folder, Here(record.package, "", cuda.name, cuda.capability))
    listed = "\n  ".join(reasons)
    raise BundleError(
        f"no engines of '{bundle.folder}' run on this machine:\n  {listed}\nBuild engines on this machine",
        remedy=remedy or anew,
    )


class TrtBackend:
    """Engines of every block. Safe to use from several threads: their launches go, one by one, to one stream."""

    portable = False

    def __init__(self, bundle: Bundle, record: Record, folder: Path, trt: Any, opening: Opening) -> None:
        self.bundle, self.config, self.cuda_graph = bundle, bundle.manifest.config, opening.cuda_graph
        self.engines = Engines(bundle, record, folder, trt, opening)
        self.precision = record.precision
        self.largest_batch: int | None = record.largest_batch
        self.window = WINDOW
        name = self.engines.here.gpu
        self.description = f"{record.package} {trt.__version__} {record.precision}, {name}"
        self.machine = f"tensorrt {name}"
        self._idle: Spare[TrtSteps] = Spare(not self.engines.one_block, spend(bundle, opening.memory).cache)
        self._memory: dict[str, Memory] = {}  # of forward and gradient, by tensor

    def lanes(self) -> None:
        """None: one launch fills the device."""

    def decoding(self, block: int, z: Array, branches: Branches) -> Decoding:
        least, most = self.engines.range("step", len(branches.labels))
        check_batch(len(z), most, self.engines.rebuild(batch=(least, most, len(z))))
        shape = max(len(z), least), len(branches.labels)
        new = partial(TrtSteps, self.engines, shape, self.cuda_graph)
        steps = self._idle.take(lambda one: one.shape == shape, new)
        with self.engines.cuda:
            self.engines.holders.add(steps)
            steps.begin(block)
        branches = replace(branches, labels=classes(self.config, branches.labels))
        return ResidentDecoding(steps, self._idle, self.bundle.manifest.blocks[block].reversed, z, branches)

    def forward(self, block: int, x: Array, branches: Branches) -> tuple[Array, Array]:
        z, log_det = self._run(block, "forward", forward_feeds(self.config, x, branches))
        return z, log_det

    def gradient(self, block: int, x: Array, labels: Labels, grad_z: Array, grad_log_det: Array) -> Array:
        return self._run(block, "gradient", gradient_feeds(self.config, x, labels, grad_z, grad_log_det))[0]

    def _run(self, block: int, kind: str, feeds: Feeds) -> list[Array]:
        """An engine that is no step, on the host's arrays."""
        branches = len(feeds["labels"])
        sizes, profile = self.engines.range(kind, branches), self.engines.profile(kind, branches)
        return in_parts(self.config, kind, feeds, sizes, partial(self._launch, block, kind, profile))

    def _launch(self, block: int, kind: str, profile: int, feeds: Feeds) -> list[Array]:
        cuda, ports = self.engines.cuda, outputs(self.config, kind)
        results = {port.name: shape(port, Sizes(len(feeds["x"]))) for port in ports}
        with self.engines.cuda:
            addresses = {name: self._place(name, array.nbytes) for name, array in feeds.items()}
            addresses |= {name: self._place(name, 4 * math.prod(found)) for name, found in results.items()}
            for name, array in feeds.items():
                cuda.upload(addresses[name], np.ascontiguousarray(array))
            self.engines.launch(block, kind, profile, {name: array.shape for name, array in feeds.items()}, addresses)
            return [cuda.download(addresses[name], found, np.float32) for name, found in results.items()]

    def _place(self, name: str, size: int) -> int:
        memory = self._memory.get(name)
        if memory is None or memory.size < size:
            self._memory.pop(name, None)
            memory = self._memory[name] = Memory(self.engines.cuda, size)
        return memory.address

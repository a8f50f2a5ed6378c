"""The backend on TensorRT: engines deserialised directly, decoding state in device memory, one CUDA graph a step.

TensorRT and TensorRT-RTX have the same interface; which of the two an engine needs is in its record. An engine is
native code: its hash is checked first, code of the host embedded in it stays disabled.
"""

from __future__ import annotations

import importlib
import math
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backend import WINDOW, Array, Branches, Decoding, pad_rows
from ..bundle import Bundle
from ..errors import BundleError, InputError, MachineError
from ..resident import POSITION, ResidentDecoding, is_state, next_name, shapes
from .cuda import INSTALL, Cuda
from .record import PACKAGES, Here, Profile, Range, Record, folders, read_record, rebuild, tensor_shapes

CACHE_SIZE = {"fp32": 4, "fp16": 2, "bf16": 2}  # bytes of one number
CACHE_TYPE = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}  # TensorRT's names
LEAN = "tensorrt_lean"  # runs version-compatible engines of other versions
_INTEGERS = (POSITION, "labels", "offsets")


def import_tensorrt(package: str) -> Any:
    """``tensorrt``, ``tensorrt_rtx`` or ``tensorrt_lean``. Raises MachineError if it is not here or does not load."""
    if package not in (*PACKAGES, LEAN):
        raise InputError(f"{package!r} is no TensorRT; expected one of {', '.join((*PACKAGES, LEAN))}")
    try:
        return importlib.import_module(package)
    except (ImportError, OSError) as error:  # a wheel without its libraries fails with OSError
        raise MachineError(f"{package} cannot be imported ({str(error)[:200]}); {INSTALL}") from None


def make_logger(trt: Any) -> Any:
    """A logger that keeps errors in ``messages``, to be told in one exception instead of on stderr."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # a base that is known only now
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.messages.append(message.strip())

        def take(self) -> str:
            """What was said since the last time, on one line."""
            text = "; ".join(dict.fromkeys(self.messages)) or "no reason given"
            self.messages.clear()
            return text[:600]

    return Logger()


def refit(trt: Any, logger: Any, engine: Any, graph: Path) -> None:
    """Fill an engine built without weights from a bundle's graph. Raises BundleError if it does not take them."""
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
        raise BundleError(f"an engine does not take the weights of '{graph}'. TensorRT says: {logger.take()}")


def open_tensorrt(
    bundle: Bundle, low_memory: bool = False, cuda_graph: bool = True, folder: Path | None = None
) -> TrtBackend:
    """The engines in ``folder``, or the first of a bundle that fit this machine.

    Raises MachineError without a GPU or TensorRT, BundleError if no engines fit, with the reason for each.
    """
    cuda = Cuda()  # before any Runtime(): without a driver TensorRT returns one that crashes when used
    found = folders(bundle) if folder is None else [folder]
    if not found:
        raise BundleError(f"'{bundle.folder}' has no TensorRT engines; {rebuild(bundle.folder)}")
    reasons, command = [], ""
    for place in found:
        try:
            record = read_record(place)
        except BundleError as error:  # one damaged folder is no reason against another
            reasons.append(f"{place.name}: {error}")
            continue
        try:
            trt = _runtime_for(record)
        except MachineError as error:
            wrong = [str(error)]
        else:
            wrong = record.misfits(bundle, Here(record.package, str(trt.__version__), cuda.name, cuda.capability))
            if not wrong:
                return TrtBackend(bundle, record, place, trt, cuda, low_memory, cuda_graph)
        reasons.append(f"{place.name}: {'; '.join(wrong)}")
        command = command or rebuild(bundle.folder, record, Here(record.package, "", cuda.name, cuda.capability))
    command = command or rebuild(bundle.folder)
    raise BundleError(
        f"no engines of '{bundle.folder}' run on this machine:\n  "
        + "\n  ".join(reasons)
        + f"\n{command[0].upper()}{command[1:]}"
    )


def _runtime_for(record: Record) -> Any:
    """The module that can run a record's engines."""
    trt = import_tensorrt(record.package)
    if not record.version_compatible or trt.__version__ == record.version:
        return trt
    if record.strip_weights:
        raise MachineError(
            f"they need {record.package} {record.version} exactly, here is {trt.__version__}: the lean runtime, which "
            "runs engines of other versions, cannot fill in weights"
        )
    return import_tensorrt(LEAN)


class TrtBackend:
    """Engines of every block, deserialised when first used; with ``low_memory``, one block's at a time.

    Safe to use from several threads: launches go, one after the other, to one stream, so that all contexts can share
    scratch memory. ``cuda_graph`` False launches every kernel of every step anew.
    """

    def __init__(
        self,
        bundle: Bundle,
        record: Record,
        folder: Path,
        trt: Any,
        cuda: Cuda,
        low_memory: bool = False,
        cuda_graph: bool = True,
    ) -> None:
        self.bundle, self.config = bundle, bundle.manifest.config
        self.record, self.cuda, self.cuda_graph = record, cuda, cuda_graph
        self.here = Here(record.package, str(trt.__version__), cuda.name, cuda.capability)
        self.low_memory = low_memory
        self.largest_batch: int | None = record.largest_batch
        self.window = WINDOW
        self.description = f"{record.package} {trt.__version__} {record.precision}, {cuda.name}"
        self.machine = f"tensorrt {cuda.name}"
        self.launching = threading.RLock()
        self.scratch: dict[bool, Memory] = {}  # of steps, and of the rest: what the former captured must not move
        self._trt, self._folder = trt, folder
        self._logger = make_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = False
        self._engines: dict[tuple[int, str], Any] = {}
        self._contexts: dict[tuple[int, str, int], Any] = {}
        self._idle: list[TrtSteps] = []
        self._steps: weakref.WeakSet[TrtSteps] = weakref.WeakSet()
        self._memory: dict[str, Memory] = {}  # of forward and gradient, by tensor

    def lanes(self) -> None:
        """None: one launch fills the device."""

    def decoding(self, block: int, z: Array, branches: Branches) -> Decoding:
        least, most = self._range("step", len(branches.labels))
        if len(z) > most:
            raise InputError(
                f"a batch of {len(z)} is more than these engines take ({most}): use --batch-size {most}, or "
                + self._rebuild(batch=(least, most, len(z)))
            )
        entry = self.bundle.manifest.blocks[block]
        classes = self._classes(branches.labels)
        with self.launching:
            batch, count = max(len(z), least), len(branches.labels)
            self._idle = [steps for steps in self._idle if steps.shape == (batch, count)]
            steps = self._idle.pop() if self._idle else TrtSteps(self, batch, count)
            self._steps.add(steps)
            steps.begin(block)
        return ResidentDecoding(steps, entry.reversed, z, classes, branches, least)

    def forward(self, block: int, x: Array, branches: Branches) -> tuple[Array, Array]:
        parts = []
        least, most = self._range("forward", len(branches.labels))
        for start in range(0, len(x), most):
            rows = slice(start, start + most)
            feeds = {
                "x": pad_rows(x[rows], least),
                "labels": pad_rows(self._classes(branches.labels[:, rows]), least, 1),
                "mix": branches.mix,
                "inverse_temperature": branches.inverse_temperature,
            }
            batch, count = len(feeds["x"]), len(x[rows])
            results = {"z": feeds["x"].shape, "log_det": (batch,)}
            z, log_det = self._run(block, "forward", len(branches.labels), feeds, results)
            parts.append((z[:count], log_det[:count]))
        z, log_det = (np.concatenate(part) for part in zip(*parts, strict=True))
        return z, log_det

    def gradient(self, block: int, x: Array, labels: NDArray[np.int64], grad_z: Array, grad_log_det: Array) -> Array:
        parts = []
        least, most = self._range("gradient", 1)
        for start in range(0, len(x), most):
            rows = slice(start, start + most)
            feeds = {
                "x": pad_rows(x[rows], least),
                "labels": pad_rows(self._classes(labels[None, rows]), least, 1),
                "grad_z": pad_rows(grad_z[rows], least),
                "grad_log_det": pad_rows(grad_log_det[rows], least),
            }
            (grad,) = self._run(block, "gradient", 1, feeds, {"grad_x": feeds["x"].shape})
            parts.append(grad[: len(x[rows])])
        return np.concatenate(parts)

    # --- engines ------------------------------------------------------------------------------------------------

    def engine(self, block: int, kind: str) -> Any:
        """A deserialised engine, its hash and types checked. Raises BundleError if it is not as recorded."""
        with self.launching:
            if self.low_memory and any(key[0] != block for key in self._engines):
                self.cuda.synchronize()
                for steps in self._steps:  # a captured graph must not outlive the engine whose kernels it launches
                    steps.forget(kept=block)
                self._contexts = {key: context for key, context in self._contexts.items() if key[0] == block}
                self._engines = {key: engine for key, engine in self._engines.items() if key[0] == block}
            if (block, kind) not in self._engines:
                self._engines[block, kind] = self._deserialise(block, kind)
            return self._engines[block, kind]

    def launch(
        self, block: int, kind: str, profile: int, inputs: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]
    ) -> None:
        """Put one run of an engine on the stream. The caller holds ``launching``."""
        context = self._context(block, kind, profile)
        scratch = self.scratch[kind == "step"]
        context.set_device_memory(scratch.address, scratch.size)
        fine = all(context.set_input_shape(name, shape) for name, shape in inputs.items())
        fine = fine and all(context.set_tensor_address(name, address) for name, address in addresses.items())
        if not fine or not context.execute_async_v3(self.cuda.handle):
            raise self._failed(block, kind, "refused to run")

    def profile(self, kind: str, branches: int, window: int = 1) -> int:
        """The number of the profile for so many branches and this window. Raises InputError if there is none."""
        profiles = self.record.profiles[kind]
        for number, profile in enumerate(profiles):
            if profile.holds(branches, window):
                return number
        widest = max(profile.window[2] for profile in profiles)
        raise InputError(
            f"these engines take windows of 1 to {widest} positions and {sorted({p.branches for p in profiles})} "
            f"guidance branches, not {window} and {branches}; " + self._rebuild(window=(1, window, window))
        )

    def give(self, steps: TrtSteps) -> None:
        """Take memory back for another block."""
        if not self.low_memory:
            with self.launching:
                self._idle.append(steps)

    def _deserialise(self, block: int, kind: str) -> Any:
        name = next(n for n, entry in self.record.engines.items() if (entry.block, entry.kind) == (block, kind))
        content = self.record.read(self._folder, name)
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise self._failed(block, kind, f"does not load: {self._rebuild()}")
        if self.record.strip_weights:
            graph = self.bundle.path(self.record.engines[name].graph)
            refit(self._trt, self._logger, engine, graph)
        expected = getattr(self._trt.DataType, CACHE_TYPE[self.record.precision])
        for tensor in ("key_0", "value_0") if kind == "step" else ():
            if engine.get_tensor_dtype(tensor) != expected:
                raise BundleError(
                    f"block {block}'s step engine keeps its cache as {engine.get_tensor_dtype(tensor)}; the record "
                    f"says {self.record.precision}: {self._rebuild()}"
                )
        self._reserve(kind == "step", int(engine.device_memory_size_v2))
        return engine

    def _context(self, block: int, kind: str, profile: int) -> Any:
        if (block, kind, profile) not in self._contexts:
            engine = self.engine(block, kind)
            context = engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if context is None or not context.set_optimization_profile_async(profile, self.cuda.handle):
                raise self._failed(block, kind, f"has no context for profile {profile}")
            self._contexts[block, kind, profile] = context
        return self._contexts[block, kind, profile]

    def _reserve(self, steps: bool, size: int) -> None:
        """Make scratch memory at least this large. Captured graphs hold its address, so they go with the old one."""
        if steps not in self.scratch or self.scratch[steps].size < size:
            self.cuda.synchronize()
            for held in self._steps if steps else ():
                held.forget()
            self.scratch.pop(steps, None)  # let go of the old before there are two
            self.scratch[steps] = Memory(self.cuda, size)

    def _rebuild(self, batch: Range | None = None, window: Range | None = None) -> str:
        return rebuild(self.bundle.folder, self.record, self.here, batch, window)

    def _failed(self, block: int, kind: str, what: str) -> BundleError | MachineError:
        said = self._logger.take()
        if "memory" in said.lower() and "alloc" in said.lower():
            return MachineError(f"out of GPU memory in block {block}'s {kind} engine; use a smaller --batch-size")
        return BundleError(f"block {block}'s {kind} engine {what}. TensorRT says: {said}")

    # --- runs that are no steps ---------------------------------------------------------------------------------

    def _run(
        self,
        block: int,
        kind: str,
        branches: int,
        feeds: Mapping[str, NDArray[Any]],
        results: Mapping[str, tuple[int, ...]],
    ) -> list[Array]:
        with self.launching:
            inputs = {name: array.shape for name, array in feeds.items()}
            addresses = {name: self._place(name, array.nbytes) for name, array in feeds.items()}
            addresses |= {name: self._place(name, 4 * math.prod(shape)) for name, shape in results.items()}
            for name, array in feeds.items():
                self.cuda.upload(addresses[name], np.ascontiguousarray(array))
            self.launch(block, kind, self.profile(kind, branches), inputs, addresses)
            return [self.cuda.download(addresses[name], shape, np.float32) for name, shape in results.items()]

    def _place(self, name: str, size: int) -> int:
        memory = self._memory.get(name)
        if memory is None or memory.size < size:
            self._memory.pop(name, None)
            memory = self._memory[name] = Memory(self.cuda, size)
        return memory.address

    def _range(self, kind: str, branches: int) -> tuple[int, int]:
        """The least and the most images an engine takes at once."""
        chosen: Profile = self.record.profiles[kind][self.profile(kind, branches)]
        return chosen.batch[0], chosen.batch[2]

    def _classes(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Labels as the graphs take them: the null class comes after the last."""
        return np.where(labels < 0, self.config.classes, labels)


class Memory:
    """Device memory that is given back when nobody holds it any more."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.address, self.size = cuda.allocate(size), size
        weakref.finalize(self, cuda.free, self.address).atexit = False


class Captured:
    """A captured graph that is destroyed when nobody holds it any more."""

    def __init__(self, cuda: Cuda, launch: Callable[[], None]) -> None:
        self.graph = cuda.capture(launch)
        weakref.finalize(self, cuda.forget, self.graph).atexit = False


class TrtSteps:
    """The step engines' tensors in device memory, allocated once for all blocks of a batch size.

    An output that the engine aliases is bound to that input. Any other state swaps between two places (the
    formulation for old TensorRT), except the position: it is copied back behind the step, as part of it.
    """

    def __init__(self, backend: TrtBackend, batch: int, branches: int) -> None:
        self._backend, self.shape = backend, (batch, branches)
        self._memory: dict[tuple[str, int], Memory] = {}
        self._graphs: dict[tuple[int, int, int], Captured] = {}  # by block, window and turn
        self._warm: set[tuple[int, int, int]] = set()
        self._turn, self._block = 0, 0
        self._aliases: dict[str, str | None] = {}

    def begin(self, block: int) -> None:
        """Decode this block next."""
        engine = self._backend.engine(block, "step")
        state = [name for name in shapes(self._backend.config, 1, 1, 1) if is_state(name)]
        self._aliases = {name: engine.get_aliased_input_tensor(next_name(name)) or None for name in state}
        self._block = block

    def write(self, name: str, array: NDArray[Any]) -> None:
        with self._backend.launching:
            self._backend.cuda.upload(self._address(name), array)

    def read(self, name: str) -> NDArray[Any]:
        shape = shapes(self._backend.config, *self.shape, 1)[name]
        with self._backend.launching:
            return self._backend.cuda.download(self._address(name), shape, np.float32)

    def launch(self, window: int) -> None:
        cuda = self._backend.cuda
        with self._backend.launching:
            key = self._block, window, self._turn
            launch = self._prepare(window)
            if key in self._graphs:
                cuda.replay(self._graphs[key].graph)
            elif key in self._warm and self._backend.cuda_graph:
                self._graphs[key] = Captured(cuda, launch)
                cuda.replay(self._graphs[key].graph)
            else:  # the first run of a shape may still load kernels, which cannot be captured
                launch()
                self._warm.add(key)
            if any(self._swaps(name) for name in self._aliases):
                self._turn = 1 - self._turn

    def close(self, clean: bool) -> None:
        if clean:
            self._backend.give(self)

    def forget(self, kept: int | None = None) -> None:
        """Destroy what was captured of all blocks but one: their engine, or memory it works in, is about to go."""
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[0] == kept}
        self._warm = {key for key in self._warm if key[0] == kept}

    def _prepare(self, window: int) -> Any:
        """A function that puts one step on the stream."""
        backend, config = self._backend, self._backend.config
        profile = backend.profile("step", self.shape[1], window)
        backend.engine(self._block, "step")
        inputs = tensor_shapes(config, "step", *self.shape, window)
        addresses = {name: self._address(name, window=window) for name in inputs}
        for name, alias in self._aliases.items():
            if alias is not None:
                addresses[next_name(name)] = addresses[alias]
            else:
                addresses[next_name(name)] = self._address(name, 1 - self._turn if self._swaps(name) else 1)

        def launch() -> None:
            backend.launch(self._block, "step", profile, inputs, addresses)
            if self._aliases[POSITION] is None:
                backend.cuda.copy(addresses[POSITION], addresses[next_name(POSITION)], 8)

        return launch

    def _swaps(self, name: str) -> bool:
        return self._aliases.get(name, name) is None and name != POSITION

    def _address(self, name: str, place: int | None = None, window: int = 1) -> int:
        """Where a tensor lies, in the place whose turn it is or another; allocated when first asked for."""
        if place is None:
            place = window if name == "offsets" else (self._turn if self._swaps(name) else 0)
        if (name, place) not in self._memory:
            shape = shapes(self._backend.config, *self.shape, window)[name]
            memory = Memory(self._backend.cuda, math.prod(shape) * self._itemsize(name))
            if name == "offsets":
                self._backend.cuda.upload(memory.address, np.arange(window))
            self._memory[name, place] = memory
        return self._memory[name, place].address

    def _itemsize(self, name: str) -> int:
        if name in _INTEGERS:
            return 8
        return CACHE_SIZE[self._backend.record.precision] if name.startswith(("key_", "value_")) else 4

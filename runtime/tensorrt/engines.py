"""Engines of every block, deserialised when first used, and launched on one stream.

An engine is native code: its hash is checked first, code of the host embedded in it stays disabled.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle import Bundle
from ..errors import BundleError, InputError, MachineError, Remedy
from ..memory import spend
from ..opening import Opening
from ..precision import PRECISIONS
from .cuda import Cuda, Memory
from .library import make_logger
from .record import Here, Profile, Range, Record

if TYPE_CHECKING:
    from .resident import TrtSteps

Shapes = Mapping[str, tuple[int, ...]]  # of inputs


class Engines:
    """The engines of a record, for one device; with ``one_block``, which a limit of memory may ask for, one block's at
    a time.

    Safe to use from several threads: launches go, one after the other, to one stream, so that all contexts can share
    scratch memory. Whoever launches or touches device memory holds ``cuda``.
    """

    def __init__(self, bundle: Bundle, record: Record, folder: Path, trt: Any, opening: Opening) -> None:
        self.bundle, self.record = bundle, record
        self.one_block = spend(bundle, opening.memory).one_block
        self.cuda = Cuda(device=opening.device)
        self.here = Here(record.package, str(trt.__version__), self.cuda.name, self.cuda.capability)
        self.holders: weakref.WeakSet[TrtSteps] = weakref.WeakSet()  # of captured graphs
        self._trt, self._folder, self._logger = trt, folder, make_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = False
        self._scratch: dict[bool, Memory] = {}  # of steps, and of the rest: what the former captured must not move
        self._loaded: dict[tuple[int, str], Any] = {}
        self._contexts: dict[tuple[int, str, int], Any] = {}

    def get(self, block: int, kind: str) -> Any:
        """A deserialised engine, its hash and types checked. Raises BundleError if it is not as recorded."""
        with self.cuda:
            if self.one_block and any(key[0] != block for key in self._loaded):
                self.cuda.synchronize()
                for holder in self.holders:  # a captured graph must not outlive the engine whose kernels it launches
                    holder.forget(kept=block)
                self._contexts = {key: context for key, context in self._contexts.items() if key[0] == block}
                self._loaded = {key: engine for key, engine in self._loaded.items() if key[0] == block}
            if (block, kind) not in self._loaded:
                self._loaded[block, kind] = self._deserialise(block, kind)
            return self._loaded[block, kind]

    def launch(self, block: int, kind: str, profile: int, inputs: Shapes, addresses: Mapping[str, int]) -> None:
        """Put one run of an engine on the stream. The caller holds ``cuda``."""
        context = self._context(block, kind, profile)
        scratch = self._scratch[kind == "step"]
        context.set_device_memory(scratch.address, scratch.size)
        fine = all(context.set_input_shape(name, shape) for name, shape in inputs.items())
        fine = fine and all(context.set_tensor_address(name, address) for name, address in addresses.items())
        if not fine or not context.execute_async_v3(int(self.cuda.stream)):
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
            f"guidance branches, not {window} and {branches}; build others",
            field="window",
            found=window,
            expected=f"1 to {widest}",
            remedy=self.rebuild(window=(1, window, window)),
        )

    def range(self, kind: str, branches: int) -> tuple[int, int]:
        """The least and the most images an engine takes at once."""
        chosen: Profile = self.record.profiles[kind][self.profile(kind, branches)]
        return chosen.batch[0], chosen.batch[2]

    def rebuild(self, **sizes: Range) -> Remedy:
        """Building them again for this machine, of other ``sizes`` if these are what is wrong."""
        return self.record.rebuild(self.bundle.folder, self.here, **sizes)

    def _deserialise(self, block: int, kind: str) -> Any:
        name = next(n for n, entry in self.record.engines.items() if (entry.block, entry.kind) == (block, kind))
        engine = self._runtime.deserialize_cuda_engine(self.record.read(self._folder, name))
        if engine is None:
            raise self._failed(block, kind, "does not load")
        expected = getattr(self._trt.DataType, str(PRECISIONS[self.record.precision].tensorrt))
        for tensor in ("key_0", "value_0") if kind == "step" else ():
            if engine.get_tensor_dtype(tensor) != expected:
                raise BundleError(
                    f"block {block}'s step engine keeps its cache as {engine.get_tensor_dtype(tensor)}; the record "
                    f"says {self.record.precision}: build the engines again",
                    remedy=self.rebuild(),
                )
        self._reserve(kind == "step", int(engine.device_memory_size_v2))
        return engine

    def _context(self, block: int, kind: str, profile: int) -> Any:
        if (block, kind, profile) not in self._contexts:
            engine = self.get(block, kind)
            context = engine.create_execution_context(self._ours(engine))
            if context is None or not context.set_optimization_profile_async(profile, int(self.cuda.stream)):
                raise self._failed(block, kind, f"has no context for profile {profile}")
            self._contexts[block, kind, profile] = context
        return self._contexts[block, kind, profile]

    def _ours(self, engine: Any) -> Any:
        """How a context is made: scratch memory is handed to it; TensorRT-RTX compiles the kernels of a shape before it
        runs, not beside it: a capture would keep those that fill in until then.
        """
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.record.package != "tensorrt_rtx":
            return strategy
        runtime_config = engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(strategy)
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        runtime_config.dynamic_shapes_kernel_specialization_strategy = eager
        return runtime_config

    def _reserve(self, steps: bool, size: int) -> None:
        """Make scratch memory at least this large. Captured graphs hold its address, so they go with the old one."""
        if steps not in self._scratch or self._scratch[steps].size < size:
            self.cuda.synchronize()
            for holder in self.holders if steps else ():
                holder.forget()
            self._scratch.pop(steps, None)  # let go of the old before there are two
            self._scratch[steps] = Memory(self.cuda, size)

    def _failed(self, block: int, kind: str, what: str) -> BundleError | MachineError:
        said = self._logger.take()
        if "memory" in said.lower() and "alloc" in said.lower():
            message = f"out of GPU memory in block {block}'s {kind} engine; use a smaller `batch_size`"
            return MachineError(message, field="batch_size")
        return BundleError(
            f"block {block}'s {kind} engine {what}; TensorRT says: {said}. If it stays so, build the engines again",
            remedy=self.rebuild(),
        )

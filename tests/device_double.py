"""A device that is not there: CUDA and TensorRT as far as the runtime uses them, on the host's memory.

Engines are executed by ONNX Runtime on the very graphs that would be built, from the addresses and shapes that were
set. So a wrong address, a stale shape or a missing copy gives wrong numbers, or an error like the device's.
"""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum, IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from tarflow.export.engines.blueprint import GRAPHS, Blueprint
from tarflow.export.engines.options import Options
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.files import sha256
from tarflow.runtime.tensorrt.record import ENGINE_KINDS, FOLDER, Range, Record, Target

GPU, CAPABILITY, VERSION = "NVIDIA Double", "9.0", "11.4.0.106"
Result = tuple[Any, ...]


class CudaError(Enum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorStreamCaptureUnsupported = 900


class DoubleCuda:
    """``cuda.bindings.runtime``: device memory is host memory whose every use is checked against what is allocated."""

    cudaError_t = CudaError
    cudaStreamNonBlocking = 1

    class cudaMemcpyKind(IntEnum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2
        cudaMemcpyDeviceToDevice = 3

    class cudaStreamCaptureMode(IntEnum):
        cudaStreamCaptureModeThreadLocal = 1

    def __init__(self, devices: int = 1, memory: int = 1 << 40) -> None:
        self.devices, self.memory = devices, memory
        self.allocated: dict[int, np.ndarray[Any, Any]] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.graphs: set[int] = set()
        self.calls: list[str] = []
        self.streams = 0

    def array(self, address: int, size: int) -> np.ndarray[Any, Any]:
        """Bytes of device memory; an address outside all allocations is an error of the caller."""
        for base, buffer in self.allocated.items():
            if base <= address and address + size <= base + len(buffer):
                return buffer[address - base : address - base + size]
        raise AssertionError(f"{size} bytes at {address:#x} are not allocated")

    def put(self, work: Callable[[], None]) -> None:
        """Work for the stream: done at once, or recorded while capturing."""
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def cudaGetDeviceCount(self) -> Result:
        if self.devices < 0:
            return CudaError.cudaErrorInsufficientDriver, None
        return CudaError.cudaSuccess, self.devices

    def cudaGetDeviceProperties(self, device: int) -> Result:
        major, minor = CAPABILITY.split(".")
        return CudaError.cudaSuccess, SimpleNamespace(name=GPU.encode(), major=int(major), minor=int(minor))

    def cudaSetDevice(self, number: int) -> Result:
        return (CudaError.cudaSuccess,)

    cudaGraphDestroy = cudaSetDevice  # nothing to do for these

    def cudaStreamCreateWithFlags(self, flags: int) -> Result:
        self.streams += 1
        return CudaError.cudaSuccess, 77

    def cudaStreamDestroy(self, stream: int) -> Result:
        self.streams -= 1
        return (CudaError.cudaSuccess,)

    def cudaMalloc(self, size: int) -> Result:
        if size + sum(map(len, self.allocated.values())) > self.memory:
            return CudaError.cudaErrorMemoryAllocation, None
        buffer = np.full(size, 0xA5, np.uint8)  # fresh memory holds anything
        self.allocated[buffer.ctypes.data] = buffer
        return CudaError.cudaSuccess, buffer.ctypes.data

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> Result:
        self.put(lambda: self.array(address, size).fill(value))
        return (CudaError.cudaSuccess,)

    def cudaFree(self, address: int) -> Result:
        assert self.recording is None, "memory was given back during a capture, which spoils it"
        self.allocated.pop(address).fill(0xA5)
        return (CudaError.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> Result:
        kinds = self.cudaMemcpyKind
        if self.recording is not None and kind != kinds.cudaMemcpyDeviceToDevice:
            return (CudaError.cudaErrorStreamCaptureUnsupported,)  # a bus in the loop
        self.calls.append(f"copy {kinds(kind).name.removeprefix('cudaMemcpy')}")

        def copy() -> None:
            for address, side in ((source, kinds.cudaMemcpyHostToDevice), (target, kinds.cudaMemcpyDeviceToHost)):
                if kind != side:
                    self.array(address, size)
            ctypes.memmove(target, source, size)

        self.put(copy)
        return (CudaError.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Result:
        assert self.recording is None
        self.recording = []
        return (CudaError.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> Result:
        graph, self.recording = self.recording, None
        return CudaError.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Result:
        self.calls.append("capture")
        self.graphs.add(id(graph))
        return CudaError.cudaSuccess, graph

    def cudaGraphLaunch(self, graph: Any, stream: int) -> Result:
        assert id(graph) in self.graphs
        self.calls.append("replay")
        for work in graph:
            work()
        return (CudaError.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: Any) -> Result:
        assert self.recording is None
        self.graphs.discard(id(graph))
        return (CudaError.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> Result:
        if self.recording is not None:
            return (CudaError.cudaErrorStreamCaptureUnsupported,)
        return (CudaError.cudaSuccess,)


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 2
    BF16 = 3


TYPES: dict[str, tuple[Any, DataType]] = {
    "tensor(float)": (np.float32, DataType.FLOAT),
    "tensor(float16)": (np.float16, DataType.HALF),
    "tensor(int64)": (np.int64, DataType.INT64),
}


class DoubleTensorRT:
    """The module ``tensorrt``. ``fail`` makes the next execution refuse, as TensorRT does: a message, and False."""

    DataType = DataType
    __spec__ = ModuleSpec("tensorrt", None)  # what import machinery asks of a module

    class ExecutionContextAllocationStrategy(Enum):
        STATIC = 0
        USER_MANAGED = 2

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        def log(self, severity: int, message: str) -> None:
            raise NotImplementedError

    def __init__(self, cuda: DoubleCuda, version: str = VERSION) -> None:
        self.cuda, self.__version__ = cuda, version
        self.fail: str | None = None
        self.deserialised = self.executed = self.runtimes = 0

    def Runtime(self, logger: Any) -> DoubleRuntime:
        self.runtimes += 1
        return DoubleRuntime(self, logger)


class DoubleRuntime:
    def __init__(self, trt: DoubleTensorRT, logger: Any) -> None:
        self.trt, self.logger = trt, logger
        self.engine_host_code_allowed = True  # the worst a runtime could begin with

    def deserialize_cuda_engine(self, content: bytes) -> DoubleEngine:
        assert not self.engine_host_code_allowed
        self.trt.deserialised += 1
        return DoubleEngine(self.trt, self.logger, json.loads(content))


class DoubleEngine:
    """An engine: a graph, the profiles it was built for, and which outputs lie on inputs."""

    def __init__(self, trt: DoubleTensorRT, logger: Any, plan: Mapping[str, Any]) -> None:
        self.trt, self.logger, self.plan = trt, logger, plan
        self.device_memory_size_v2 = int(plan["scratch"])
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(plan["graph"], options)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}

    def get_tensor_dtype(self, name: str) -> DataType:
        return TYPES[{**self.inputs, **self.outputs}[name].type][1]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        """TensorScatter writes in place; the position is a tensor of its own."""
        source = name.removesuffix("_next")
        return source if source in self.inputs and source != "position" else None

    def create_execution_context(self, strategy: Any) -> DoubleContext:
        assert strategy is self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return DoubleContext(self)


class DoubleContext:
    def __init__(self, engine: DoubleEngine) -> None:
        self.engine, self.trt = engine, engine.trt
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.ran: dict[str, tuple[int, ...]] | None = None

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream
        self.profile = profile
        return profile < len(self.engine.plan["profiles"])

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = (address, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, most = self.engine.plan["profiles"][self.profile][name]
        if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            return self._error(f"{name}: {shape} is outside the profile, {least} to {most}")
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.inputs and name not in self.engine.outputs:
            return self._error(f"no tensor {name}")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream
        self.trt.executed += 1
        if self.trt.fail:
            return self._error(self.trt.fail)
        shapes, addresses, scratch = dict(self.shapes), dict(self.addresses), self.scratch
        if shapes.keys() != self.engine.inputs.keys() or addresses.keys() != {*shapes, *self.engine.outputs}:
            return self._error("not all tensors have a shape and an address")
        if self.trt.cuda.recording is not None and self.ran != shapes:
            return self._error("kernels are loaded for other shapes, which cannot be captured")
        self.ran = shapes
        if scratch[1] < self.engine.device_memory_size_v2:
            return self._error("scratch memory is too small")
        for output in self.engine.outputs:
            alias = self.engine.get_aliased_input_tensor(output)
            if alias and addresses[output] != addresses[alias]:
                return self._error(f"{output} must lie on {alias}")
        alive = weakref.ref(self)  # a captured graph keeps neither context nor engine: it launches what it was told

        def work() -> None:
            context = alive()
            assert context is not None, "a graph was replayed whose engine is gone"
            context._run(shapes, addresses, scratch)

        self.trt.cuda.put(work)
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], scratch: tuple[int, int]) -> None:
        """What a launch does: inputs from their addresses, outputs to theirs; the scratch memory is scribbled over.

        A device orders nothing that does not depend on data, so the next position is written before inputs are read.
        """
        memory, engine = self.trt.cuda.array, self.engine
        memory(*scratch).fill(0xA5)

        def view(name: str, shape: tuple[int, ...], kind: str) -> np.ndarray[Any, Any]:
            dtype = np.dtype(TYPES[kind][0])
            size = int(np.prod(shape)) * dtype.itemsize
            array: np.ndarray[Any, Any] = memory(addresses[name], size).view(dtype).reshape(shape)
            return array

        inputs = {name: view(name, shape, engine.inputs[name].type) for name, shape in shapes.items()}
        if "position_next" in engine.outputs:
            after = inputs["position"] + shapes["offsets"][0]
            view("position_next", (1,), "tensor(int64)")[:] = after
        results = engine.session.run(None, {name: array.copy() for name, array in inputs.items()})
        for (name, value), result in zip(engine.outputs.items(), results, strict=True):
            if name != "position_next":
                view(name, result.shape, value.type)[...] = result

    def _error(self, message: str) -> bool:
        self.engine.logger.log(self.trt.ILogger.ERROR, message)
        return False


def build_double(
    folder: Path, batch: Range = (1, 8, 32), window: Range = (1, 1, 1), **changes: Any
) -> tuple[Path, Record]:
    """Engines for the double in a bundle's folder, and their record with ``changes``."""
    bundle, options = Bundle.open(folder), Options(batch, window)
    profiles = options.profiles(bundle.manifest.config)
    target = Target(GPU, (CAPABILITY,))
    record = Record(bundle.hash, bundle.manifest.precision, "tensorrt", VERSION, target, profiles)
    record = replace(record, **changes)
    blueprint = Blueprint(bundle, options, None, record)
    place = folder / FOLDER / "double"
    place.mkdir(parents=True, exist_ok=True)
    engines = {}
    for name, engine in blueprint.engines().items():
        sizes = blueprint.shapes(GRAPHS[engine.kind])
        plan = {
            "graph": str(folder / engine.graph),
            "scratch": 1000 * (1 + ENGINE_KINDS.index(engine.kind)),
            "profiles": [{name: (least[name], most[name]) for name in least} for least, _, most in sizes],
        }
        (place / name).write_text(json.dumps(plan))
        engines[name] = replace(engine, sha256=sha256(place / name), built=record.precision, attested="engine")
    record = replace(record, engines=engines)
    record.write(place)
    return place, record

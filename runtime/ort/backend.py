"""The backend on ONNX Runtime.

On a CPU the step graph reads its KV cache and returns the window's keys and values; this module owns the cache, stores
them, and lets it grow in buckets, so that early steps do not pay for slots that are still empty. On a GPU the resident
graph keeps everything on the device.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..backend import WINDOW, Array, Branches, Decoding, block_order
from ..bundle import Bundle
from ..errors import BundleError, MachineError, TarflowError
from ..machine import cores, gpu, processor
from ..memory import USUAL, Budget
from ..resident import POSITION, ResidentDecoding, is_state, next_name, shapes

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",  # ONNX Runtime's own use of TensorRT; what it refuses goes to CUDA
}
Feeds = dict[str, NDArray[Any]]
CACHE_TYPES: dict[str, Any] = {  # numpy has no bfloat16
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": np.uint16,
    "int8": np.float32,
}
MASKED = -1e30  # exp() of it is exactly 0
_CUDA = {"use_tf32": "0"}  # by default fp32's products would round what they multiply to 10 bits of mantissa
_CPU_WINDOW = 16  # costs two to three steps at batch 1, and finds about as many patches where a block is hard
_BFLOAT16 = 16  # ONNX TensorProto.BFLOAT16


def load_onnxruntime() -> Any:
    """The onnxruntime module. Raises MachineError if there is none."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MachineError(
            f"ONNX Runtime is not installed ({error}); install one of its two builds: pip install onnxruntime, "
            "or pip install onnxruntime-gpu on a machine with CUDA"
        ) from None
    if PROVIDERS["cuda"] in onnxruntime.get_available_providers() and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls(directory="")  # CUDA's libraries, where pip put them
    return onnxruntime


@functools.cache
def share_arena() -> None:
    """One pool of scratch memory for the sessions that ask for it, instead of a peak for each. Once a process."""
    ort = load_onnxruntime()
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(place, None)


class OrtBackend:
    """Sessions for every block's graphs, opened when first used; as ``budget`` says, one block's at a time.

    Safe to use from several threads. ``threads`` None leaves the number to ONNX Runtime (one a core); ``spinning``
    False makes idle threads sleep, which is better when cores are shared. ``resident`` keeps the state of decoding on
    the device; None does so on a GPU. ``cuda_graph`` lets the CUDA provider record a step once and replay it.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: str = "cpu",
        threads: int | None = None,
        spinning: bool | None = None,
        budget: Budget = USUAL,
        resident: bool | None = None,
        cuda_graph: bool = True,
    ) -> None:
        self.bundle, self.config = bundle, bundle.manifest.config
        self.budget = budget
        self.largest_batch: int | None = None
        self._ort = load_onnxruntime()
        name = PROVIDERS[provider]
        available = self._ort.get_available_providers()
        if name not in available:
            raise MachineError(
                f"provider '{provider}' needs {name}; this ONNX Runtime {self._ort.__version__} has "
                f"{', '.join(available)}. Install onnxruntime-gpu in place of onnxruntime, or use --provider cpu"
            )
        self._providers = list(dict.fromkeys([name, *([PROVIDERS["cuda"]] * (provider != "cpu")), PROVIDERS["cpu"]]))
        self.description = f"ONNX Runtime {self._ort.__version__}, {name.removesuffix('ExecutionProvider')}"
        self._threads, self._spinning = threads, spinning
        device = f"{processor()}, {threads or cores()} threads" if provider == "cpu" else gpu()
        self.machine = f"{provider} {device}"
        self._sessions: dict[tuple[int, str, tuple[tuple[str, int], ...]], onnxruntime.InferenceSession] = {}
        self._lock = threading.Lock()
        self.memory = Memory(keep=not budget.low_memory)
        self.copies_inputs = provider != "cpu"  # elsewhere, binding an array copies what is in it at that moment
        self.device = "cpu" if provider == "cpu" else "cuda"
        self.resident = provider != "cpu" if resident is None else resident
        self.window = WINDOW if provider != "cpu" else _CPU_WINDOW
        self.cuda_graph = cuda_graph and provider == "cuda"
        self._idle: list[OrtSteps] = []
        self._graph_ids = itertools.count(1)
        self.launching = threading.Lock()  # a session that captures CUDA graphs runs for one thread at a time
        if self.resident and not bundle.manifest.blocks[0].has("resident"):
            self.resident, self.description = False, f"{self.description}, cache on the host: an old bundle"
        if provider != "cpu":
            self.session(0, "forward")  # fails here and now if the provider does not start

    def lanes(self) -> tuple[OrtBackend, int] | None:
        threads = self._threads or cores()
        if self.copies_inputs or threads == 1 or self.budget != USUAL:  # it holds the weights of the steps once more
            return None
        return OrtBackend(self.bundle, "cpu", 1, budget=self.budget, resident=self.resident), threads

    def decoding(self, block: int, z: Array, branches: Branches) -> Decoding:
        if not self.resident:
            return OrtDecoding(self, block, z, branches)
        steps = self._steps(block, len(z), len(branches.labels))
        reverse = self.bundle.manifest.blocks[block].reversed
        return ResidentDecoding(steps, reverse, z, self.classes(branches.labels), branches)

    def forward(self, block: int, x: Array, branches: Branches) -> tuple[Array, Array]:
        session = self.session(block, "forward")
        mix, inverse_temperature = branches.mix, branches.inverse_temperature
        parts = []
        passes = len(inverse_temperature)
        for rows in self._chunks(len(x), 3 * passes, 12 * passes):
            labels = self.classes(branches.labels[:, rows])
            feeds: Feeds = {"x": x[rows], "labels": labels, "mix": mix, "inverse_temperature": inverse_temperature}
            parts.append(self.run(session, block, "forward", feeds))
        z, log_det = (np.concatenate(part) for part in zip(*parts, strict=True))
        return z, log_det

    def gradient(self, block: int, x: Array, labels: NDArray[np.int64], grad_z: Array, grad_log_det: Array) -> Array:
        session = self.session(block, "gradient")
        parts = []
        for rows in self._chunks(len(x), self.config.layers + 4, 12 * (self.config.layers + 1)):
            feeds: Feeds = {
                "x": x[rows],
                "labels": self.classes(labels[None, rows]),
                "grad_z": grad_z[rows],
                "grad_log_det": grad_log_det[rows],
            }
            parts.append(self.run(session, block, "gradient", feeds)[0])
        return np.concatenate(parts)

    def classes(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Labels as the graphs take them: the null class comes after the last."""
        return np.where(labels < 0, self.config.classes, labels)

    def session(self, block: int, kind: str, sizes: tuple[tuple[str, int], ...] = ()) -> Any:
        """The session of one graph, opened on first use; ``sizes`` fixes axes by name."""
        with self._lock:
            if self.budget.low_memory:  # sessions in use elsewhere live on until their users let go of them
                self._sessions = {key: s for key, s in self._sessions.items() if key[0] == block}
            if (block, kind, sizes) not in self._sessions:
                self._sessions[block, kind, sizes] = self._open(block, kind, sizes)
            return self._sessions[block, kind, sizes]

    def run(self, session: Any, block: int, kind: str, feeds: Feeds) -> list[NDArray[Any]]:
        """One run on numpy arrays; ONNX Runtime's errors become one that names the graph."""
        try:
            outputs: list[NDArray[Any]] = session.run(None, {k: np.ascontiguousarray(v) for k, v in feeds.items()})
        except Exception as error:
            raise self.failed(block, kind, error) from None
        return outputs

    def failed(self, block: int, kind: str, error: Exception) -> TarflowError:
        if isinstance(error, MemoryError) or "allocate" in str(error).lower():
            return MachineError(
                f"out of memory in block {block}'s {kind} graph; use a smaller --batch-size or --low-memory"
            )
        return BundleError(f"block {block}'s {kind} graph failed in {self.description}: {_first_line(error)}")

    def _open(self, block: int, kind: str, sizes: tuple[tuple[str, int], ...]) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors; ONNX Runtime's hints are not for our users
        options.inter_op_num_threads = 1
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if self._spinning is not None:
            options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self._spinning else "0")
        if self._spinning is not False:
            # Blocks run one after the other: the last one's idle threads must not take a core from this one's.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if kind != "step":
            # Prepacking would copy the block's weights for every session. It pays only where a graph runs per step.
            options.add_session_config_entry("session.disable_prepacking", "1")
        if kind in ("forward", "gradient"):  # large scratch, never two at a time in one flow
            share_arena()
            options.add_session_config_entry("session.use_env_allocators", "1")
        if self.bundle.manifest.precision == "int8":
            # A step multiplies in int8, activations rounded block by block: that is its speed. What judges it does not.
            level = "4" if kind in ("step", "resident") else "1"
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
            options.add_session_config_entry("session.qdq_matmulnbits_block_size", "64")
        for axis, size in sizes:  # known shapes fold away, and with them the arithmetic that would leave the GPU
            options.add_free_dimension_override_by_name(axis, size)
        path = self.bundle.path(self.bundle.manifest.blocks[block].graphs[kind])
        try:
            name = "-".join([path.stem, *(f"{axis}{size}" for axis, size in sizes)])
            session = self._start(path, options, kind, name)
        except Exception as error:
            raise BundleError(f"'{path}' cannot be loaded by {self.description}: {_first_line(error)}") from None
        if self._providers[0] not in session.get_providers():  # ONNX Runtime falls back to the CPU without a word
            raise MachineError(
                f"{self._providers[0]} could not be started: its libraries or a GPU are missing; run: tarflow doctor, "
                "or use --provider cpu"
            )
        return session

    def _start(self, path: Path, options: Any, kind: str, name: str) -> Any:
        """A session; of a resident graph, one that captures CUDA graphs if the provider lets it."""
        rest = [(name, _CUDA) if name == PROVIDERS["cuda"] else name for name in self._providers[1:]]
        if kind == "resident" and self.cuda_graph:
            try:
                first = (self._providers[0], {**_CUDA, "enable_cuda_graph": "1"})
                return self._ort.InferenceSession(str(path), options, providers=[first, *rest])
            except Exception as error:  # a node that has no CUDA kernel in this version: slower, not wrong
                self.cuda_graph = False
                self.description += f", without CUDA graphs: {_first_line(error)[:120]}"
        return self._ort.InferenceSession(str(path), options, providers=[self._first(name), *rest])

    def _first(self, session: str) -> Any:
        """The provider asked for, with its options.

        TensorRT's keeps the engines it builds, or would build them at every start. They are native code and ONNX
        Runtime checks no hash of them, so they lie with the user, by the bundle's hash, and never in a bundle.
        """
        name = self._providers[0]
        if name == PROVIDERS["cuda"]:
            return name, _CUDA
        if name != PROVIDERS["ort-tensorrt"]:
            return name
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "tarflow" / "ort-tensorrt" / f"{self.bundle.hash[:16]}-{self._ort.__version__}" / session
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:  # then it builds at every start
            return name
        return name, {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}

    def _steps(self, block: int, batch: int, branches: int) -> OrtSteps:
        """Memory for this shape, left by an earlier block or new; memory of other shapes is let go of."""
        with self._lock:
            self._idle = [steps for steps in self._idle if steps.shape == (batch, branches)]
            steps = self._idle.pop() if self._idle else None
        if steps is None:
            steps = OrtSteps(self, batch, branches)
        steps.block = block
        return steps

    def give(self, steps: OrtSteps) -> None:
        """Take memory back for another block."""
        if not self.budget.low_memory:
            with self._lock:
                self._idle.append(steps)

    def graph_id(self) -> int:
        """A number no captured CUDA graph has yet."""
        return next(self._graph_ids)

    def _chunks(self, batch: int, attention: int, hidden: int) -> list[slice]:
        """Sub-batches that fit the budget, if so many (H, T, T) and (T, C) arrays of each image live at once."""
        rows = self.budget.rows(self.config, attention, hidden)
        return [slice(start, start + rows) for start in range(0, batch, rows)]


class Memory:
    """Large buffers handed from one block's cache to the next: fresh ones cost a page fault for every 4 KiB."""

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._free: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> NDArray[np.uint8]:
        with self._lock:
            fitting = [i for i, buffer in enumerate(self._free) if len(buffer) == size]
            if fitting:
                return self._free.pop(fitting[0])
            self._free.clear()  # of another batch: let go before there are two
        return np.empty(size, np.uint8)

    def give(self, buffers: list[NDArray[np.uint8]]) -> None:
        with self._lock:
            if self._keep:
                self._free += buffers


class OrtDecoding:
    """One block being inverted: every buffer is allocated here, none inside the loop of steps."""

    def __init__(self, backend: OrtBackend, block: int, z: Array, branches: Branches) -> None:
        config = backend.config
        self._backend, self._block = backend, block
        self._session = backend.session(block, "step")
        self._reversed = backend.bundle.manifest.blocks[block].reversed
        self._z = np.ascontiguousarray(block_order(z, self._reversed))
        self.x = self._z.copy()
        self._labels = backend.classes(branches.labels)
        # Per step and branch, what multiplies each of the network's outputs: (T, G, 1, outputs)
        parts = branches.mix if config.nvp else branches.mix[1:]
        self._mix = np.repeat(parts.transpose(2, 1, 0), config.patch_dim, 2)[:, :, None]
        self._mix_varies = bool((self._mix != self._mix[:1]).any())
        scale = branches.inverse_temperature / np.float32(np.sqrt(config.head_dim))
        self._query_scale = np.repeat(scale, len(z)).reshape(-1, 1, 1, 1)
        self._cache_type = CACHE_TYPES[backend.bundle.manifest.precision]
        rows = branches.labels.size
        self._cache = np.zeros((2 * config.layers, rows, config.heads, 0, config.head_dim), self._cache_type)
        whole = 2 * config.layers * rows * config.width * config.tokens
        self._memory = [backend.memory.take(whole * self._cache.itemsize) for _ in range(2)]
        # Larger buckets make attention read more empty slots, smaller ones copy the cache more often: 16, 32, 64 slots
        # for 64, 256, 1024 patches balance the two.
        self._bucket = 16 * math.ceil(math.sqrt(3 * config.tokens) / 16)
        self._window, self._position = 0, 0

    def guess(self, patches: Array) -> None:
        self.x[:] = block_order(patches, self._reversed)

    def step(self, position: int, window: int = 1) -> None:
        self.x[:, position + 1 : position + 1 + window] = self.evaluate(position, window)

    def evaluate(
        self, position: int, window: int, rows: NDArray[np.bool_] | None = None, steady: bool = False
    ) -> Array:
        tokens = self.x.shape[1]
        if position < 0 or window < 1 or position + window >= tokens:
            raise IndexError(f"window {position}...{position + window - 1} has no next patch in {tokens}")
        end = position + window
        if window != self._window or end > self._cache.shape[3]:
            self._prepare(end, window)
        self._unmask(position)
        self._x_in[:] = self.x[:, position:end]
        self._z_in[:] = self._z[:, position + 1 : end + 1]
        self._index_in[:] = (
            range(tokens - 1 - position, tokens - 1 - end, -1) if self._reversed else range(position, end)
        )
        if self._mix_varies:
            self._fill_mix(position, end)
        on_host = not self._backend.copies_inputs
        if on_host and rows is not None and not steady and 2 * np.count_nonzero(rows) <= len(rows):
            return self._evaluate_few(position, end, rows)
        try:
            if self._backend.copies_inputs:
                for name, value in self._bound:
                    self._binding.bind_ortvalue_input(name, value)
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise self._backend.failed(self._block, "step", error) from None
        if rows is None or rows.all():
            self._cache[:, :, :, position:end] = self._fresh
        else:
            cached = self._cached(rows)
            self._cache[:, cached, :, position:end] = self._fresh[:, cached]
        return self._x_out

    def _evaluate_few(self, position: int, end: int, rows: NDArray[np.bool_]) -> Array:
        """The same for ``rows`` alone, whose part of the cache is copied: cheap beside the products it saves."""
        cached = self._cached(rows)
        parts: Feeds = {"x": self._x_in, "z": self._z_in, "index": self._index_in}
        feeds: Feeds = {name: array[rows].reshape(-1, *array.shape[2:]) for name, array in parts.items()}
        feeds |= {"labels": self._labels[:, rows].repeat(end - position, 1), "bias": self._bias}
        feeds["mix"] = self._mix_in[:, rows].reshape(len(self._labels), -1, self._mix_in.shape[3])
        feeds["query_scale"] = self._query_scale[cached]
        for layer in range(self._backend.config.layers):
            feeds[f"key_{layer}"] = self._cache[2 * layer, cached]
            feeds[f"value_{layer}"] = self._cache[2 * layer + 1, cached]
        found, fresh = self._backend.run(self._session, self._block, "step", feeds)
        self._x_out[rows] = found.reshape(-1, *self._x_out.shape[1:])
        self._cache[:, cached, :, position:end] = fresh.reshape(len(self._cache), -1, *fresh.shape[1:])
        return self._x_out

    def _cached(self, rows: NDArray[np.bool_]) -> NDArray[np.intp]:
        """The rows of the cache that hold these images, in every branch."""
        return np.flatnonzero(np.tile(rows, len(self._labels)))

    def patches(self) -> Array:
        return np.ascontiguousarray(block_order(self.x, self._reversed))

    def close(self) -> None:
        """Hand the memory of the cache to the next block. The decoding must not be used afterwards."""
        self._backend.memory.give(self._memory)
        self._memory = []

    def _unmask(self, position: int) -> None:
        """Let attention see the slots before ``position``, and those alone."""
        low, high = sorted((self._position, position))
        self._bias[:, low:high] = 0 if position > self._position else MASKED
        self._position = position

    def _fill_mix(self, position: int, end: int) -> None:
        self._mix_in[:] = self._mix[position:end].transpose(1, 2, 0, 3)

    def _prepare(self, filled: int, window: int) -> None:
        """Grow the cache to hold ``filled`` slots, and bind buffers for ``window``."""
        config = self._backend.config
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
        self._fill_mix(0, window)
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
        for layer in range(config.layers):
            self.inputs[f"key_{layer}"] = self._cache[2 * layer]
            self.inputs[f"value_{layer}"] = self._cache[2 * layer + 1]
        try:
            self._bind(
                {"x_next": self._x_out.reshape(-1, patch_dim), "fresh": self._fresh.reshape(-1, *self._fresh.shape[2:])}
            )
        except Exception as error:  # a graph with other inputs than the manifest lets expect
            raise self._backend.failed(self._block, "step", error) from None

    def _bind(self, outputs: Feeds) -> None:
        """Bind all arrays. A value borrows its array on the CPU, so both must outlive the binding."""
        binding = self._session.io_binding()
        self._bound = [(name, self._value(array)) for name, array in self.inputs.items()]
        for name, value in self._bound:
            binding.bind_ortvalue_input(name, value)
        self._outputs = [(name, self._value(array)) for name, array in outputs.items()]
        for name, value in self._outputs:
            binding.bind_ortvalue_output(name, value)
        self._binding = binding

    def _value(self, array: NDArray[Any]) -> Any:
        ort = self._backend._ort
        if array.dtype == np.uint16:
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
        return ort.OrtValue.ortvalue_from_numpy(array)


class OrtSteps:
    """The resident graph on ONNX Runtime; every tensor is allocated here, once for all blocks of a batch size.

    State outputs are bound to their inputs' memory. The position is not: a step reads it until its end, so two of
    them take turns. So a step can be run twice without harm, which ONNX Runtime does to capture a CUDA graph.
    """

    def __init__(self, backend: OrtBackend, batch: int, branches: int) -> None:
        self._backend, self.shape, self.block = backend, (batch, branches), 0
        self._cache_type = CACHE_TYPES[backend.bundle.manifest.precision]
        self._values: dict[str, Any] = {}
        for name, shape in shapes(backend.config, batch, branches, 1).items():
            if name != "offsets":
                self._values[name] = self._allocate(np.zeros(shape, self._type(name)))
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
            with self._backend.launching:
                session.run_with_iobinding(binding, options)
        except Exception as error:
            raise self._backend.failed(self.block, "resident", error) from None
        self._turn = 1 - self._turn

    def close(self, clean: bool) -> None:
        if clean:
            self._backend.give(self)

    def _bind(self, window: int) -> tuple[Any, Any, Any]:
        batch, branches = self.shape
        sizes = (("batch", batch), ("branches", branches), ("rows", batch * branches), ("window", window))
        session = self._backend.session(self.block, "resident", sizes)
        if f"offsets {window}" not in self._values:
            self._values[f"offsets {window}"] = self._allocate(np.arange(window))
        binding = session.io_binding()
        for name, shape in shapes(self._backend.config, batch, branches, window).items():
            source = f"offsets {window}" if name == "offsets" else self._current(name)
            place = self._backend.device, 0, self._element(name), shape
            binding.bind_input(name, *place, self._values[source].data_ptr())
            if is_state(name):
                target = self._current(name, 1 - self._turn)
                binding.bind_output(next_name(name), *place, self._values[target].data_ptr())
        options = self._backend._ort.RunOptions()
        if self._backend.cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(self._backend.graph_id()))
        return session, binding, options

    def _current(self, name: str, turn: int | None = None) -> str:
        """Which tensor is an input's now: the position alone changes."""
        turn = self._turn if turn is None else turn
        return next_name(POSITION) if name == POSITION and turn else name

    def _type(self, name: str) -> Any:
        if name in (POSITION, "labels", "offsets"):
            return np.int64
        return self._cache_type if name.startswith(("key_", "value_")) else np.float32

    def _element(self, name: str) -> Any:
        """The element type as bindings take it."""
        found = self._type(name)
        return _BFLOAT16 if found is np.uint16 else found

    def _allocate(self, array: NDArray[Any]) -> Any:
        return self._backend._ort.OrtValue.ortvalue_from_numpy(array, self._backend.device, 0)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]

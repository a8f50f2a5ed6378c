"""The backend on ONNX Runtime.

The step graph reads its KV cache and returns the window's keys and values; this module owns the cache, stores them,
and lets it grow in buckets, so that early steps do not pay for slots that are still empty.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .backend import Array, Branches, block_order
from .bundle import Bundle
from .errors import BundleError, MachineError, TarflowError

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
Feeds = dict[str, NDArray[Any]]
CACHE_TYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}  # numpy has no bfloat16
_BFLOAT16 = 16  # ONNX TensorProto.BFLOAT16
_ACTIVATIONS = 1 << 30  # bytes of attention weights that forward and gradient may hold at once


def load_onnxruntime() -> Any:
    """The onnxruntime module. Raises MachineError if there is none."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MachineError(
            f"ONNX Runtime is not installed ({error}); install one of its two builds: pip install onnxruntime, "
            "or pip install onnxruntime-gpu on a machine with CUDA"
        ) from None
    return onnxruntime


class OrtBackend:
    """Sessions for every block's graphs, opened when first used; with ``low_memory``, one block's at a time.

    Safe to use from several threads. ``threads`` None leaves the number to ONNX Runtime (one a core); ``spinning``
    False makes idle threads sleep, which is better when cores are shared.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: str = "cpu",
        threads: int | None = None,
        spinning: bool | None = None,
        low_memory: bool = False,
    ) -> None:
        self.bundle, self.config = bundle, bundle.manifest.config
        self.low_memory = low_memory
        self._ort = load_onnxruntime()
        name = PROVIDERS[provider]
        available = self._ort.get_available_providers()
        if name not in available:
            raise MachineError(
                f"provider '{provider}' needs {name}; this ONNX Runtime {self._ort.__version__} has "
                f"{', '.join(available)}. Install onnxruntime-gpu in place of onnxruntime, or use --provider cpu"
            )
        self._providers = [name] if provider == "cpu" else [name, PROVIDERS["cpu"]]
        self.description = f"ONNX Runtime {self._ort.__version__}, {name.removesuffix('ExecutionProvider')}"
        self._threads, self._spinning = threads, spinning
        self._sessions: dict[tuple[int, str], onnxruntime.InferenceSession] = {}
        self._lock = threading.Lock()

    def decoding(self, block: int, z: Array, branches: Branches) -> OrtDecoding:
        return OrtDecoding(self, block, z, branches)

    def forward(self, block: int, x: Array, branches: Branches) -> tuple[Array, Array]:
        session = self.session(block, "forward")
        mix, inverse_temperature = branches.mix, branches.inverse_temperature
        parts = []
        for rows in self._chunks(len(x), 3 * len(inverse_temperature)):
            labels = branches.labels[:, rows]
            feeds: Feeds = {"x": x[rows], "labels": labels, "mix": mix, "inverse_temperature": inverse_temperature}
            parts.append(self.run(session, block, "forward", feeds))
        z, log_det = (np.concatenate(part) for part in zip(*parts, strict=True))
        return z, log_det

    def gradient(self, block: int, x: Array, labels: NDArray[np.int64], grad_z: Array, grad_log_det: Array) -> Array:
        session = self.session(block, "gradient")
        parts = []
        for rows in self._chunks(len(x), self.config.layers + 4):
            feeds: Feeds = {
                "x": x[rows],
                "labels": labels[None, rows],
                "grad_z": grad_z[rows],
                "grad_log_det": grad_log_det[rows],
            }
            parts.append(self.run(session, block, "gradient", feeds)[0])
        return np.concatenate(parts)

    def session(self, block: int, kind: str) -> Any:
        """The session of one graph, opened on first use."""
        with self._lock:
            if self.low_memory:  # sessions in use elsewhere live on until their users let go of them
                self._sessions = {key: s for key, s in self._sessions.items() if key[0] == block}
            if (block, kind) not in self._sessions:
                self._sessions[block, kind] = self._open(block, kind)
            return self._sessions[block, kind]

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

    def _open(self, block: int, kind: str) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors; ONNX Runtime's hints are not for our users
        options.inter_op_num_threads = 1
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if self._spinning is not None:
            options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self._spinning else "0")
        if kind != "step":
            # Prepacking would copy the block's weights for every session. It pays only where a graph runs per step.
            options.add_session_config_entry("session.disable_prepacking", "1")
        path = self.bundle.path(self.bundle.manifest.blocks[block].graphs[kind])
        try:
            return self._ort.InferenceSession(str(path), options, providers=self._providers)
        except Exception as error:
            raise BundleError(f"'{path}' cannot be loaded by {self.description}: {_first_line(error)}") from None

    def _chunks(self, batch: int, live: int) -> list[slice]:
        """Sub-batches whose attention weights, ``live`` copies of them, fit the budget."""
        per_row = live * self.config.heads * self.config.tokens**2 * 4
        rows = max(1, min(batch, _ACTIVATIONS // per_row))
        return [slice(start, start + rows) for start in range(0, batch, rows)]


class OrtDecoding:
    """One block being inverted: every buffer is allocated here, none inside the loop of steps."""

    def __init__(self, backend: OrtBackend, block: int, z: Array, branches: Branches) -> None:
        config = backend.config
        self._backend, self._block = backend, block
        self._session = backend.session(block, "step")
        self._reversed = backend.bundle.manifest.blocks[block].reversed
        self._z = np.ascontiguousarray(block_order(z, self._reversed))
        self._x = np.zeros_like(self._z)
        self._x[:, 0] = self._z[:, 0]
        self._branches = branches
        self._rows = branches.labels.size
        self._cache_type = CACHE_TYPES[backend.bundle.manifest.precision]
        self._cache = np.zeros((2 * config.layers, self._rows, config.heads, 0, config.head_dim), self._cache_type)
        self._bucket = 32 if config.tokens <= 512 else 64
        self._position = np.zeros(1, np.int64)
        self._window = 0

    def guess(self, patches: Array) -> None:
        self._x[:] = block_order(patches, self._reversed)

    def step(self, position: int, window: int = 1) -> None:
        tokens = self._x.shape[1]
        if position < 0 or window < 1 or position + window >= tokens:
            raise IndexError(f"window {position}...{position + window - 1} has no next patch in {tokens}")
        if window != self._window or position + window > self._cache.shape[3]:
            self._prepare(position + window, window)
        end = position + window
        self._x_in[:] = self._x[:, position:end]
        self._z_in[:] = self._z[:, position + 1 : end + 1]
        self._mix_in[:] = self._branches.mix[:, :, position:end]
        self._position[0] = position
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise self._backend.failed(self._block, "step", error) from None
        self._cache[:, :, :, position:end] = self._fresh
        self._x[:, position + 1 : end + 1] = self._x_out

    def patches(self) -> Array:
        return np.ascontiguousarray(block_order(self._x, self._reversed))

    def _prepare(self, filled: int, window: int) -> None:
        """Grow the cache to hold ``filled`` slots, and bind buffers for ``window``."""
        config = self._backend.config
        batch, _, patch_dim = self._x.shape
        capacity = self._cache.shape[3]
        if filled > capacity:
            grown = min(config.tokens, -(-filled // self._bucket) * self._bucket)
            cache = np.zeros((*self._cache.shape[:3], grown, config.head_dim), self._cache_type)
            cache[:, :, :, :capacity] = self._cache
            self._cache = cache
        self._window = window
        self._x_in, self._z_in, self._x_out = (np.empty((batch, window, patch_dim), np.float32) for _ in range(3))
        self._mix_in = np.empty((2, len(self._branches.inverse_temperature), window), np.float32)
        self._fresh = np.empty((2 * config.layers, self._rows, config.heads, window, config.head_dim), self._cache_type)

        binding = self._session.io_binding()
        inputs: Feeds = {
            "x": self._x_in,
            "z": self._z_in,
            "labels": np.ascontiguousarray(self._branches.labels),
            "position": self._position,
            "mix": self._mix_in,
            "inverse_temperature": self._branches.inverse_temperature,
        }
        for layer in range(config.layers):
            inputs[f"key_{layer}"], inputs[f"value_{layer}"] = self._cache[2 * layer], self._cache[2 * layer + 1]
        self._bound = [(name, self._value(array)) for name, array in inputs.items()]
        for name, value in self._bound:  # a value borrows its array: both must outlive the binding
            binding.bind_ortvalue_input(name, value)
        self._outputs = [("x_next", self._value(self._x_out)), ("fresh", self._value(self._fresh))]
        for name, value in self._outputs:
            binding.bind_ortvalue_output(name, value)
        self.inputs, self._binding = inputs, binding

    def _value(self, array: NDArray[Any]) -> Any:
        ort = self._backend._ort
        if array.dtype == np.uint16:
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
        return ort.OrtValue.ortvalue_from_numpy(array)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]

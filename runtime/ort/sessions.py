"""Sessions of ONNX Runtime: a bundle's graphs, each opened when it is first used, and run with errors that name it."""

from __future__ import annotations

import ctypes
import threading
import weakref
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import FUSED, RESIDENT, Bundle
from ..errors import BundleError, MachineError, Remedy, TarflowError, limit_of_machine
from ..gpus import numbered
from ..machine import cores, cpu_quota
from ..opening import Opening
from ..parts import Feeds
from .device import drop, touching
from .library import PROVIDERS, check_path, first_line, load_cuda, load_onnxruntime, share_arena
from .weights import DeviceWeights

if TYPE_CHECKING:
    import onnxruntime

    from .resident import OrtSteps

_CUDA = {"use_tf32": "0"}  # fp32 means fp32
_ON_DEVICE = (RESIDENT, *FUSED.values())
MOST_CAPTURES = 64  # of one graph's steps: more than shapes and windows usually make


class Sessions:
    """Open sessions of a bundle's graphs, on one provider; with ``one_block``, of one block at a time. Each is for all
    sizes of batch, branches and window; on a GPU all of a block share its weights.

    Safe to use from several threads: whoever opens, runs, reads or writes anything on a GPU holds ``touching``.
    ``captures`` says that steps are recorded as CUDA graphs, ``description`` what engine runs them. Raises MachineError
    for a provider that this ONNX Runtime does not have.
    """

    def __init__(self, bundle: Bundle, opening: Opening, one_block: bool) -> None:
        self.bundle, self._opening, self._one_block = bundle, opening, one_block
        self.ort = load_onnxruntime()
        check_path(bundle.folder)
        self._provider, available = PROVIDERS[opening.provider_name], self.ort.get_available_providers()
        if self._provider not in available:
            raise MachineError(
                f"provider '{opening.provider}' needs {self._provider}; this ONNX Runtime {self.ort.__version__} has "
                f"{', '.join(available)}. Install onnxruntime-gpu in place of onnxruntime, or use `provider` cpu",
                field="provider",
                found=opening.provider,
                expected="cpu",
            )
        self.device = opening.provider_name  # by the name that tensors on it take
        self.number = numbered(opening.device)
        if self.device == "cuda":
            load_cuda()
        self.touching: AbstractContextManager[object] = nullcontext() if self.device == "cpu" else touching
        self.captures = opening.cuda_graph and self.device == "cuda"
        self.holders: weakref.WeakSet[OrtSteps] = weakref.WeakSet()  # of captures
        self.description = f"ONNX Runtime {self.ort.__version__}, {self._provider.removesuffix('ExecutionProvider')}"
        self._open: dict[tuple[int, str], onnxruntime.InferenceSession] = {}
        self._captured: dict[tuple[int, str], int] = {}  # by block and kind
        self._lock = threading.Lock()
        self._weights = DeviceWeights(bundle, self.number) if self.device != "cpu" else None
        if self.device != "cpu":
            weakref.finalize(self, drop, self._open).atexit = False

    def get(self, block: int, kind: str) -> Any:
        """The session of one graph. Raises BundleError for a graph that does not load."""
        with self.touching, self._lock:
            if self._one_block:  # sessions in use elsewhere live on until their users let go of them
                for key in [key for key in self._open if key[0] != block]:
                    del self._open[key]
            if (block, kind) not in self._open:
                self._open[block, kind] = self._start(block, kind)
            return self._open[block, kind]

    def look_ahead(self, block: int, kind: str) -> None:
        """Open the graph that is needed after a block's, while its steps run."""
        if block and not self._one_block and kind in self.bundle.manifest.blocks[block - 1].graphs:
            self.get(block - 1, kind)

    def to_capture(self, block: int, kind: str) -> tuple[Any, int]:
        """The session of steps of one graph, and a number that no capture in it has yet. Under ``touching``.

        ONNX Runtime destroys captures with their session alone: one that is full of them is opened anew.
        """
        if self.captures:
            self._captured[block, kind] = self._captured.get((block, kind), 0) + 1
            if self._captured[block, kind] > MOST_CAPTURES:
                for holder in self.holders:
                    holder.forget(block, kind)
                self._open.pop((block, kind), None)
                self._captured[block, kind] = 1
        return self.get(block, kind), self._captured.get((block, kind), 0)

    def after_fork(self) -> None:
        """Begin anew in a child process. The parent's sessions stay for ever: their threads are not here, and a session
        that ends waits for its threads (onnxruntime issue 31961).
        """
        for session in self._open.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))
        self._open, self._lock = {}, threading.Lock()

    def run(self, block: int, kind: str, feeds: Feeds) -> list[NDArray[Any]]:
        """One run on numpy arrays; ONNX Runtime's errors become one that names the graph."""
        options, arrays = None, {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        if self.device != "cpu":  # scratch memory is given back: each block's session would keep the most it ever had
            options = self.ort.RunOptions()
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"gpu:{self.number}")
        with self.touching:
            session = self.get(block, kind)
            try:
                outputs: list[NDArray[Any]] = session.run(None, arrays, options)
            except Exception as error:
                raise self.failed(block, kind, error) from None
            finally:
                del session  # which may be the last to hold it
        return outputs

    def failed(self, block: int, kind: str, error: Exception) -> TarflowError:
        """What a graph's failure is: the machine's, or the graph's own."""
        if limit_of_machine(error, "running") is not None:
            return MachineError(
                f"out of memory in block {block}'s {kind} graph; use a smaller `batch_size`, or `memory` least",
                field="batch_size",
            )
        return BundleError(f"block {block}'s {kind} graph failed in {self.description}: {first_line(error)}")

    def _start(self, block: int, kind: str) -> Any:
        graph = self.bundle.manifest.blocks[block].graphs[kind]
        path, options = self.bundle.path(graph), self._options(kind)
        try:
            weights = [] if self._weights is None else self._weights.give(options, block, graph)
            session = self._session(path, options, kind)
            session.weights = weights  # which it does not own
        except MachineError:
            raise
        except Exception as error:
            self.bundle.confirm()
            said = f"'{path}' cannot be loaded by {self.description}: {first_line(error)}"
            raise limit_of_machine(error, f"loading '{path}'") or BundleError(said) from None
        self.bundle.confirm()
        if self._provider not in session.get_providers():  # ONNX Runtime falls back to the CPU without a word
            raise MachineError(
                f"{self._provider} could not be started: its libraries or a GPU are missing; use `provider` cpu, or "
                "find out what this machine has",
                field="provider",
                remedy=Remedy("doctor"),
            )
        return session

    def _session(self, path: Path, options: Any, kind: str) -> Any:
        """A session; of a graph with its state on the device, one that captures CUDA graphs if the provider lets it."""
        if kind in _ON_DEVICE and self.captures:
            try:
                return self.ort.InferenceSession(str(path), options, providers=self._providers(enable_cuda_graph="1"))
            except Exception as error:  # a node that has no CUDA kernel in this version: slower, not wrong
                self.captures = False
                self.description += f", without CUDA graphs: {first_line(error)[:120]}"
        return self.ort.InferenceSession(str(path), options, providers=self._providers())

    def _providers(self, **options: str) -> list[Any]:
        if self.device == "cpu":
            return [self._provider]
        return [(self._provider, _CUDA | {"device_id": str(self.number)} | options), PROVIDERS["cpu"]]

    def _options(self, kind: str) -> Any:
        options, opening = self.ort.SessionOptions(), self._opening
        options.log_severity_level = 3  # errors; ONNX Runtime's hints are not for our users
        options.inter_op_num_threads = 1
        if opening.threads is not None or cpu_quota() is not None:  # else ONNX Runtime takes a thread a core
            options.intra_op_num_threads = opening.threads or cores()
        if opening.spinning is not None:
            options.add_session_config_entry("session.intra_op.allow_spinning", "1" if opening.spinning else "0")
        if opening.spinning is not False:
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
            level = "4" if kind in ("step", RESIDENT) else "1"
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
            options.add_session_config_entry("session.qdq_matmulnbits_block_size", "64")
        return options

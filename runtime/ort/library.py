"""The onnxruntime module, taken from here by all that need it: found, quiet, and with one pool of scratch memory."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from typing import Any

from ..errors import InputError, MachineError, limit_of_machine

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_LONGEST = 300  # characters of a message


def load_onnxruntime() -> Any:
    """The onnxruntime module, its telemetry off. Raises MachineError if there is none."""
    # Since 1.29 it writes below HOME and reports to its makers once it is imported. 0 would be the user's own wish.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # Attention of one position by flash attention's one kernel, not by four others. 1 would be the user's own wish.
    os.environ.setdefault("ORT_ENABLE_XQA", "0")
    try:
        import onnxruntime
    except ImportError as error:
        raise limit_of_machine(error, "loading ONNX Runtime") or MachineError(
            f"ONNX Runtime is not installed ({error}); install one of its two builds: pip install onnxruntime, "
            "or pip install onnxruntime-gpu on a machine with CUDA"
        ) from None
    return onnxruntime


@functools.cache
def load_cuda() -> None:
    """CUDA's libraries from where pip put them, for ONNX Runtime's provider. What is missing the provider will say."""
    ort = load_onnxruntime()
    ort.set_default_logger_severity(3)  # errors: what it warns of is how devices are named, and cuDNN
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # which is for results; it prints there what it did not find
            ort.preload_dlls(directory="")


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise InputError for a place that ONNX Runtime cannot be told of: it takes names in UTF-8 alone."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"'{path}' is no text in UTF-8, which ONNX Runtime needs; rename it") from None


@functools.cache
def share_arena() -> None:
    """One pool of scratch memory for the sessions that ask for it, instead of a peak for each. Once a process."""
    ort = load_onnxruntime()
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(place, None)


def first_line(error: Exception) -> str:
    """What ONNX Runtime said, without the rest of it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:_LONGEST]

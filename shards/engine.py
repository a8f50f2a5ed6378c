"""Which engine draws a job: settled once, when the job is written, and the same for every worker.

A job records the native engine and its precision, whose bits are the same on every machine. One that records none is
drawn by ONNX Runtime or TensorRT, by whatever each machine has of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..runtime.bundle import Bundle
from ..runtime.errors import InputError
from ..runtime.opening import NATIVE_PRECISIONS, Opening
from ..runtime.providers import settled
from .folder import recorded


def engine_of(bundle: Bundle, folder: Path, opening: Opening, gpus: bool = False) -> str | None:
    """The engine of the job that is drawn into ``folder``: the one asked for, or for "auto" the one of the job that is
    there already, or else what this machine takes. ``gpus`` says that workers draw it who have GPUs.
    """
    asked = opening.else_on("auto")
    if asked.provider != "auto":
        return asked.engine(bundle.manifest.precision)
    job = recorded(folder)
    if job is not None:
        return job.get("engine")
    return None if gpus else settled(bundle, opening).engine(bundle.manifest.precision)


def on_engine(engine: str | None, opening: Opening) -> Opening:
    """How to open the bundle for a job of this engine, where nothing else was asked for; of none, "auto" stays what it
    is. Raises InputError for an engine that this version does not know.
    """
    if engine is None or opening.provider != "auto":
        return opening
    name, _, precision = engine.partition(" ")
    if name != "native" or precision not in NATIVE_PRECISIONS:
        expected = f"native and one of {', '.join(NATIVE_PRECISIONS)}"
        raise InputError(
            f"the job is drawn by '{engine}'; expected {expected}: continue it with the version that began it"
        )
    return replace(opening, provider=name, precision=precision)

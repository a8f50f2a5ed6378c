"""The modules that build and run engines: TensorRT and TensorRT-RTX, which have one interface, and their log."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import InputError, MachineError
from .cuda import INSTALL
from .record import PACKAGES


def import_tensorrt(package: str) -> Any:
    """``tensorrt`` or ``tensorrt_rtx``. Raises MachineError if it is not here or does not load."""
    if package not in PACKAGES:
        raise InputError(f"{package!r} is no TensorRT; expected one of {', '.join(PACKAGES)}")
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

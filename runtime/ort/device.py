"""What a process may do on a GPU while ONNX Runtime captures there: nothing else, in whatever thread and session.

Captures are of CUDA's mode Global: a copy, an allocation or a wait of any thread fails them.
"""

from __future__ import annotations

import os
import threading
from typing import Any


class _Touching:
    """A lock that a thread may take several times, and that is free in a forked process."""

    def __init__(self) -> None:
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


touching = _Touching()  # whoever holds it waits for no other lock: what is dropped may need it at any time


def drop(*held: dict[Any, Any] | list[Any]) -> None:
    """Let go of what lies on a device, one after the other, when it is certain that nothing is being captured."""
    with touching:
        for part in held:
            part.clear()

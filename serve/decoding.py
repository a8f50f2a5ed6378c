"""Pictures are decoded beside the drawing, a few at a time: one that takes minutes holds up no samples."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque

from ..runtime.samples import Progress
from .batcher import Abandoned, Full, Waiting

_DECODERS = 2
_MOST_WAITING = 8


class Decoding:
    """A queue for threads of its own. Nobody waits for them when the service stops: a decoder cannot be told to end."""

    def __init__(self) -> None:
        self.waiting: deque[Waiting] = deque()
        self._free = _DECODERS

    def put(self, one: Waiting) -> None:
        """Queue work. Raises Full."""
        if not self._free and len(self.waiting) >= _MOST_WAITING:
            raise Full(1.0, len(self.waiting))
        self.waiting.append(one)
        self._begin()

    def abandon(self, one: Waiting) -> None:
        """Nobody waits for this: it is not begun, or what it comes to is dropped."""
        with contextlib.suppress(ValueError):
            self.waiting.remove(one)
        one.settle(Abandoned())

    def stop(self) -> None:
        for one in self.waiting:
            one.settle(Abandoned())
        self.waiting.clear()

    def _begin(self) -> None:
        while self._free and self.waiting:
            given = self.waiting.popleft(), asyncio.get_running_loop()
            threading.Thread(target=self._decode, args=given, name="decode", daemon=True).start()
            self._free -= 1

    def _decode(self, one: Waiting, loop: asyncio.AbstractEventLoop) -> None:  # in a thread
        try:
            assert callable(one.work)
            outcome = one.work(_unwatched)
        except Exception as error:
            outcome = error
        with contextlib.suppress(RuntimeError):  # the service has stopped, and its loop is closed
            loop.call_soon_threadsafe(self._end, one, outcome)

    def _end(self, one: Waiting, outcome: object) -> None:
        one.settle(outcome)
        self._free += 1
        self._begin()


def _unwatched(progress: Progress) -> None:
    pass

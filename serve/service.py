"""The service: one flow, its queue, and how a request gets its answer, its time limit or its refusal."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..runtime.errors import TarflowError
from ..runtime.flow import Flow
from ..runtime.request import Resolved
from .batcher import Abandoned, Batcher, Drawn, Full, OnProgress, Waiting
from .decoding import Decoding
from .metrics import Metrics
from .settings import Settings
from .words import http_words

_SMALL = 16 << 10  # bytes packed or parsed in well under a millisecond: less than a thread costs
D = TypeVar("D")
T = TypeVar("T")
Work = Resolved | Callable[[OnProgress], Any]


class Refusal(HTTPException):
    """An answer that is not a result."""


def said(refusal: HTTPException) -> Response:
    """The answer: one sentence of JSON."""
    content = json.dumps({"error": str(refusal.detail)})  # in ASCII: a message may quote what UTF-8 has no bytes for
    return Response(content, refusal.status_code, refusal.headers, "application/json")


class Service:
    """What routes stand on. ``draining`` turns readiness off; work goes on until the server stops."""

    def __init__(self, flow: Flow, settings: Settings) -> None:
        self.flow, self.settings = flow, settings
        self.metrics = Metrics(flow.backend.description)
        self.batcher, self.decoding = Batcher(flow, settings, self.metrics), Decoding()
        self.started = self.draining = False

    @property
    def ready(self) -> bool:
        return self.started and not self.draining

    async def start(self) -> None:
        await self.batcher.start()
        self.started = True

    async def stop(self) -> None:
        self.draining = True
        self.decoding.stop()
        await self.batcher.stop()

    async def draw(self, request: Request, wanted: Resolved) -> Drawn:
        """Samples, drawn together with those of other requests. Raises Refusal."""
        drawn: Drawn = await self.compute(request, wanted)
        return drawn

    async def compute(self, request: Request, work: Resolved | Callable[[OnProgress], T]) -> T:
        """The result of ``work``, called alone in a drawing thread, and queued, bounded and timed like :meth:`draw`.

        What it is given is what ``Flow.sample`` takes as progress: it raises when nobody waits any more.
        Raises Refusal.
        """
        result: T = await self._result(request, self.batcher, work, self._deadline())
        return result

    async def compute_of(self, request: Request, decode: Callable[[], D], work: Callable[[D, OnProgress], T]) -> T:
        """The same of what ``decode`` gives, which has threads of its own, and the time limit of both together."""
        until = self._deadline()
        decoded: D = await self._result(request, self.decoding, lambda _: decode(), until)
        result: T = await self._result(request, self.batcher, lambda progress: work(decoded, progress), until)
        return result

    def _deadline(self) -> float:
        return time.monotonic() + self.settings.timeout

    async def _result(self, request: Request, queue: Batcher | Decoding, work: Work, until: float) -> Any:
        if not self.started:
            raise Refusal(503, "the service is still starting; ask again in a moment", {"Retry-After": "1"})
        mine = Waiting(work)
        try:
            queue.put(mine)
        except Full as full:
            after = str(max(1, min(60, math.ceil(full.seconds))))
            message = f"{full.waiting} requests wait already; ask again in {after} s"
            raise Refusal(429, message, {"Retry-After": after}) from None
        leaving = asyncio.create_task(_disconnected(request))
        try:
            seconds = max(0.0, until - time.monotonic())
            await asyncio.wait({mine.done, leaving}, timeout=seconds, return_when="FIRST_COMPLETED")
            if mine.done.done():
                return mine.done.result()
            self.metrics.abandoned.labels("left" if leaving.done() else "timeout").inc()
            if leaving.done():
                raise Refusal(499, "the client left")
            raise Refusal(504, f"no result within {self.settings.timeout:g} s; ask for less, or at a quieter time")
        except Abandoned:
            raise Refusal(503, "the service is stopping", {"Retry-After": "5"}) from None
        except TarflowError as error:
            raise Refusal(400 if error.exit_code == 2 else 503, http_words(error)) from None
        finally:
            leaving.cancel()
            queue.abandon(mine)


async def aside(size: int, work: Callable[..., T], *arguments: Any) -> T:
    """The result of ``work`` over ``size`` bytes, in a thread if it would hold the event loop up."""
    if size <= _SMALL:
        return work(*arguments)
    return await asyncio.to_thread(work, *arguments)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


_BRANCH = re.compile(r"(bool|int|float|str|constrained-\w+|list\[.*\])")
_SHOULD = "Input should be "
_LONGEST_FOUND = 40  # characters of what was sent


def validation_message(errors: Sequence[Any]) -> str:
    """What pydantic found wrong, each field once, and of what was sent a short word or number."""
    by_field: dict[str, list[Any]] = {}
    for error in errors:
        by_field.setdefault(".".join(str(part) for part in error["loc"] if not _is_branch(part)), []).append(error)
    return "; ".join(f"{field}: {_told(found)}" for field, found in [*by_field.items()][:5])[:1000]


def _is_branch(part: Any) -> bool:
    """Whether a part of a place is pydantic's name for one of the types that a field may have."""
    return isinstance(part, str) and _BRANCH.fullmatch(part) is not None


def _told(errors: list[Any]) -> str:
    words = " or ".join(
        dict.fromkeys([errors[0]["msg"], *(error["msg"].removeprefix(_SHOULD) for error in errors[1:])])
    )
    found = errors[0].get("input")
    simple = isinstance(found, (str, int, float, bool)) and len(str(found)) <= _LONGEST_FOUND
    return f"{words}; found {found!r}" if simple and str(found).isprintable() else words

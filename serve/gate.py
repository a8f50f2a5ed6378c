"""What every request passes before a route sees it: who asks, how much they send; and one line of log afterwards."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
import traceback
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .log import log
from .protocol import HEADER, LARGEST_JSON
from .service import Refusal, Service, said

_OPEN = ("/", "/v2/health/live", "/v2/health/ready")  # for probes, and a page that then asks for the token
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LENGTH = re.compile(r"[0-9]{1,19}")
_HELD = 4  # times the largest body: bytes of bodies that may be in memory at once


class Gate:
    """ASGI around the application: authorisation, limits of bodies, a log line and metrics for every answer."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        token = service.settings.token
        self._digest = None if token is None else _digest(token)
        self._held = 0  # bytes of bodies in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, _request_id(scope))
        body = _Body(self, scope, receive)
        try:
            refusal = self._refusal(scope)
            app = self.app if refusal is None else said(refusal)
            await app(scope, body.receive, answer.send)
        except Exception as error:
            if answer.status:
                raise
            log("failure", "error", id=answer.identity, error="".join(traceback.format_exception(error))[-4000:])
            failure = Refusal(500, f"this should not have happened; the log has it as {answer.identity}")
            await said(failure)(scope, receive, answer.send)
        finally:
            self._held -= body.size
            self._note(scope, answer)

    def _refusal(self, scope: Scope) -> Refusal | None:
        """Why this request goes no further, from its headers alone."""
        headers = Headers(scope=scope)
        if self._digest is not None and not _is_open(scope["path"]) and not self._authorised(headers):
            message = "this service asks for a token; send Authorization: Bearer TOKEN"
            return Refusal(401, message, {"WWW-Authenticate": "Bearer"})
        if any(value.lower() != "identity" for value in headers.getlist("content-encoding")):
            return Refusal(415, "the body is compressed; send it plain")
        lengths = headers.getlist("content-length")
        if len(lengths) > 1 or not all(_LENGTH.fullmatch(value) for value in lengths):
            return Refusal(400, "Content-Length is no number, or there are two")
        if lengths and int(lengths[0]) > self.limit(scope):
            return _too_large(self.limit(scope))
        return None

    def _authorised(self, headers: Headers) -> bool:
        given = headers.getlist("authorization")
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        right = hmac.compare_digest(_digest(token.strip()), self._digest or b"")
        return right and scheme.lower() == "bearer"

    def limit(self, scope: Scope) -> int:
        """The largest body: parsing JSON holds everybody up, so that is short. Of a binary request the JSON part is."""
        infer = scope["path"].startswith("/v2/models/") and scope["path"].endswith("/infer")
        if scope["path"] == "/v1/likelihood" or (infer and HEADER in Headers(scope=scope)):
            return self.service.settings.largest_body
        return min(LARGEST_JSON, self.service.settings.largest_body)

    def hold(self, size: int) -> None:
        """Count bytes of a body. Raises Refusal when there are too many in memory."""
        self._held += size
        if self._held > _HELD * self.service.settings.largest_body:
            raise Refusal(503, "too much is being sent at once; ask again in a moment", {"Retry-After": "1"})

    def _note(self, scope: Scope, answer: _Answer) -> None:
        seconds = time.perf_counter() - answer.started
        route = getattr(scope.get("route"), "path", "none")
        self.service.metrics.responses.labels(route, str(answer.status)).inc()
        self.service.metrics.seconds.labels(route).observe(seconds)
        client = scope.get("client")
        log(
            "request",
            "error" if answer.status >= 500 else "info",
            method=scope["method"],
            path=scope["path"][:200],
            status=answer.status,
            seconds=round(seconds, 6),
            id=answer.identity,
            client=client[0] if client else None,
        )


class _Body:
    """A body on its way in: counted, and not waited for longer than a request may take."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive) -> None:
        self._gate, self._receive = gate, receive
        self._limit, self._timeout = gate.limit(scope), gate.service.settings.timeout
        self._deadline = asyncio.get_running_loop().time() + self._timeout
        self.size, self._more = 0, True

    async def receive(self) -> Message:
        if not self._more:  # only the client's leaving can follow
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self._timeout:g} s") from None
        if message["type"] == "http.disconnect":
            raise Refusal(499, "the client left before its body was here")
        size = len(message.get("body", b""))
        self.size += size
        self._gate.hold(size)
        if self.size > self._limit:
            raise _too_large(self._limit)
        self._more = message.get("more_body", False)
        return message


class _Answer:
    """An answer on its way out: its status is remembered, the request's id is added."""

    def __init__(self, send: Send, identity: str) -> None:
        self._send, self.identity = send, identity
        self.status, self.started = 0, time.perf_counter()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = dict(message["headers"])
            headers |= {b"x-request-id": self.identity.encode(), b"x-content-type-options": b"nosniff"}
            message["headers"] = list(headers.items())
        await self._send(message)


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body is larger than {limit} bytes; send less, or tensors as binary data")


def _is_open(path: str) -> bool:
    return path in _OPEN or (path.startswith("/page/") and ".." not in path)


def _digest(token: str) -> bytes:
    """Of equal length whatever was sent, so that comparing says nothing about the token's."""
    return hashlib.sha256(token.encode()).digest()


def _request_id(scope: Scope) -> str:
    """The client's, if it is one, else a new one."""
    given = filter(_REQUEST_ID.fullmatch, Headers(scope=scope).getlist("x-request-id"))
    return next(given, None) or uuid.uuid4().hex[:16]

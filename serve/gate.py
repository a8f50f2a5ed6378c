"""What every request passes before a route sees it: who asks, how much they send; and one line of log afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
import time
import traceback
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .browsers import Browsers
from .log import log
from .picture import LARGEST_BYTES
from .protocol import HEADER, LARGEST_JSON
from .service import Refusal, Service, said

_OPEN = ("/", "/v2/health/live", "/v2/health/ready")  # for probes, and a page that then asks for the token
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LENGTH = re.compile(r"[0-9]{1,19}")
_INFER = re.compile(r"/v2/models/([^/]*)(?:/versions/[^/]*)?/infer")
_NO_BODY = 16 << 10  # bytes: of routes that read none
_DRAWING = 256 << 10  # of what to draw, and what a label takes in JSON
_LABEL = 32
_LINGER = 5.0  # seconds
_HELD = 4  # times the largest body: bytes of bodies that may be in memory at once


class Gate:
    """ASGI around the application: authorisation, limits of bodies, a log line and metrics for every answer."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        token, hosts = service.settings.token, service.settings.allowed_hosts
        self._digest = None if token is None else _digest(token)
        self._browsers = None if hosts is None else Browsers(hosts)
        self._held = 0  # bytes of bodies in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(self, scope, receive)
        answer = _Answer(send, scope, body)
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
        if self._browsers is not None and (refusal := self._browsers.refusal(scope)) is not None:
            return refusal
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
        """The largest body of a route, in bytes: what it can use. JSON is short, even where binary tensors are not."""
        settings, infer = self.service.settings, _INFER.fullmatch(scope["path"])
        if scope["path"] == "/v1/likelihood":
            largest = LARGEST_BYTES
        elif scope["path"] == "/v1/samples" or (infer and infer[1] == "sample"):
            largest = _DRAWING + _LABEL * settings.largest_n
        elif infer:
            largest = settings.largest_body if HEADER in Headers(scope=scope) else LARGEST_JSON
        else:
            largest = _NO_BODY
        return min(largest, settings.largest_body)

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
        self._gate, self._receive, self._headers = gate, receive, Headers(scope=scope)
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
            self._more = False
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

    async def discard(self) -> None:
        """Take what is still sent, for a while: who is cut off while sending may never see the answer."""
        most = self._gate.service.settings.largest_body
        length = self._headers.get("content-length", "0")
        if "expect" in self._headers or not _LENGTH.fullmatch(length) or int(length) > most:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while self._more and most > 0:
                    message = await self._receive()
                    self._more = message.get("more_body", False)
                    most -= len(message.get("body", b""))


class _Answer:
    """An answer on its way out: its status is remembered, the request's id is added."""

    def __init__(self, send: Send, scope: Scope, body: _Body) -> None:
        self._send, self.identity = send, _request_id(scope)
        self._scope, self._body = scope, body
        self.status, self.started = 0, time.perf_counter()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            await self._body.discard()
            headers = dict(message["headers"])
            headers |= {b"x-request-id": self.identity.encode(), b"x-content-type-options": b"nosniff"}
            if self.status == 307:  # the router's, for a slash too many: relative, as a proxy may have its own prefix
                headers[b"location"] = _without_slash(self._scope)
            message["headers"] = list(headers.items())
        await self._send(message)


def _without_slash(scope: Scope) -> bytes:
    query = b"?" + scope["query_string"] if scope["query_string"] else b""
    return b"../" + quote(scope["path"].rstrip("/").rpartition("/")[2]).encode() + query


def _too_large(limit: int) -> Refusal:
    most = f"{limit >> 10} KiB, which is the most this address takes"
    return Refusal(413, f"the body is larger than {most}; send less, or tensors as binary data")


def _is_open(path: str) -> bool:
    return path in _OPEN or (path.startswith("/page/") and ".." not in path)


def _digest(token: str) -> bytes:
    """Of equal length whatever was sent, so that comparing says nothing about the token's."""
    return hashlib.sha256(token.encode()).digest()


def _request_id(scope: Scope) -> str:
    """The client's, if it is one, else a new one."""
    given = filter(_REQUEST_ID.fullmatch, Headers(scope=scope).getlist("x-request-id"))
    return next(given, None) or uuid.uuid4().hex[:16]

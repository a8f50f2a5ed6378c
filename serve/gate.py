"""What every request passes before a route sees it: who asks, how much they send; and one line of log afterwards."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import sys
import time
import uuid
from typing import TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .service import Refusal, Service

_OPEN = ("/", "/v2/health/live", "/v2/health/ready")  # for probes, and a page that then asks for the token
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Gate:
    """ASGI around the application: authorisation, the limit of bodies, a log line and metrics for every answer."""

    def __init__(self, app: ASGIApp, service: Service, log: TextIO | None = None) -> None:
        self.app, self.service = app, service
        self.log = log or sys.stderr
        token = service.settings.token
        self._digest = None if token is None else _digest(b"Bearer " + token.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500
        identity = _request_id(scope)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = ((b"x-request-id", identity.encode()), (b"x-content-type-options", b"nosniff"))
                given = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in extra if pair[0] not in given)]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await _refuse(refusal, answer)
                return
            await self.app(scope, _limited(receive, self.service.settings.largest_body), answer)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "none")
            self.service.metrics.responses.labels(route, str(status)).inc()
            self.service.metrics.seconds.labels(route).observe(seconds)
            self._write(scope, route, status, seconds, identity)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = scope["headers"]
        if self._digest is not None and not _is_open(scope["path"]):
            given = [value for name, value in headers if name == b"authorization"]
            if len(given) != 1 or not hmac.compare_digest(_digest(given[0]), self._digest):
                message = "this service asks for a token; send Authorization: Bearer TOKEN"
                return Refusal(401, message, {"WWW-Authenticate": "Bearer"})
        if any(name == b"content-encoding" and value.lower() != b"identity" for name, value in headers):
            return Refusal(415, "the body is compressed; send it plain")
        lengths = [value for name, value in headers if name == b"content-length"]
        limit = self.service.settings.largest_body
        if len(lengths) > 1 or any(not re.fullmatch(rb"\d{1,19}", value) for value in lengths):
            return Refusal(400, "Content-Length is no number, or there are two")
        if lengths and int(lengths[0]) > limit:
            return Refusal(413, f"the body has {int(lengths[0])} bytes; expected at most {limit}")
        return None

    def _write(self, scope: Scope, route: str, status: int, seconds: float, identity: str) -> None:
        client = scope.get("client")
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "level": "error" if status >= 500 else "info",
            "event": "request",
            "method": scope["method"],
            "path": scope["path"][:200],
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
            "id": identity,
            "client": client[0] if client else None,
            **scope.get("state", {}).get("said", {}),
        }
        self.log.write(json.dumps(line) + "\n")
        self.log.flush()


def _is_open(path: str) -> bool:
    return path in _OPEN or path.startswith("/page/")


def _digest(value: bytes) -> bytes:
    """Of equal length whatever was sent, so that comparing says nothing about the token's."""
    return hashlib.sha256(value).digest()


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value.decode("latin-1")):
            return str(value.decode())
    return uuid.uuid4().hex[:16]


def _limited(receive: Receive, limit: int) -> Receive:
    """Bodies without a length are counted as they come."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise Refusal(413, f"the body has more than {limit} bytes")
        return message

    return counted


async def _refuse(refusal: Refusal, send: Send) -> None:
    body = json.dumps({"error": refusal.message}).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refusal.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})

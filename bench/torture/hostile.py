"""Clients that mean no good, or know no better: each a coroutine that makes trouble once, over and over until told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

HELD = 100  # connections that one client holds open
_PATIENCE = 15.0  # seconds until it goes and comes again
_ROUTES = ("/v1/samples", "/v1/likelihood", "/v2/models/digits/infer", "/", "/metrics", "/v1/model", "/nowhere")
_WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    0.5,
    2**63,
    1e308,
    "",
    "x",
    "3",
    [],
    {},
    [None],
    {"x": []},
    [[[[]]]],
    "\udc80",
    [1] * 999,
)
_FIELDS = (
    "n",
    "seed",
    "first_sample",
    "labels",
    "guidance",
    "guide",
    "denoise",
    "format",
    "zoom",
    "decode",
    "tolerance",
)


@dataclass(frozen=True)
class Target:
    """Whom they trouble."""

    host: str
    port: int

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    def head(self, method: str, path: str, *lines: str, body: bytes = b"") -> bytes:
        """A request's head; with the length of its body unless that is empty."""
        lines = (f"Host: {self.host}:{self.port}", *lines)
        if body:
            lines = (*lines, f"Content-Length: {len(body)}")
        return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1")

    def post(self, path: str, body: bytes, kind: str = "application/json") -> bytes:
        return self.head("POST", path, f"Content-Type: {kind}", body=body) + body

    async def send(self, request: bytes, wait: float = _PATIENCE) -> bytes:
        """The first bytes of the answer; nothing if none came in time."""
        async with self.connection() as (reader, writer):
            writer.write(request)
            try:
                return await asyncio.wait_for(reader.read(1 << 16), wait)
            except TimeoutError:
                return b""


Trouble = Callable[[Target, random.Random], Awaitable[None]]


async def slow_heads(target: Target, dice: random.Random) -> None:
    """Many connections that send a head byte by byte, and never to its end."""

    async def one() -> None:
        async with target.connection() as (_, writer):
            for byte in target.head("GET", "/", "X-Slow: " + "x" * 100)[: int(_PATIENCE)]:
                writer.write(bytes([byte]))
                await asyncio.sleep(1)

    await _all(one for _ in range(HELD))


async def half_requests(target: Target, dice: random.Random) -> None:
    """Many connections that ask once, are answered, and stop in the middle of their second request."""
    rest = [target.head("GET", "/")[:-9], target.head("POST", "/v1/samples", "Content-Length: 1000") + b"{"]

    async def one() -> None:
        async with target.connection() as (reader, writer):
            writer.write(target.head("GET", "/v2/health/live"))
            await asyncio.wait_for(reader.read(300), _PATIENCE)
            writer.write(dice.choice(rest))
            await asyncio.sleep(_PATIENCE)

    await _all(one for _ in range(HELD))


async def bombs(target: Target, dice: random.Random) -> None:
    """Small bodies that say they are large, or become so."""
    bombs = dice.sample(_BOMBS, 3)
    await _all((lambda bomb=bomb: target.send(bomb(target), 20)) for bomb in bombs)


async def floods(target: Target, dice: random.Random) -> None:
    """Many requests at once, good and bad, whose answers nobody reads."""
    good = target.post("/v1/samples", json.dumps({"n": 4, "labels": 3, "seed": dice.randrange(99)}).encode())
    requests = [good, target.head("GET", "/"), target.head("GET", "/metrics"), target.post("/v1/samples", b"{")]

    async def one() -> None:
        async with target.connection() as (_, writer):
            writer.write(dice.choice(requests) * dice.randrange(1, 20))
            await asyncio.sleep(dice.random())

    await _all(one for _ in range(HELD))
    await asyncio.sleep(5 * dice.random())


async def cut_streams(target: Target, dice: random.Random) -> None:
    """Drawings whose clients leave while they are drawn or sent."""
    body = json.dumps({"n": dice.choice((1, 16, 64)), "labels": 1, "format": dice.choice(("npy", "png", "zip"))})

    async def one() -> None:
        async with target.connection() as (reader, writer):
            writer.write(target.post("/v1/samples", body.encode()))
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(dice.randrange(1, 500)), dice.random() / 2)

    await _all(one for _ in range(4))
    await asyncio.sleep(dice.random())


async def wrong_types(target: Target, dice: random.Random) -> None:
    """Requests that are no HTTP, no JSON, or hold what nobody asked for."""
    await target.send(dice.choice(_NONSENSE)(target, dice), 30)
    await asyncio.sleep(0.02)


TROUBLES: tuple[Trouble, ...] = (slow_heads, half_requests, bombs, floods, cut_streams, wrong_types)


async def _all(clients: object) -> None:
    """Many at once; a server that refuses or cuts them off is in its rights."""
    running = [asyncio.ensure_future(client()) for client in clients]  # type: ignore[attr-defined]
    try:
        await asyncio.gather(*running, return_exceptions=True)
    finally:
        for one in running:
            one.cancel()


# --- bombs ----------------------------------------------------------------------------------------------------------


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _png(side: int) -> bytes:
    """A grey picture of so many pixels a side, all black: a thousandth of its size."""
    squeeze, row = zlib.compressobj(9), bytes(1 + side)
    rows = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _text_png() -> bytes:
    """A small picture whose comment is 64 MiB when it is read."""
    text = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20), 9))
    small = _png(8)
    return small[:33] + text + small[33:]


_PICTURES = (_png(4096), _png(12_000), _text_png())
_BOMBS: tuple[Callable[[Target], bytes], ...] = (
    lambda target: target.post("/v1/likelihood", _PICTURES[0], "image/png"),
    lambda target: target.post("/v1/likelihood", _PICTURES[1], "image/png"),
    lambda target: target.post("/v1/likelihood", _PICTURES[2], "image/png"),
    lambda target: target.post("/v1/samples", b'{"labels":[' + b'"",' * 1_000_000 + b"1]}"),
    lambda target: target.post("/v1/samples", b'{"labels":' + b"[" * 1_000_000),
    lambda target: target.post("/v1/samples", b'{"seed":' + b"9" * 1_000_000 + b"}"),
    lambda target: target.head("POST", "/v1/samples", "Content-Encoding: gzip", body=b"x") + b"x",
    lambda target: (
        target.head("POST", "/v1/samples", "Transfer-Encoding: chunked") + b"ffffffffffffffff\r\n" + b"x" * 999
    ),
    lambda target: target.head("POST", "/v1/likelihood", f"Content-Length: {64 << 20}", "Content-Type: image/png"),
)


# --- nonsense -------------------------------------------------------------------------------------------------------


def _fields(target: Target, dice: random.Random) -> bytes:
    body = {field: dice.choice(_WRONG) for field in dice.sample(_FIELDS, dice.randrange(1, 4))}
    return target.post(dice.choice(_ROUTES), json.dumps(body).encode())


def _inference(target: Target, dice: random.Random) -> bytes:
    entry: dict[str, Any] = {
        "name": dice.choice(("seed", "labels", "x")),
        "datatype": dice.choice(("FP32", "INT64", "BYTES", 3)),
    }
    entry |= {"shape": dice.choice(_WRONG), "data": dice.choice(_WRONG)}
    return target.post(_ROUTES[2], json.dumps({"inputs": [entry]}).encode())


_HEADS = (
    "Content-Length: -1",
    "Content-Length: 1\r\nContent-Length: 2",
    "X: " + "y" * 100_000,
    "Expect: 100-continue",
    "Range: bytes=0-18446744073709551615",
    "Accept: " + ",".join(["a/b;q=0"] * 5000),
    "Host: evil.example",
)


def _heads(target: Target, dice: random.Random) -> bytes:
    return target.head(dice.choice(("GET", "POST", "TRACE", "X")), dice.choice(_ROUTES), dice.choice(_HEADS))


_NONSENSE: tuple[Callable[[Target, random.Random], bytes], ...] = (
    _fields,
    _fields,
    _inference,
    _heads,
    lambda target, dice: dice.randbytes(dice.randrange(1, 2000)),
    lambda target, dice: target.post(dice.choice(_ROUTES), dice.randbytes(300)),
    lambda target, dice: target.head("GET", "/" + "%00../" * dice.randrange(1, 2000)),
    lambda target, dice: target.post("/v1/likelihood", dice.randbytes(500), dice.choice(("image/png", "text/x", "*"))),
)

"""The server under the application: its socket, its signals, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import resource
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..runtime.errors import InputError, MachineError
from .log import Lines, log
from .service import Service

_BACKLOG = 1024  # connections of a burst that wait to be accepted
_MOST_CONNECTIONS = 1000  # and 16 for each place in the queue
_HEADER_SECONDS = 30.0  # until a new connection must have said what it wants
_OTHER_FILES = 100


def listen(host: str, port: int, stall: float) -> socket.socket:
    """A socket bound to an address. A client that takes nothing for ``stall`` seconds is cut off, by the kernel.

    Raises InputError for an address that is none, MachineError for one that cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError, OverflowError):
        raise InputError.of("host", f"'{host}', with `port` {port}", "an address, such as 127.0.0.1") from None
    family, kind, _, _, address = found[0]
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1000, int(stall * 1000)))
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had: {error.strerror}"
        raise MachineError(
            f"`port` {port} of {host} {why}; choose another, or 0 for a free one", field="port"
        ) from None
    return listener


def serve(app: FastAPI, listener: socket.socket, grace: float, announce: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT: readiness goes off, after ``grace`` seconds no connection is taken any more, what
    was accepted is answered. A second signal ends it at once.
    """
    service: Service = app.state.service
    for name in ("uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [Lines(logging.WARNING)], False
    most = _MOST_CONNECTIONS + 16 * service.settings.queue
    _allow_files(most + _OTHER_FILES)
    config = uvicorn.Config(
        app,
        http=type("Connection", (_Connection,), {"patience": min(_HEADER_SECONDS, service.settings.timeout)}),
        loop="asyncio",
        ws="none",
        lifespan="off",  # the server starts the service itself: what fails there is an error of the command
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        limit_concurrency=most,
        timeout_graceful_shutdown=int(service.settings.timeout) + 5,
    )
    _Server(config, service, grace, announce).run([listener])


def _allow_files(count: int) -> None:
    """Let the process have so many files open, or as many as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Connection(H11Protocol):
    """A connection; one too many is cut off at once, one that asks for nothing after ``patience`` seconds."""

    patience: float
    silence: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) >= (self.limit_concurrency or math.inf):
            transport.abort()
            return
        self.silence = self.loop.call_later(self.patience, self._end_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.silence is not None:
            self.silence.cancel()  # and let go of what it holds
        super().connection_lost(exc)

    def _end_if_silent(self) -> None:
        if not self.headers:  # of a request
            self.transport.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, grace: float, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self.grace, self.announce = service, grace, announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.service.start()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        await super().startup(sockets)
        self.announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        await self.service.stop()
        log("stopped")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # ours are the loop's
        yield

    def _end(self, number: int) -> None:
        if self.service.draining:
            self.should_exit = self.force_exit = True
            return
        log("draining", signal=signal.Signals(number).name, grace=self.grace)
        self.service.draining = True
        asyncio.get_running_loop().call_later(self.grace, self._close)

    def _close(self) -> None:
        self.should_exit = True

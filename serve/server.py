"""The server under the application: its socket, its signals, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from ..runtime.errors import InputError, MachineError
from .log import Lines, log
from .service import Service

_BACKLOG = 1024  # connections of a burst that wait to be accepted
_MOST_CONNECTIONS = 1000  # and 16 for each place in the queue


def listen(host: str, port: int, stall: float) -> socket.socket:
    """A socket bound to an address. A client that takes nothing for ``stall`` seconds is cut off, by the kernel.

    Raises InputError for an address that is none, MachineError for one that cannot be had.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except (socket.gaierror, UnicodeError, OverflowError):
        raise InputError(f"--host '{host}' with --port {port} is no address; expected for example 127.0.0.1") from None
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
        raise MachineError(f"port {port} of {host} {why}; choose another with --port, or 0 for a free one") from None
    return listener


def serve(app: FastAPI, listener: socket.socket, grace: float, announce: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT: readiness goes off, after ``grace`` seconds no connection is taken any more, what
    was accepted is answered. A second signal ends it at once.
    """
    service: Service = app.state.service
    for name in ("uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [Lines(logging.WARNING)], False
    config = uvicorn.Config(
        app,
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",  # the server starts the service itself: what fails there is an error of the command
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        limit_concurrency=_MOST_CONNECTIONS + 16 * service.settings.queue,
        timeout_graceful_shutdown=int(service.settings.timeout) + 5,
    )
    _Server(config, service, grace, announce).run([listener])


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

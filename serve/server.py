"""The server under the application: its socket, its signals, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..runtime.errors import InputError, MachineError
from ..runtime.signals import ending
from .log import Lines, log
from .service import Service
from .settings import ANY_HOST, LOOPBACK_HOSTS

_BACKLOG = 1024  # connections of a burst that wait to be accepted
_MOST_CONNECTIONS = 1000  # and 16 for each place in the queue
_HEAD_SECONDS = 30.0  # until a new connection must have said what it wants, or a request's head be whole
_OTHER_FILES = 100
_STOP_SECONDS = 5.0  # beyond the time limit of the last request, until the process ends whatever still runs


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


def names_of(listener: socket.socket, given: tuple[str, ...]) -> tuple[str, ...]:
    """The names a server goes by: those given, those of loopback if it listens there, any if nothing is known."""
    bound = listener.getsockname()[0]
    if ipaddress.ip_address(bound).is_loopback:
        return tuple(dict.fromkeys((*LOOPBACK_HOSTS, f"[{bound}]" if ":" in bound else bound, *given)))
    return given or (ANY_HOST,)


def serve(app: FastAPI, listener: socket.socket, grace: float, announce: Callable[[], None]) -> None:
    """Serve until SIGTERM, SIGHUP or SIGINT: readiness goes off, after ``grace`` seconds no connection is taken any
    more, what was accepted is answered. The process ends when that must have happened, whatever its threads do; a
    second signal ends it at once.
    """
    service: Service = app.state.service
    for name in ("uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [Lines(logging.WARNING)], False
    most = _MOST_CONNECTIONS + 16 * service.settings.queue
    most = max(_OTHER_FILES, min(most, _allow_files(most + _OTHER_FILES) - _OTHER_FILES))
    bounds = {"patience": min(_HEAD_SECONDS, service.settings.timeout), "most": most}
    config = uvicorn.Config(
        app,
        http=type("Connection", (_Connection,), bounds),
        workers=1,  # and not what WEB_CONCURRENCY says to others
        loop="asyncio",
        ws="none",
        lifespan="off",  # the server starts the service itself: what fails there is an error of the command
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=int(service.settings.timeout) + 2,
    )
    _Server(config, service, grace, announce).run([listener])


def _allow_files(count: int) -> int:
    """Let the process have so many files open, or as many as it may; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def _end_after(seconds: float) -> None:
    """End the process then, if it has not ended by itself: a thread of a decoder or an engine cannot be told to."""

    def end() -> None:
        log("ended", "warning", why="a thread did not return")
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


class _Connection(H11Protocol):
    """A connection. One without a request in hand is cut off after ``patience`` seconds, and before that if there are
    more than ``most`` and it has been so for longest.
    """

    patience: float
    most: int
    idle_since = 0.0
    ending: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > self.most:
            others = [one for one in self.connections if isinstance(one, _Connection) and one is not self]
            idle = [one for one in others if one.idle and not one.transport.get_write_buffer_size()]
            one_too_many = min(idle, key=lambda one: one.idle_since, default=self)
            one_too_many.transport.abort()
            self.connections.discard(one_too_many)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.idle:
            self._stop_waiting()
        elif self.ending is None:  # half a head, or of a body that nobody reads any more
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()  # and let go of what it holds
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def _await_head(self) -> None:
        self.idle_since = self.loop.time()
        self.ending = self.loop.call_later(self.patience, self.transport.close)

    def _stop_waiting(self) -> None:
        if self.ending is not None:
            self.ending.cancel()
            self.ending = None


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, grace: float, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self.grace, self.announce = service, grace, announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.service.start()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, *ending()):
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
            _end_after(1.0)
            return
        log("draining", signal=signal.Signals(number).name, grace=self.grace)
        self.service.draining = True
        _end_after(self.grace + self.service.settings.timeout + _STOP_SECONDS)
        asyncio.get_running_loop().call_later(self.grace, self._close)

    def _close(self) -> None:
        self.should_exit = True

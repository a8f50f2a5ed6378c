"""A crew of Ray actors: one a worker, on this machine or on a cluster. The one file here that knows Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray will do by default; it warns until then

import grpc
import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from ..runtime.errors import InputError, MachineError
from ..runtime.machine import MOST_THREADS, cores
from ..runtime.opening import ON_DEVICE, Opening
from ..runtime.signals import ending
from .job import Shard
from .workers import Lost, News, Task, Worker

_OBJECTS = 80 << 20  # bytes of Ray's object store, of which shards and records need next to nothing
_STARTS = 3  # attempts
_PATIENCE = 30.0  # seconds until a user hears why nothing happens
_TOKEN = secrets.token_hex(32)  # of a Ray that is started here
_GIVE_TOKEN = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Ray, for as long as the block runs: the cluster at ``address``, or for "" the one that RAY_ADDRESS names, or else
    one of this machine's cores alone. What is printed inside goes to stderr. Raises MachineError if no cluster answers,
    or one that wants another token.
    """
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = address or os.environ.get("RAY_ADDRESS", "") or "local"
    if address == "local":
        quiet |= {"num_cpus": cores(), "include_dashboard": False, "object_store_memory": _OBJECTS}
    before: dict[int, Any] = {number: signal.getsignal(number) for number in ending()}
    exits: list[SystemExit] = []
    try:
        if address == "local":
            _start(quiet)
        else:
            _knock(address)
            ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        if _asks_for_token(address):
            raise MachineError(
                f"the Ray cluster at '{address}' asks for a token, and has not got it; {_GIVE_TOKEN}"
            ) from None
        raise MachineError(
            f"no Ray cluster at '{address}' ({_first_line(error)}); start one with: ray start --head, or give no "
            "address, without RAY_ADDRESS set, to have one here meanwhile"
        ) from None
    finally:
        _handle(before)  # Ray puts its own in the place of ours
    try:
        _handle({number: _remembering(handler, exits) for number, handler in before.items() if callable(handler)})
        with contextlib.redirect_stdout(sys.stderr):  # Ray tells of dead workers on stdout, which is for results
            yield
    except SystemExit as end:
        raise (exits[0] if exits else end) from None
    finally:
        _handle(before)
        with contextlib.redirect_stdout(sys.stderr):  # it tells what it had not told yet
            ray.shutdown()
        _forget_token()


def has_gpus(address: str) -> bool:
    """Whether the cluster at ``address``, or for "" the one that RAY_ADDRESS names, has GPUs; False where Ray would be
    started here. Raises as :func:`connected`.
    """
    address = address or os.environ.get("RAY_ADDRESS", "") or "local"
    if address == "local":
        return False
    with connected(address):
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        return bool(resources.get("GPU"))


def _handle(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _remembering(handler: Callable[[int, FrameType | None], Any], exits: list[SystemExit]) -> Callable[..., None]:
    """The handler, its SystemExit kept: one that is raised while Ray waits comes out of Ray as another, of code 1."""

    def handle(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except SystemExit as end:
            exits.append(end)
            raise

    return handle


def _start(options: dict[str, Any]) -> None:
    """Start Ray here. It gives its own processes half a minute, which on a busy machine is not always enough."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # by default Ray's workers give way to all other processes
    if not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        os.environ["RAY_AUTH_TOKEN"] = _TOKEN  # else Ray leaves one in ~/.ray
    for start in range(_STARTS):
        try:
            ray.init(address="local", **options)
            return
        except Exception as error:  # Ray raises nothing narrower when its processes are late
            ray.shutdown()
            if start + 1 == _STARTS:
                raise MachineError(
                    f"Ray did not start here ({_first_line(error)}); try again when the machine is less busy, or "
                    "do without Ray"
                ) from None


def _forget_token() -> None:
    """Whoever had a Ray here may go to another: that one's token is where Ray looks for it."""
    if os.environ.get("RAY_AUTH_TOKEN") == _TOKEN:
        del os.environ["RAY_AUTH_TOKEN"]
        os.environ.pop("RAY_AUTH_MODE", None)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _knock(address: str) -> None:
    """Raise OSError if nobody listens at an address with a port, or if a token is missing: Ray itself asks again, for
    many minutes or with many messages.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" and _asks_for_token(address):
            raise PermissionError("no token")


def _asks_for_token(address: str) -> bool:
    """Whether Ray at an address with a port takes no call without a token."""
    with grpc.insecure_channel(address.removeprefix("ray://"), [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=10)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


@dataclass(frozen=True, slots=True)
class Share:
    """How many workers, and what each of them gets."""

    workers: int
    threads: int
    cpus: float
    gpus: int


def share(workers: int | None, opening: Opening, most: int) -> Share:
    """Divide the cluster among ``most`` workers at most: by default a worker a GPU, or without GPUs a worker a machine,
    and its cores for threads. Raises MachineError if there are no GPUs for a provider that needs them.
    """
    provider = opening.provider_name
    if opening.device:
        raise InputError.of("provider", f"'{opening.provider}'", provider, "Ray gives each worker a GPU")
    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in known if node["Alive"] and node["Resources"].get("CPU")]
    cpus, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    on_gpu = provider in ON_DEVICE or (provider == "auto" and gpus > 0)
    if on_gpu and not gpus:
        raise MachineError.of("provider", provider, "cpu", f"{provider} needs GPUs, and Ray knows of none here")
    count = min(workers or (gpus if on_gpu else len(nodes)) or 1, most)
    sizes = [int(node["CPU"]) for node in nodes]
    fitting = (
        t for t in range(min(max(sizes, default=1), MOST_THREADS), 0, -1) if sum(size // t for size in sizes) >= count
    )
    each = opening.threads or next(fitting, 1)  # a worker's cores are on one machine
    return Share(count, each, min(each, max(cpus, 1) / count), int(on_gpu))


class RayCrew:
    """Actors that each hold an opened bundle; a dead one is replaced. Needs :func:`connected`.

    ``notice`` is told once if workers cannot be placed for a while.
    """

    def __init__(self, task: Task, parts: Share, notice: Callable[[str], None]) -> None:
        self._parts, self._notice = parts, notice
        self._actor = ray.remote(Worker).options(
            num_cpus=parts.cpus, num_gpus=parts.gpus, max_restarts=0, scheduling_strategy="SPREAD"
        )
        self._task = task.on(parts.threads)
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, int] = {}  # reference to news to come -> worker
        self._patient_until: float | None = time.monotonic() + _PATIENCE
        self._unready = set(range(parts.workers))
        for worker in range(parts.workers):
            self._start(worker)

    def _start(self, worker: int) -> None:
        self._actors[worker] = self._actor.remote(self._task)
        self._pending[self._actors[worker].attempt.remote(None)] = worker

    def hand(self, worker: int, shard: Shard) -> None:
        self._pending[self._actors[worker].attempt.remote(shard)] = worker

    def wait(self) -> tuple[int, News]:
        done: list[Any] = []
        while not done:
            done, _ = ray.wait(list(self._pending), num_returns=1, timeout=1.0)
            self._grow_impatient()
        worker = self._pending.pop(done[0])
        self._unready.discard(worker)
        try:
            news: News = ray.get(done[0])
        except (RayActorError, OutOfMemoryError, RayTaskError) as error:  # a task's: of that machine's disk, say
            ray.kill(self._actors[worker])  # one that is merely out of reach must not come back
            self._start(worker)
            return worker, Lost(" ".join(str(error).split())[:300])
        return worker, news

    def _grow_impatient(self) -> None:
        if not self._unready:
            self._patient_until = None
        elif self._patient_until is not None and time.monotonic() > self._patient_until:
            self._patient_until = None
            parts, missing = self._parts, len(self._unready)
            some = f"{missing} of {parts.workers} workers have not begun"
            which = "still no worker" if missing == parts.workers else some
            self._notice(
                f"{which}: each asks for {parts.cpus:g} CPUs{f' and {parts.gpus} GPU' if parts.gpus else ''}, "
                f"and Ray has free {_free()}; waiting"
            )

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)


def _free() -> str:
    resources: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))

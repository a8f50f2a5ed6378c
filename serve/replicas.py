"""The same application in many replicas, behind the proxies of Ray Serve."""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from ..runtime.errors import BundleError, InputError, MachineError
from ..runtime.flow import Flow
from ..runtime.opening import Opening
from ..shards.cluster import Share, connected, share
from .app import create_app
from .settings import Settings

NAME = "tarflow"
_LOOP = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many replicas: ``most`` of them if both are equal, else what the load asks for in between."""

    least: int
    most: int

    def __str__(self) -> str:
        if self.least < self.most:
            return f"{self.least} to {self.most} replicas"
        return f"{self.most} replica{'s' if self.most > 1 else ''}"


@dataclass(frozen=True, slots=True)
class Deployment:
    """What each replica serves: the bundle there, which must have this hash wherever it runs, opened and bounded so."""

    bundle: Path
    hash: str
    opening: Opening
    settings: Settings
    replicas: Replicas

    def app(self, threads: int) -> FastAPI:
        """The application, in a replica. Raises BundleError for another bundle than was deployed."""
        flow = Flow.open(self.bundle, replace(self.opening, threads=threads))
        if flow.bundle.hash != self.hash:
            raise BundleError(
                f"'{self.bundle}' is another bundle here: its hash is {flow.bundle.hash[:16]}..., the one deployed is "
                f"{self.hash[:16]}...; put the bundle where every machine sees it, or copy it to that path on each"
            )
        return create_app(flow, self.settings)


def parse_replicas(text: str) -> Replicas:
    """``2``, or ``1,4`` for between 1 and 4. Raises InputError."""
    match = re.fullmatch(r"(\d{1,6})(?:,(\d{1,6}))?", text)
    if match:
        least, most = int(match[1]), int(match[2] or match[1])
        if 1 <= least <= most:
            return Replicas(least, most)
    raise InputError.of("replicas", f"'{text}'", "a number (2), or the least and the most (1,4)")


def serve_on_ray(address: str, deployment: Deployment, where: tuple[str, int], announce: Callable[[str], None]) -> None:
    """Deploy, announce, and serve until SIGTERM or SIGINT; then requests that were accepted are answered.

    ``where`` is host and port of the proxies: one on this machine for a loopback address, else one on every machine.
    Raises MachineError if the replicas do not come up, and what :func:`cluster.connected` raises.
    """
    stop, replicas, settings = threading.Event(), deployment.replicas, deployment.settings
    with connected(address):
        parts = share(replicas.most, deployment.opening, replicas.most)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        host, port = where
        serve.start(
            proxy_location="HeadOnly" if host in _LOOP else "EveryNode",
            http_options={"host": host, "port": port, "request_timeout_s": settings.timeout + 10},
        )
        try:
            serve.run(_bound(deployment, parts), name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise MachineError(f"the replicas did not come up: {_reason(str(error))}") from None
        announce(f"{replicas} of {parts.threads} threads each, Ray {ray.__version__}")
        while not stop.wait(1.0):
            pass
        serve.delete(NAME)  # returns when the replicas have answered what they hold


def _bound(deployment: Deployment, parts: Share) -> Any:
    """The application for Ray Serve: each replica opens the bundle once and has a queue of its own.

    A replica is sent more than its queue takes, so that it is the application that refuses, with 429; beyond that the
    proxy answers 503. Autoscaling aims at a quarter of a queue.
    """

    def build() -> FastAPI:  # in the replica
        return deployment.app(parts.threads)

    replicas, settings = deployment.replicas, deployment.settings
    number: dict[str, Any] = {"num_replicas": replicas.most}
    if replicas.least < replicas.most:
        load = {"target_ongoing_requests": max(1, settings.queue // 4)}
        number = {"autoscaling_config": load | {"min_replicas": replicas.least, "max_replicas": replicas.most}}
    made = serve.deployment(
        name=NAME,
        ray_actor_options={"num_cpus": parts.cpus, "num_gpus": parts.gpus},
        max_ongoing_requests=2 * settings.queue + settings.workers,
        max_queued_requests=settings.queue * replicas.most,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=settings.timeout + 5,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        **number,
    )
    return made(serve.ingress(build)()).bind()


def _reason(text: str) -> str:
    """The last line of a long report of Ray's that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no reason given")[:600]

"""A real ``tarflow serve`` for tests, and the application called in process."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from tarflow.runtime.flow import Flow, Guidance
from tarflow.serve.app import create_app
from tarflow.serve.service import Service
from tarflow.serve.settings import Settings

from .conftest import DEMO


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[str]
    port: int
    log: Path

    def ask(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            kind = {} if content is None else {"Content-Type": "application/json"}
            connection.request(method, path, content, kind | (headers or {}))
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def metric(self, name: str, headers: dict[str, str] | None = None, **labels: str) -> float:
        """The sum of a metric over its labels but those given."""
        lines = self.ask("GET", "/metrics", headers=headers)[2].decode().splitlines()
        mine = [line for line in lines if line.split("{")[0].split(" ")[0] == name]
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(line.rsplit(" ", 1)[1]) for line in mine if all(text in line for text in wanted))

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()


@contextlib.contextmanager
def running(
    folder: Path, *arguments: object, shell: str = 'exec "$@"', code: str = "", bundle: Path = DEMO, **environment: str
) -> Iterator[Running]:
    """``tarflow serve`` of the demo on a free port, started by a line of ``shell``, after some ``code``."""
    start = ["bash", "-c", shell, "bash", sys.executable, "-c", f"{code}\nfrom tarflow.cli.main import main\nmain()"]
    command = [*start, "serve", str(bundle), "--port", "0", *map(str, arguments)]
    log = folder / "serve.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | environment
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), log.read_text()
        yield Running(process, int(line.split()[2].rsplit(":", 1)[1]), log)
    finally:
        process.kill()
        process.communicate()


@contextlib.asynccontextmanager
async def calling(flow: Flow, **settings: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    """A client of the application in this process, and its service."""
    app = create_app(flow, Settings(**settings))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service", timeout=600) as client:
            yield client, app.state.service


async def drawn(client: httpx.AsyncClient, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """The answers to requests for arrays that are made at the same time."""
    return await asyncio.gather(*(client.post("/v1/samples", json=body | {"format": "npy"}) for body in bodies))


def array(content: bytes) -> NDArray[np.float32]:
    found: NDArray[np.float32] = np.load(io.BytesIO(content), allow_pickle=False)
    return found


def alone(flow: Flow, body: dict[str, Any]) -> NDArray[np.float32]:
    """What the flow draws for the body of a request to /v1/samples, with nobody else around."""
    labels = body.get("labels")
    n = body.get("n") or (len(labels) if isinstance(labels, list) else 1)
    own = {name: body[name] for name in ("seed", "first_sample", "denoise") if name in body}
    return np.asarray(
        flow.sample(n, labels=labels, guidance=Guidance(body.get("guidance", 0.0)), reproducible=True, **own)
    )

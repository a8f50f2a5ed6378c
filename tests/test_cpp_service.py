"""The example service, over loopback: every accepted request answered correctly, the rest refused, nothing lost."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tarflow.runtime.flow import Flow, Guidance

from .conftest import DEMO, largest, until
from .cpp_library import LIBRARY, onnxruntime_library

PROGRAM = LIBRARY.parent / "examples" / "service"
ENVIRONMENT = os.environ | {"TARFLOW_ONNXRUNTIME": onnxruntime_library()}


@dataclass(frozen=True)
class Service:
    process: subprocess.Popen[str]
    port: int

    def ask(self, path: str, body: object = None, raw: bytes | None = None) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            content = raw if raw is not None else None if body is None else json.dumps(body).encode()
            connection.request("GET" if content is None else "POST", path, content)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def draw(self, **body: Any) -> NDArray[np.float32]:
        status, headers, content = self.ask("/v1/samples", {"format": "raw", **body})
        assert status == 200, content
        return np.frombuffer(content, np.float32).reshape([int(x) for x in headers["X-Tarflow-Shape"].split(",")])

    def metrics(self) -> dict[str, float]:
        lines = self.ask("/metrics")[2].decode().splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}

    def send(self, **body: Any) -> socket.socket:
        """A request that the service has begun to read; nobody has read its answer yet."""
        content = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port))
        head = f"POST /v1/samples HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(content)
        return connection

    def memory(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096


@pytest.fixture
def start() -> Iterator[Callable[..., Service]]:
    """start("--queue", 8): the program on a free port, ended afterwards."""
    running: list[subprocess.Popen[str]] = []

    def run(*arguments: object) -> Service:
        command = [str(x) for x in (PROGRAM, DEMO, "--port", 0, *arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        running.append(process)
        assert process.stdout is not None
        return Service(process, int(process.stdout.readline().split()[2].split(":")[1]))

    yield run
    for process in running:
        process.kill()
        process.communicate()


def test_two_hundred_concurrent_requests_are_all_right_and_memory_stays_flat(start: Callable[..., Service]) -> None:
    service, flow = start("--queue", 256, "--timeout-ms", 1_000_000), Flow.open(DEMO)
    requests: list[dict[str, Any]] = [
        {"labels": [i % 10] * (1 + i % 3), "seed": i // 7, "index": i, "guidance": float(i % 2)} for i in range(200)
    ]

    def by_library(labels: list[int], seed: int, index: int, guidance: float) -> NDArray[np.float32]:
        return flow.sample(len(labels), labels=labels, seed=seed, first_sample=index, guidance=Guidance(guidance))

    expected = [by_library(**request) for request in requests]
    alone = [service.draw(**request) for request in requests[:10]]
    with ThreadPoolExecutor(200) as pool:
        first = list(pool.map(lambda request: service.draw(**request), requests))
        before = service.memory()
        for _ in range(2):
            again = list(pool.map(lambda request: service.draw(**request), reversed(requests)))
    assert all(largest(a, b) < 1e-5 for a, b in zip(first, expected, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(first, reversed(again), strict=True))  # whoever shared the batch
    assert all(np.array_equal(a, b) for a, b in zip(alone, first, strict=False))
    assert service.memory() - before < 16 << 20
    metrics = service.metrics()
    assert metrics['tarflow_responses_total{code="200"}'] == 610
    assert metrics["tarflow_batches_total"] < 0.7 * metrics["tarflow_batched_requests_total"]  # they did share


def test_a_full_queue_answers_429_and_what_was_accepted_is_answered(start: Callable[..., Service]) -> None:
    service = start("--queue", 4, "--batch", 16)

    def ask(i: int) -> int:
        status, headers, _ = service.ask("/v1/samples", {"n": 16, "seed": i})
        assert (status == 429) == ("Retry-After" in headers)
        return status

    with ThreadPoolExecutor(24) as pool:
        statuses = Counter(pool.map(ask, range(48)))
    assert set(statuses) == {200, 429}
    metrics = service.metrics()
    assert metrics["tarflow_samples_total"] == 16 * statuses[200]
    assert metrics["tarflow_queue_requests"] == 0


def test_a_timeout_cancels_the_work(start: Callable[..., Service]) -> None:
    service = start("--batch", 100_000)
    status, _, content = service.ask("/v1/samples", {"n": 100_000, "timeout_ms": 300})  # minutes of work
    assert status == 504
    assert b"given up" in content
    service.draw(n=1)  # waits until the batch before it has ended
    metrics = service.metrics()
    assert metrics["tarflow_abandoned_requests_total"] == 1
    assert metrics["tarflow_samples_total"] == 1  # that batch ended without its samples


def test_a_client_that_hangs_up_cancels_its_work(start: Callable[..., Service]) -> None:
    service = start("--batch", 100_000, "--timeout-ms", 1_000_000)
    connections = [service.send(n=100_000, seed=seed) for seed in range(3)]  # too many to share a batch
    until(lambda: service.metrics()["tarflow_queue_requests"] == 2)  # the first that arrived is computed
    for connection in connections:
        connection.close()
    service.draw(n=1)
    metrics = service.metrics()
    assert metrics["tarflow_hung_up_requests_total"] == metrics['tarflow_responses_total{code="499"}'] == 3
    assert metrics["tarflow_samples_total"] == 1


def test_a_client_that_hangs_up_takes_nothing_from_who_shares_its_batch(start: Callable[..., Service]) -> None:
    service = start("--batch", 256)
    connections = [service.send(n=16, seed=1) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        drawing = [pool.submit(service.draw, n=16, seed=1) for _ in range(4)]
        for connection in connections:
            connection.close()
        drawn = [future.result() for future in drawing]
    assert all(np.array_equal(images, drawn[0]) for images in drawn)


def test_samples_that_are_not_finite_are_named(start: Callable[..., Service]) -> None:
    service = start()
    asked = {"labels": [8] * 32, "guidance": 60, "seed": 1}
    status, headers, content = service.ask("/v1/samples", {**asked, "format": "raw"})
    images = np.frombuffer(content, np.float32).reshape(32, -1)
    broken = np.flatnonzero(~np.isfinite(images).all(1))
    assert status == 200
    assert len(broken) > 0
    assert headers["X-Tarflow-Nonfinite"] == ",".join(map(str, broken))
    status, headers, content = service.ask("/v1/samples", asked)
    assert (status, headers["Content-Type"]) == (422, "application/json")
    assert "are not finite and make no picture" in json.loads(content)["error"]
    assert "X-Tarflow-Nonfinite" in headers
    status, headers, _ = service.ask("/v1/samples", {"labels": [8], "seed": 1})
    assert status == 200
    assert "X-Tarflow-Nonfinite" not in headers
    assert service.metrics()["tarflow_nonfinite_samples_total"] == 2 * len(broken)


def test_sigterm_drains_and_stops(start: Callable[..., Service]) -> None:
    service = start("--batch", 512, "--timeout-ms", 1_000_000)  # under sanitizers it takes a while
    with service.send(n=512) as asked, asked.makefile("rb") as answer:
        service.process.send_signal(signal.SIGTERM)
        assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
    assert service.process.wait(600) == 0
    with pytest.raises(ConnectionError):
        service.ask("/healthz")


def test_sigterm_before_the_first_connection_is_not_lost(start: Callable[..., Service]) -> None:
    for _ in range(5):
        service = start()
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0


def test_pictures_health_and_bad_requests(start: Callable[..., Service]) -> None:
    service, flow = start(), Flow.open(DEMO)
    assert service.ask("/healthz")[0] == service.ask("/readyz")[0] == 200
    status, headers, content = service.ask("/v1/samples", {"labels": [3, 7], "seed": 1, "guidance": 1})
    assert (status, headers["Content-Type"]) == (200, "image/png")
    images = flow.sample(2, labels=[3, 7], seed=1, guidance=Guidance(1.0))
    pixels = np.clip((np.concatenate(list(images[:, 0]), 1) + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)
    assert np.abs(np.asarray(Image.open(io.BytesIO(content))).astype(int) - pixels).max() <= 1
    for body, words in [
        ({"labels": [10]}, "label 10 is out of range; expected -1 (none) to 9"),
        ({"labels": [1.5]}, "label 1.5"),
        ({"labels": [2**64 - 1]}, "label 18446744073709551615 is out of range"),
        ({"labels": []}, "0 samples asked for; expected 1 to 64"),
        ({"n": 65}, "'n' is 65; expected an integer from 1 to 64"),
        ({"n": True}, "'n' is true"),
        ({"n": 1, "labels": [1]}, "either 'labels', an array, or 'n'"),
        ({"n": 1, "seed": -1}, "'seed' is -1"),
        ({"n": 1, "guidance": 2}, "guidance does nothing without labels"),
        ({"labels": [1], "guidance": 1e9}, "'guidance' is"),
        ({"n": 1, "format": "bmp"}, "png or raw"),
        ({"n": 1, "colour": "red"}, "'colour' is unknown"),
        ([], "no JSON object"),
    ]:
        status, _, content = service.ask("/v1/samples", body)
        assert (status, words in json.loads(content)["error"]) == (400, True), content
    for raw in (b"", b"{", b"\xff\xfe", b"[" * 60_000, b'{"n": 1e999}', b'{"n": 18446744073709551616}'):
        assert service.ask("/v1/samples", raw=raw)[0] == 400
    assert service.ask("/v1/samples", raw=b" " * 70_000)[0] == 413
    assert service.ask("/nothing")[0] == 404
    assert service.draw(n=1).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "no bundle is named"),
        (("/nowhere",), 4, "no bundle at '/nowhere'"),
        ((DEMO, "--port", "x"), 2, "--port needs a number"),
        ((DEMO, "--colour", "1"), 2, "--colour 1 is not understood"),
    ],
)
def test_wrong_arguments_are_said_in_one_sentence(arguments: tuple[object, ...], code: int, words: str) -> None:
    command = [str(x) for x in (PROGRAM, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr

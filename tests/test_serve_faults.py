"""What a service survives: crowds, clients that leave or dawdle, a stop under load, poison, strangers, bad bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request as HttpRequest

from tarflow.cli.serve import _token as token_of
from tarflow.runtime.backend import Array
from tarflow.runtime.errors import InputError, MachineError
from tarflow.runtime.flow import Flow
from tarflow.runtime.request import Request, Resolved
from tarflow.runtime.samples import Progress, Samples, Watch
from tarflow.serve.service import Refusal
from tarflow.serve.settings import Settings

from .conftest import DEMO, until
from .serving import Running, alone, array, calling, drawn, running

pytestmark = pytest.mark.anyio  # those that are coroutines
_UNWATCHED = Watch()
TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One that asks for a token and takes small bodies."""
    folder = tmp_path_factory.mktemp("faults")
    with running(folder, "--max-n", 64, "--max-body", 1, "--timeout", 300, TARFLOW_TOKEN=TOKEN) as found:
        yield found


def bearer(token: str = TOKEN) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# --- crowds and time ------------------------------------------------------------------------------------------------


class Held(Flow):
    """A flow that draws nothing for a client before ``go`` is set, and notes in ``ended`` that it was told to stop."""

    go: threading.Event
    begun: threading.Event
    ended: threading.Event

    def draw(self, request: Resolved, noise: Array | None = None, watch: Watch = _UNWATCHED) -> Samples:
        while watch.progress is not None and not self.go.wait(0.01):
            self.begun.set()
            try:
                watch.progress(Progress(0, 1, 0, 0))
            except Exception:
                self.ended.set()
                raise
        return super().draw(request, noise, watch)


@pytest.fixture
def held() -> Held:
    flow = Held.open(DEMO, threads=1)
    flow.go, flow.begun, flow.ended = threading.Event(), threading.Event(), threading.Event()
    return flow


async def test_a_full_queue_answers_429_at_once_and_what_was_accepted_is_answered_right(held: Held, flow: Flow) -> None:
    async with calling(held, queue=4, batch=16) as (client, _):
        bodies = [{"n": 16, "seed": seed, "format": "npy"} for seed in range(24)]
        asking = [asyncio.create_task(client.post("/v1/samples", json=body)) for body in bodies]
        while sum(task.done() for task in asking) < 19:  # four wait, and one may have begun
            await asyncio.sleep(0.01)
        held.go.set()
        answers = await asyncio.gather(*asking)
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    assert 4 <= statuses[200] <= 5
    for body, answer in zip(bodies, answers, strict=True):
        if answer.status_code == 200:
            assert np.array_equal(array(answer.content), alone(flow, body))
        else:
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert "wait already" in answer.json()["error"]


async def test_a_request_that_takes_too_long_is_answered_504_and_its_work_ends(held: Held) -> None:
    async with calling(held, timeout=0.3) as (client, service):
        answer = await client.post("/v1/samples", json={"n": 256})
        assert answer.status_code == 504
        await service.stop()  # waits for the drawing thread
        page = service.metrics.page()
    assert held.ended.is_set()
    assert b'tarflow_abandoned_requests_total{why="timeout"} 1.0' in page
    assert b"tarflow_samples_total 0.0" in page


def request_left_by(gone: asyncio.Event) -> HttpRequest:
    """A request whose client leaves when ``gone`` is set."""

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    return HttpRequest({"type": "http", "headers": []}, receive)


async def test_a_client_that_leaves_ends_its_work(held: Held) -> None:
    async with calling(held) as (_, service):
        gone = asyncio.Event()
        asking = asyncio.create_task(service.draw(request_left_by(gone), Request(64).resolved(held.config)))
        await asyncio.to_thread(until, held.begun.is_set)
        gone.set()
        with pytest.raises(Refusal) as refused:
            await asking
        await service.stop()
        assert refused.value.status_code == 499
        assert held.ended.is_set()
        assert b'tarflow_abandoned_requests_total{why="left"} 1.0' in service.metrics.page()


def test_slow_readers_and_slow_writers_hold_up_nobody_and_get_all_of_it(service: Running, flow: Flow) -> None:
    body = json.dumps({"n": 16, "seed": 5, "format": "npy"}).encode()
    slow = []
    for _ in range(6):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(600)
        connection.connect(("127.0.0.1", service.port))
        connection.sendall(head("POST /v1/samples", len(body)) + body[:10])
        slow.append(connection)
    assert service.ask("GET", "/v2/health/live")[0] == 200
    for connection in slow:
        connection.sendall(body[10:])
    status, _, content = service.ask("POST", "/v1/samples", {"seed": 6, "format": "npy"}, bearer())
    assert status == 200
    assert np.array_equal(array(content), alone(flow, {"seed": 6}))
    expected = alone(flow, {"n": 16, "seed": 5})
    for connection in slow:
        answer = b""
        while chunk := connection.recv(1500):
            answer += chunk
        assert np.array_equal(array(answer.split(b"\r\n\r\n", 1)[1]), expected)
        connection.close()


def connections(pid: int) -> int:
    """Open sockets of a process. What is closed meanwhile is not one."""
    found = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(entry).startswith("socket:")
    return found


def test_a_reader_that_stops_is_cut_off_and_others_are_served(tmp_path: Path) -> None:
    """It asks for megabytes, one answer after the other on one connection, and takes none of them."""
    with running(tmp_path, "--timeout", 1) as service:
        before = connections(service.process.pid)
        with socket.create_connection(("127.0.0.1", service.port), timeout=600) as silent:
            assert silent.recv(1) == b"", "closed: it never asked for anything"
        until(lambda: connections(service.process.pid) == before)
        with socket.socket() as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            stuck.connect(("127.0.0.1", service.port))
            stuck.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 400)
            until(lambda: connections(service.process.pid) > before)
            until(lambda: service.ask("POST", "/v1/samples", {"seed": 6})[0] == 200)  # on a busy machine, not at once
            until(lambda: connections(service.process.pid) == before)
        assert service.ask("GET", "/v2/health/ready")[0] == 200
        assert service.stop() == 0


def test_sigterm_under_load_drains(flow: Flow, tmp_path: Path) -> None:
    """Readiness goes off while requests are still taken; all that were taken are answered; the exit is clean."""
    with running(tmp_path, "--grace", 4) as service:
        begun = threading.Event()

        def ask(k: int) -> list[tuple[int, int, bytes]]:
            got = []
            with contextlib.suppress(ConnectionRefusedError):
                for seed in range(1000 * k, 1000 * k + 1000):
                    status, _, content = service.ask("POST", "/v1/samples", {"n": 2, "seed": seed, "format": "npy"})
                    got.append((seed, status, content))
                    begun.set()
            return got

        with ThreadPoolExecutor(8) as pool:
            asking = [pool.submit(ask, k) for k in range(8)]
            assert begun.wait(600)
            service.process.terminate()
            states = set()
            with contextlib.suppress(OSError, HTTPException):  # no longer listening
                while True:
                    states.add(service.ask("GET", "/v2/health/ready")[0])
                    time.sleep(0.05)
            answers = [answer for future in asking for answer in future.result()]
        assert service.process.wait() == 0
        assert 503 in states
        assert {status for _, status, _ in answers} == {200}
        for seed, _, content in answers[:: max(1, len(answers) // 10)]:
            assert np.array_equal(array(content), alone(flow, {"n": 2, "seed": seed}))
        events = [line["event"] for line in service.lines() if line["event"] != "request"]
        assert events == ["draining", "stopped"]


# --- poison ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
async def test_samples_that_overflow_are_named_and_their_mates_unharmed(flow: Flow) -> None:
    """At guidance 20 samples 2 and 11 of seed 0 overflow; they share a tile with others of the same guidance."""
    bodies: list[dict[str, Any]] = [
        {"labels": [2], "first_sample": 2, "guidance": 20.0},
        {"labels": [3, 4, 5], "first_sample": 3, "guidance": 20.0},
        {"labels": [0, 1, 2], "first_sample": 10, "guidance": 20.0, "certify": True},
        {"labels": [*range(9)], "first_sample": 100, "guidance": 20.0},
    ]
    infer = {"parameters": {"first_sample": 2, "guidance": 20.0}, "inputs": [
        {"name": "labels", "datatype": "INT64", "shape": [16], "data": [i % 10 for i in range(2, 18)]}]}  # fmt: skip
    async with calling(flow, delay=30) as (client, service):
        answers = await drawn(client, *bodies)
        assert b"tarflow_batches_total 1.0" in service.metrics.page(), "16 rows are a tile, and wait for no more"
        said = (await client.post("/v2/models/sample/infer", json=infer)).json()
    assert said["parameters"]["nonfinite"] == "2,11"
    assert said["outputs"][1]["data"] == [i not in (2, 11) for i in range(2, 18)]
    assert None in said["outputs"][0]["data"]
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == 200
        wanted, found = alone(flow, body), array(answer.content)
        assert np.array_equal(found, wanted, equal_nan=True)
        broken = body["first_sample"] + np.flatnonzero(~np.isfinite(wanted).all((1, 2, 3)))
        assert answer.headers.get("x-tarflow-nonfinite") == (",".join(map(str, broken)) or None)


class Poisoned(Flow):
    """A flow whose engine fails for one seed's first number: what no check before the queue can know."""

    poison: float

    def draw(self, request: Resolved, noise: Array | None = None, watch: Watch = _UNWATCHED) -> Samples:
        if noise is not None and (noise[:, 0, 0] == self.poison).any():
            raise MachineError("out of memory in block 3's step graph; use a smaller `batch_size`")
        return super().draw(request, noise, watch)


async def test_a_request_the_engine_fails_on_fails_alone() -> None:
    flow = Poisoned.open(DEMO, threads=1)
    flow.poison = float(flow.noise(13, range(1))[0, 0, 0])

    async with calling(flow, delay=30) as (client, _):
        bodies: list[dict[str, Any]] = [{"seed": 12, "n": 6}, {"seed": 13, "n": 5}, {"seed": 14, "n": 5}]
        answers = await drawn(client, *bodies)
        assert [answer.status_code for answer in answers] == [200, 503, 200]
        said = answers[1].json()["error"]
        assert said == "out of memory in block 3's step graph; use a smaller batch_size"
        for body, answer in zip(bodies[::2], answers[::2], strict=True):
            assert np.array_equal(array(answer.content), alone(flow, body))


async def test_a_failure_nobody_foresaw_is_a_500_without_a_traceback(
    flow: Flow, capsys: pytest.CaptureFixture[str]
) -> None:
    async with calling(flow) as (client, service):
        service.flow = None  # type: ignore[assignment]
        answer = await client.post("/v1/samples", json={})
        assert answer.status_code == 500
        identity = answer.headers["x-request-id"]
        assert identity in answer.json()["error"]
        assert "Traceback" not in answer.text
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert any(line["event"] == "failure" and "AttributeError" in line["error"] for line in lines)


# --- strangers ------------------------------------------------------------------------------------------------------


def head(request: str, length: int | None = None, *lines: str) -> bytes:
    given = [f"Authorization: Bearer {TOKEN}", "Host: x", "Connection: close", "Content-Type: application/json", *lines]
    if length is not None:
        given.append(f"Content-Length: {length}")
    return "\r\n".join([f"{request} HTTP/1.1", *given, "", ""]).encode()


def raw(service: Running, content: bytes, half: bool = False) -> int:
    """The status of the answer to these bytes, after which, if ``half``, no more can come; 0 for no answer."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=600) as connection:
        answer = b""
        with contextlib.suppress(OSError):  # refused before all of it was sent, or gone before half of it was shut
            connection.sendall(content)
            if half:
                connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                answer += chunk
    assert b"Traceback" not in answer
    return int(answer.split(b" ", 2)[1]) if answer else 0


def test_without_the_token_only_probes_and_the_page_answer(service: Running) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/"):
        assert service.ask("GET", path)[0] == 200, path
    closed = ("/v2", "/v2/models/sample", "/v1/samples/1/2.png", "/v1/model", "/metrics", "/docs", "/openapi.json",
              "/page/../metrics", "/nowhere")  # fmt: skip
    for path in closed:
        status, headers, content = service.ask("GET", path)
        assert (status, headers["www-authenticate"]) == (401, "Bearer"), path
        assert "token" in json.loads(content)["error"]
    for wrong in ("Bearer x", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN):
        assert service.ask("GET", "/v2", headers={"Authorization": wrong})[0] == 401
    assert service.ask("GET", "/v2", headers=bearer())[0] == 200
    assert service.ask("GET", "/v1/samples/1/2.png", headers=bearer())[1]["cache-control"].startswith("private")
    twice = head("GET /v2", None, "Authorization: Bearer other")
    assert raw(service, twice) == 401
    assert TOKEN not in service.log.read_text()


def test_a_token_comes_from_a_file_and_a_weak_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="token"):
        Settings(token="short")
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    with running(tmp_path, "--token-file", file) as service:
        assert service.ask("GET", "/v2")[0] == 401
        assert service.ask("GET", "/v2", headers=bearer())[0] == 200
        assert service.stop() == 0
    monkeypatch.setenv("TARFLOW_TOKEN", TOKEN + "\n")
    assert token_of(None) == TOKEN
    with pytest.raises(InputError, match="one word"):
        Settings(token="two words")


MALFORMED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe{}",
    b'{"n": NaN}',
    b'{"guidance": NaN}',
    b'{"guidance": 1e999}',
    b'{"guidance": "1"}',
    b'{"seed": 1.5}',
    b'{"seed": true}',
    b'{"seed": 18446744073709551616}',
    b'{"seed": ' + b"9" * 5000 + b"}",
    b'{"first_sample": 18446744073709551615, "n": 2}',
    b'{"labels": []}',
    b'{"labels": [1, 2], "n": 3}',
    b'{"labels": [[1]]}',
    b'{"labels": 9223372036854775808}',
    b'{"n": 65}',
    b'{"format": "../../etc/passwd"}',
    b'{"n": 1, "n ": 1}',
    b'{"a":' * 20_000,
    b"[" * 200_000,
]


def test_malformed_bodies_are_refused_with_a_reason(service: Running) -> None:
    for body in MALFORMED:
        status, _, content = service.ask("POST", "/v1/samples", body, bearer())
        assert status == 400, (body[:60], status, content[:200])
        assert json.loads(content)["error"]
    assert service.ask("POST", "/v1/samples", b" " * (1 << 20) + b"{}", bearer())[0] == 413
    assert service.ask("POST", "/v1/samples", b"{}", bearer() | {"Content-Type": "text/plain"})[0] in (400, 415)
    assert service.ask("POST", "/v1/samples", b"\x1f\x8b", bearer() | {"Content-Encoding": "gzip"})[0] == 415


_CHUNK = b"10000\r\n" + b" " * 65536 + b"\r\n"
RAW: list[tuple[bytes, tuple[int, ...]]] = [
    (head("POST /v1/samples", 99999999), (413,)),
    (head("POST /v1/samples", None, "Content-Length: -5") + b"hello", (400,)),
    (head("POST /v1/samples", None, "Content-Length: 0x10") + b"hello", (400,)),
    (head("POST /v1/samples", None, "Content-Length: 2", "Content-Length: 5") + b"{}", (400,)),
    (head("POST /v1/samples", 2, "Transfer-Encoding: chunked") + b"0\r\n\r\n", (400,)),
    (head("POST /v1/samples", None, "Transfer-Encoding: chunked") + b"zz\r\n{}\r\n", (0, 400)),
    (head("POST /v1/samples", None, "Transfer-Encoding: chunked") + _CHUNK * 20, (0, 413)),
    (head("POST /v2/models/sample/infer", 2, *["Inference-Header-Content-Length: 2"] * 2) + b"{}", (400,)),
    (head("POST /v1/samples", 50) + b"{}", (0, 400)),
    (head("GET /" + "a" * 1_000_000), (0, 400, 414)),
    (head("GET /v2", None, "X-Big: " + "a" * 1_000_000), (0, 400, 431)),
    (b"GET /v2 HTTP/9.9\r\n\r\n", (400, 401, 505)),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", (0, 400)),
    (b"GET /v2\r\n\r\n", (400,)),
    (head("BREW /v2"), (405,)),
    (head("DELETE /v1/samples"), (405,)),
]  # fmt: skip


async def test_no_header_makes_long_json_short_and_no_zoom_a_picture_small(flow: Flow) -> None:
    tricks: list[Any] = [
        {"Content-Type": "application/json", "Inference-Header-Content-Length": "0"},
        [("Content-Type", "application/json"), ("Content-Type", "text/plain")],
        {"Content-Type": "text/plain"},
    ]

    async with calling(flow, largest_n=1024) as (client, service):
        for headers in tricks:
            answer = await client.post("/v1/samples", content=b"[" + b"[]," * 1_500_000 + b"[]]", headers=headers)
            assert answer.status_code == 413, headers
        answer = await client.post("/v1/samples", json={"n": 1024, "zoom": 32})
        assert (answer.status_code, "less zoom" in answer.json()["error"]) == (400, True)
        assert b"tarflow_samples_total 0.0" in service.metrics.page()


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error_of_the_service(service: Running) -> None:
    before = service.metric("tarflow_responses_total", bearer(), code="499")
    for path in ("/v2/models/sample/infer", "/v1/likelihood", "/v1/samples"):
        kind = b"image/png" if path == "/v1/likelihood" else b"application/json"
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(head(f"POST {path}", 50).replace(b"application/json", kind) + b"{}")
    until(lambda: service.metric("tarflow_responses_total", bearer(), code="499") >= before + 3)
    assert not service.metric("tarflow_responses_total", bearer(), code="500")


def test_tricks_with_headers_are_refused(service: Running) -> None:
    for content, expected in RAW:
        assert raw(service, content, half=0 in expected) in expected, content[:300]
    assert service.ask("GET", "/v2", headers=bearer())[0] == 200


def test_no_path_leads_to_a_file(service: Running) -> None:
    paths = """
        /../../etc/passwd //etc/passwd /v2/models/..%2f..%2fetc%2fpasswd /manifest.json /weights.safetensors /%ff
        /page/ /page/nothing.js /page/../../cli/serve.py /page/..%2f..%2fapp.py /page/%2e%2e/app.py
        /v1/samples/1/..%2f..%2f2.png /v1/samples/%00/1.png /v1/samples/1/1.png%00.npy
        /v2/models/sample/versions/../../../manifest.json
    """
    for path in paths.split():
        assert raw(service, head(f"GET {path}")) in (400, 404), path


async def test_bodies_that_never_end_are_given_up(flow: Flow) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(600)

    async with calling(flow, timeout=0.3) as (client, _):
        answer = await client.post("/v1/samples", content=endless(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 408

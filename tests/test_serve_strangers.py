"""A service among programs it does not know: pages of other sites, logs nobody reads, pictures that never end."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from tarflow.runtime.flow import Flow
from tarflow.runtime.picture import Picture
from tarflow.serve import page_routes
from tarflow.serve.browsers import Browsers
from tarflow.serve.decoding import _DECODERS, _MOST_WAITING
from tarflow.serve.drawing import Drawing
from tarflow.serve.gate import Gate
from tarflow.serve.server import listen, names_of
from tarflow.serve.service import Service
from tarflow.serve.settings import Settings

from .conftest import until
from .serving import Running, calling, running

NAMES = ("localhost", "127.0.0.1", "[::1]", "tarflow.example")
EVIL = "https://evil.example"
LINK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
JSON = {"Content-Type": "application/json"}
PNG = {"Content-Type": "image/png"}


def grey_png() -> bytes:
    content = io.BytesIO()
    Image.new("L", (8, 8), 128).save(content, "PNG")
    return content.getvalue()


def scope(asked: str, headers: dict[str, str]) -> dict[str, Any]:
    method, path = asked.split()
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": method, "path": path, "headers": raw}


@pytest.mark.parametrize(
    ("asked", "headers", "status"),
    [
        ("GET /v1/model", {}, None),
        ("GET /v1/model", {"Host": "localhost:8080"}, None),
        ("GET /v1/model", {"Host": "LOCALHOST."}, None),
        ("GET /v1/model", {"Host": "[::1]:1"}, None),
        ("GET /v1/model", {"Host": "tarflow.example"}, None),
        ("GET /v1/model", {"Host": "evil.example:8080", "Sec-Fetch-Site": "same-origin"}, 403),
        ("GET /v1/model", {"Host": "localhost.evil.example"}, 403),
        ("GET /v1/model", {"Host": "localhost@evil.example"}, 403),
        ("GET /v1/model", {"Host": ""}, 403),
        ("GET /metrics", {"Host": "10.0.0.7:8080"}, None),
        ("GET /v2/health/ready", {"Host": "10.0.0.7:8080"}, None),
        ("GET /v1/samples/stream", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("GET /v1/samples/stream", LINK, 403),
        ("GET /", LINK, None),
        ("GET /v1/samples/7/3.png", LINK, None),
        ("GET /v1/samples/7/3.png", {"Origin": EVIL}, 403),
        ("GET /v1/model", {"Origin": "null"}, 403),
        ("GET /v1/model", {"Host": "localhost:8080", "Origin": "https://tarflow.example"}, None),
        ("POST /v1/likelihood", PNG | {"Origin": "http://localhost:8080", "Host": "localhost:8080"}, None),
        ("POST /v1/likelihood", PNG | {"Origin": "https://other", "Sec-Fetch-Site": "same-origin"}, None),
        ("POST /v1/samples", JSON | {"Origin": EVIL}, 403),
        ("POST /v1/samples", {"Content-Type": "application/x-www-form-urlencoded"}, None),  # curl
        ("POST /v1/samples", {"Content-Type": "Text/Plain; a=b", "Sec-Fetch-Site": "same-site"}, 415),
        ("POST /v1/samples", {"Origin": "http://localhost"}, 415),
    ],
)
def test_a_browser_s_requests_come_by_a_known_name_from_the_page_itself(
    asked: str, headers: dict[str, str], status: int | None
) -> None:
    refusal = Browsers(NAMES).refusal(scope(asked, headers))
    assert (refusal and refusal.status_code) == status
    if refusal is None or "Host" not in headers:
        again = Browsers(("*",)).refusal(scope(asked, {"Host": "localhost"} | headers))
        unknown = "tarflow.example" in headers.get("Origin", "")
        assert (again and again.status_code) == (403 if unknown else status)


def test_names_are_asked_for_where_loopback_is_bound_or_some_are_given() -> None:
    with listen("127.0.0.1", 0, 60) as here, listen("0.0.0.0", 0, 60) as everywhere:
        assert sorted(names_of(here, ("tarflow.example",))) == sorted(NAMES), "each once"
        assert names_of(everywhere, ()) == ("*",)
        assert names_of(everywhere, ("tarflow.example",)) == ("tarflow.example",)


def test_a_server_has_its_names_and_minds_no_variables_of_others(tmp_path: Path) -> None:
    names = ("--allowed-hosts", "tarflow.example")
    with running(tmp_path, *names, WEB_CONCURRENCY="auto", PROMETHEUS_MULTIPROC_DIR="/nonexistent") as service:
        for host, status in (("evil.example", 403), ("tarflow.example:443", 200), (f"127.0.0.1:{service.port}", 200)):
            assert service.ask("GET", "/v1/model", headers={"Host": host})[0] == status
        status, headers, _ = service.ask("GET", "/docs/?a=b")
        assert (status, headers["location"]) == (307, "../docs?a=b"), "whatever a proxy puts before it"
        assert service.metric("tarflow_responses_total") >= 4
        assert service.stop() == 0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("strangers")) as found:
        yield found


# --- the log --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-", "2>pipe # its reader leaves", "2>pipe # nobody reads"])
def test_a_log_that_cannot_be_written_decides_nothing(tmp_path: Path, stderr: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    with running(tmp_path, shell=f'cd {tmp_path}; exec "$@" {stderr}') as service, ThreadPoolExecutor(1) as pool:
        if "nobody" in stderr:
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(reader, bytes(1024))
        if "leaves" in stderr:
            os.close(reader)
        big = pool.submit(service.ask, "POST", "/v1/samples", {"n": 128, "certify": True})
        until(lambda: service.metric("tarflow_block_seconds_count") > 0)
        assert service.stop() == 0
        assert big.result()[0] == 200
    if "leaves" not in stderr:
        os.close(reader)


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Decoders that return when this is set."""
    go = threading.Event()

    def never(data: bytes, channels: int, size: int) -> Picture:
        go.wait()
        raise AssertionError

    monkeypatch.setattr(page_routes, "open_picture", never)
    yield go
    go.set()


@pytest.mark.anyio
async def test_decoders_that_do_not_return_hold_up_neither_samples_nor_more_pictures_than_a_few(
    flow: Flow, stuck: threading.Event
) -> None:
    async with calling(flow, timeout=3) as (client, service):
        asking = [
            asyncio.create_task(client.post("/v1/likelihood", content=b"x", headers=PNG))
            for _ in range(_DECODERS + _MOST_WAITING)
        ]
        while len(service.decoding.waiting) < _MOST_WAITING:
            await asyncio.sleep(0.01)
        refused = await client.post("/v1/likelihood", content=b"x", headers=PNG)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert (await client.post("/v1/samples", json={})).status_code in (200, 504)  # on a busy machine
        assert {answer.status_code for answer in await asyncio.gather(*asking)} == {504}
        assert not service.decoding.waiting


@pytest.mark.parametrize("work", ["open_picture", "_likelihood"])
def test_the_process_ends_though_a_decoder_or_an_engine_does_not_return(tmp_path: Path, work: str) -> None:
    code = f"import time, tarflow.serve.page_routes as routes; routes.{work} = lambda *_: time.sleep(3600)"
    with running(tmp_path, "--timeout", 1, "--grace", 0, code=code) as service:
        assert service.ask("POST", "/v1/likelihood", grey_png(), PNG)[0] == 504
        assert service.stop() == 0


# --- bodies and connections -----------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_body_is_said_once_and_bodies_are_as_large_as_a_route_can_use(flow: Flow) -> None:
    for wrong in ("", 1.5):
        with pytest.raises(ValidationError) as found:
            Drawing.model_validate({"labels": [wrong] * 100_000})
        assert found.value.error_count() <= 2
    gate = Gate(None, Service(flow, Settings()))  # type: ignore[arg-type]
    binary = {"Inference-Header-Content-Length": "2"}
    expected = {
        "/v1/samples": 270_336, "/v2/models/sample/infer": 270_336, "/v2/models/sample/versions/1/infer": 270_336,
        "/v2/models/encode/infer": 64 << 20, "/v1/likelihood": 8 << 20, "/v2/models/infer": 16384, "/metrics": 16384,
    }  # fmt: skip
    assert {path: gate.limit(scope(f"POST {path}", binary)) for path in expected} == expected
    assert gate.limit(scope("POST /v2/models/encode/infer", {})) == 4 << 20


@pytest.mark.parametrize("wrong", [b'{"labels":[' + b'"",' * 80_000 + b"1]}", bytes(4 << 20)], ids=["wrong", "large"])
def test_a_refusal_arrives_though_its_body_is_still_being_sent(shared: Running, wrong: bytes) -> None:
    status, _, said = shared.ask("POST", "/v1/samples", wrong, {"Connection": "close"})
    assert (status, len(said) < 1000) == (413 if len(wrong) > 300_000 else 400, True)


def test_half_requests_are_cut_off_and_make_room_for_whole_ones(tmp_path: Path) -> None:
    whole, half = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET / HTTP/1.1\r\nX: "
    few_files, held = 'ulimit -n 200; exec "$@"', []
    with running(tmp_path, "--timeout", 2, shell=few_files) as service, contextlib.ExitStack() as connections:
        for _ in range(130):  # it may hold a hundred
            connection = connections.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=600))
            with contextlib.suppress(ConnectionError):
                connection.sendall(whole)
                connection.recv(1000)
                connection.sendall(half)
            held.append(connection)
        assert service.ask("GET", "/v2/health/live")[0] == 200
        for connection in held:
            with contextlib.suppress(ConnectionError):
                while connection.recv(1000):
                    pass
        assert service.stop() == 0

"""What docs/DEPLOY.md promises: an image's steps in a fresh Debian root, another bundle without a dropped request."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import DEMO, until
from .containerfile import ROOT, Stage, built, instructions
from .serving import Running, running

DEPLOY = ROOT / "deploy"
DEBIAN = ROOT / "build" / "debian.tar"  # `make build/debian.tar`
_STEP_SECONDS = 900.0


def why_no_root() -> str:
    """Why a root cannot be changed into here; "" if it can."""
    if not DEBIAN.is_file():
        return f"no {DEBIAN.relative_to(ROOT)}: make {DEBIAN.relative_to(ROOT)}"
    tried = ["unshare", "--mount", "--pid", "--fork", "--net", "true"]
    if os.geteuid() or not shutil.which("ip") or subprocess.run(tried, capture_output=True, check=False).returncode:
        return "a root needs root, iproute2 and unshare"
    return ""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    if why := why_no_root():
        pytest.skip(why)
    work = tmp_path_factory.mktemp("image")
    try:
        yield built(DEPLOY / "Containerfile", DEBIAN, work, _STEP_SECONDS)
    finally:
        shutil.rmtree(work)


ASK = (
    "import json, sys; from urllib.request import urlopen\n"
    "print(json.load(urlopen('http://127.0.0.1:8080/v1/model'))['name'])\n"
    "print(len(urlopen('http://127.0.0.1:8080/v1/samples/7/3.png?label=3').read()))"
)


def test_the_image_for_cpus_serves_without_root_and_is_healthy(image: Stage) -> None:
    healthy, asked = image.inside(image.health), image.inside(["python3", "-c", ASK])
    script = f"""
{image.inside([*image.entry, *image.command])} > /dev/null &
for i in $(seq 600); do {healthy} 2> /dev/null && break; sleep 0.2; done
{healthy}
{asked}
grep ^Uid: {image.root}/proc/$!/status
kill $!; wait $! && echo ended well
"""
    told = image.carry_out(script, _STEP_SECONDS, network=False).splitlines()
    assert told[0] == "digits"
    assert int(told[1]) > 100
    assert told[2].split() == ["Uid:", *["10001"] * 4]
    assert told[3] == "ended well"
    assert not (image.root / "usr/bin/g++").exists(), "what runs has a compiler"
    doctor = image.carry_out(image.inside(["tarflow", "doctor"]), _STEP_SECONDS)
    assert re.search("self-test native +ok", doctor), "the native engine was not built"


def test_the_image_for_gpus_differs_by_its_packages_alone() -> None:
    cpu, cuda = (instructions(DEPLOY / name) for name in ("Containerfile", "Containerfile.cuda"))
    differ = [ours for ours, theirs in zip(cuda, cpu, strict=True) if ours != theirs]
    assert [word for word, _ in differ] == ["RUN", "ENV", "CMD"]
    assert "/src[serve,gpu]" in differ[0][1]
    assert differ[0][1].endswith("onnxruntime-gpu")


def test_what_an_image_is_made_of_is_there_and_no_secret_is() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert all((ROOT / line[1:]).exists() for line in lines if line.startswith("!"))


def test_the_files_for_kubernetes_and_systemd_fit_what_the_server_promises() -> None:
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    grace = float(container["args"][container["args"].index("--grace") + 1])
    assert pod["terminationGracePeriodSeconds"] > grace + 60 + 5
    assert container["args"][0] == "serve"
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    paths = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"/v2/health/live", "/v2/health/ready"}
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    unit = (DEPLOY / "tarflow.service").read_text()
    assert re.search(r"^ExecStart=\S+/tarflow serve ", unit, re.M)
    assert "DynamicUser=yes" in unit


class Proxy(socketserver.ThreadingTCPServer):
    """Passes each connection on to ``port``, which may change between two."""

    port: int
    request_queue_size = 64

    class RequestHandlerClass(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            assert isinstance(self.server, Proxy)
            with socket.create_connection(("127.0.0.1", self.server.port)) as server:
                asking = threading.Thread(target=passed_on, args=(self.request, server))
                asking.start()
                passed_on(server, self.request)
                asking.join()


def passed_on(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy(("127.0.0.1", 0), Proxy.RequestHandlerClass) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_another_bundle_takes_over_and_every_request_is_answered(proxy: Proxy, tmp_path: Path) -> None:
    newer = shutil.copytree(DEMO, tmp_path / "newer")
    manifest = json.loads((newer / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps(manifest | {"name": "newer"}))
    answers: list[tuple[int, Any]] = []
    stop = threading.Event()
    folders = [tmp_path / name for name in ("old", "new")]
    for folder in folders:
        folder.mkdir()

    def ask() -> None:
        while not stop.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", proxy.server_address[1], timeout=600)
            body = json.dumps({"n": 4, "seed": len(answers), "format": "zip"})
            connection.request("POST", "/v1/samples", body, {"Content-Type": "application/json", "Connection": "close"})
            answer = connection.getresponse()
            answers.append((answer.status, len(answer.read())))
            connection.close()

    with running(folders[0], "--grace", 1) as old, contextlib.ExitStack() as later:
        proxy.port = old.port
        clients = [threading.Thread(target=ask) for _ in range(3)]
        for client in clients:
            client.start()
        try:
            until(lambda: len(answers) >= 6)
            new: Running = later.enter_context(running(folders[1], bundle=newer))
            assert new.ask("GET", "/v2/health/ready")[0] == 200
            proxy.port = new.port
            assert old.stop() == 0
            before = len(answers)
            until(lambda: len(answers) >= before + 6)
            assert json.loads(new.ask("GET", "/v1/model")[2])["name"] == "newer"
        finally:
            stop.set()
            for client in clients:
                client.join()
    assert {status for status, _ in answers} == {200}
    assert min(length for _, length in answers) > 0

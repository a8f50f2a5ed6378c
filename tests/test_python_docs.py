"""What docs/PYTHON.md and README.md show of the Python API runs as it stands, and passes strict type checkers."""

from __future__ import annotations

import ast
import dataclasses
import http.client
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tarflow.runtime.guidance import Guidance
from tarflow.runtime.opening import Opening
from tarflow.runtime.request import Request, SampleKeywords

from .conftest import DEMO, until

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "PYTHON.md").read_text()
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "ORT_DISABLE_TELEMETRY": "1"}


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's snippets as files: one that begins with a comment of a name is that file, the rest are page.py; and
    README's, in readme.py."""
    place = tmp_path_factory.mktemp("snippets")
    (place / "my-bundle").symlink_to(DEMO)
    page = []
    for block in blocks(PAGE, "python"):
        named = re.match(r"# (\w+\.py)\n", block)
        if named:
            (place / named[1]).write_text(block)
        else:
            page.append(block)
    (place / "page.py").write_text("\n".join(page))
    (place / "readme.py").write_text("\n".join(blocks((ROOT / "README.md").read_text(), "python")))
    return place


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_snippets_run_from_top_to_bottom(folder: Path) -> None:
    said = run(folder, "-W", "error", "page.py")
    assert "labels 99 -1 to 9" in said
    assert "not here: provider 'cuda:1'" in said
    run(folder, "-W", "error", "readme.py")
    assert (folder / "grid.png").exists()


def test_a_flow_goes_to_workers_however_they_are_made(folder: Path) -> None:
    spawned, forked = (line.split(" ", 1)[1] for line in run(folder, "workers.py").splitlines())
    assert spawned == forked


def test_the_snippets_pass_mypy_strict(folder: Path) -> None:
    """With what the package declares: types that were missing would be Any, of which nothing is revealed."""
    (folder / "revealed.py").write_text(
        "from tarflow import Flow\nflow = Flow.open('my-bundle')\nreveal_type(flow.sample(1, certify=True).log_prob)\n"
        "reveal_type(flow.sample(1))\nreveal_type(flow.sample(2, certify=flow.config.nvp)[1:].report)\n"
    )
    names = ("page.py", "readme.py", "workers.py", "service.py", "revealed.py")
    said = run(folder, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(folder / "cache"), *names)
    revealed = re.findall(r'Revealed type is "(.*)"', said)
    assert len(revealed) == 3
    assert "numpy.float64" in revealed[0] or "floating[numpy._typing._nbit_base._64Bit]" in revealed[0], revealed[0]
    assert [kind.rpartition(".")[2] for kind in revealed[1:]] == ["Samples", "Report"]


@pytest.mark.parametrize(
    ("table", "fields", "names"),
    [
        ("opening", Opening, [field.name for field in dataclasses.fields(Opening)]),
        ("drawing", Request, ["n", "certify", *SampleKeywords.__annotations__]),
    ],
)
def test_the_tables_have_every_argument_and_its_default(table: str, fields: Any, names: list[str]) -> None:
    rows = re.search(rf"^\| {table} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.M)
    assert rows
    told = {name: ast.literal_eval(value) for name, value in re.findall(r"^\| `(\w+)` .*`(.+)` \|$", rows[1], re.M)}
    assert sorted(told) == sorted(names)
    defaults = {
        field.name: field.default for field in dataclasses.fields(fields) if field.name not in ("n", "guidance")
    }
    assert {name: told[name] for name in defaults} == defaults
    assert set(told.items()) - set(defaults.items()) <= {(name, None) for name in names}, "the rest is None"
    for name in re.findall(r"Guidance\(([^)]+)\)`, or its scale", rows[1]):
        assert name.split(", ") == [field.name for field in dataclasses.fields(Guidance)]


def commands() -> list[str]:
    return [line.split("   #")[0] for line in blocks(PAGE, "sh")[-1].splitlines()]


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.split()[0] + command[-5:])
def test_the_application_runs_under_other_servers(folder: Path, command: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server, *words = shlex.split(re.sub(r"\b80\d\d\b", str(port), command))
    environment = ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{folder}"}
    prefix = "/flow" if "mine" in command else ""
    log = folder / f"{port}.log"
    with log.open("w") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", server, *words], cwd=folder, env=environment, stdout=told, stderr=told
        )

    def status(path: str) -> int:
        assert process.poll() is None, log.read_text()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        try:
            connection.request("GET", prefix + path)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    try:
        until(lambda: status("/v2/health/ready") == 200)
        assert status("/v1/samples/7/3.png?label=3&guidance=1") == 200
    finally:
        process.terminate()
        process.wait()


def test_the_page_shows_what_its_list_of_contents_promises() -> None:
    titles = re.findall(r"^## (.*)$", PAGE, re.M)
    for wanted in ("Threads and asyncio", "Processes", "Errors", "Progress, previews", "Inside a web", "Encoding",
                   "Out of distribution", "Noise by seed", "Log-densities"):  # fmt: skip
        assert any(title.startswith(wanted) for title in titles), wanted

"""The application on Ray Serve: what a replica answers is what the library draws, and SIGTERM loses no answer."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from tarflow.runtime.errors import InputError
from tarflow.runtime.flow import Flow, Guidance
from tarflow.serve import replicas

from .conftest import DEMO, until


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """One replica on loopback, and its address."""
    command = [sys.executable, "-m", "tarflow.cli.main", "serve", str(DEMO), "--ray", "local", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [*command, "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    assert found, line + (process.stderr.read() if process.poll() is not None else "")
    yield process, found[0]
    process.terminate()  # if a test has not
    process.communicate()


def post(address: str, **drawing: object) -> NDArray[np.float32]:
    request = urllib.request.Request(
        f"{address}/v1/samples",
        json.dumps({"format": "npy", **drawing}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        array: NDArray[np.float32] = np.load(io.BytesIO(answer.read()))
    return array


def blocks(address: str) -> float:
    """How many blocks of tiles were inverted so far."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=600) as answer:
        return sum(map(float, re.findall(r"^tarflow_block_seconds_count\S* (\S+)", answer.read().decode(), re.M)))


def test_a_replica_draws_what_the_library_draws_and_sigterm_waits_for_it(
    server: tuple[subprocess.Popen[str], str],
) -> None:
    process, address = server
    flow = Flow.open(DEMO, threads=1)
    expected = flow.sample(
        20, labels=np.arange(20) % 10, guidance=Guidance(1.0), seed=3, first_sample=5, reproducible=True
    )
    found = post(address, n=20, labels=[*(i % 10 for i in range(20))], guidance=1.0, seed=3, first_sample=5)
    assert np.array_equal(found, expected)

    answers: list[NDArray[np.float32]] = []
    asking = threading.Thread(target=lambda: answers.append(post(address, n=256, seed=9)))
    before = blocks(address)
    asking.start()
    until(lambda: blocks(address) > before)  # it is under way
    process.send_signal(signal.SIGTERM)
    asking.join()
    assert np.array_equal(answers[0], flow.sample(256, seed=9, reproducible=True))
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert "Traceback" not in told


@pytest.mark.parametrize("text", ["0", "4,1", "x", "1,2,3", ""])
def test_replicas_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="`replicas` is"):
        replicas.parse_replicas(text)
    assert replicas.parse_replicas("1,4") == replicas.Replicas(1, 4)

"""The application on Ray Serve: what a replica answers is what the library draws, and SIGTERM loses no answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tarflow.runtime.errors import InputError
from tarflow.runtime.flow import Flow
from tarflow.serve import replicas

from .conftest import until
from .serving import Running, alone, array, running


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One replica on loopback."""
    with running(tmp_path_factory.mktemp("ray"), "--ray", "local", "--threads", 1, RAY_ADDRESS="") as found:
        yield found
        found.stop()  # if a test has not


def test_a_replica_draws_what_the_library_draws_and_sigterm_waits_for_it(service: Running, flow: Flow) -> None:
    def ask(body: dict[str, Any]) -> bytes:
        return service.ask("POST", "/v1/samples", body | {"format": "npy"})[2]

    labelled: dict[str, Any] = {"labels": [i % 10 for i in range(20)], "guidance": 1.0, "seed": 3, "first_sample": 5}
    assert np.array_equal(array(ask(labelled)), alone(flow, labelled))

    many, answers = {"n": 256, "seed": 9}, list[bytes]()
    asking = threading.Thread(target=lambda: answers.append(ask(many)))
    before = service.metric("tarflow_block_seconds_count")
    asking.start()
    until(lambda: service.metric("tarflow_block_seconds_count") > before)  # it is under way
    service.process.terminate()
    asking.join()
    assert np.array_equal(array(answers[0]), alone(flow, many))
    assert service.process.wait() == 0
    assert "Traceback" not in service.log.read_text()


@pytest.mark.parametrize("text", ["0", "4,1", "x", "1,2,3", ""])
def test_replicas_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="`replicas` is"):
        replicas.parse_replicas(text)
    assert replicas.parse_replicas("1,4") == replicas.Replicas(1, 4)

"""A repository in a real Triton, over HTTP and gRPC: the bits that this package draws, errors of who made them."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from tarflow.runtime.bundle import Bundle
from tarflow.runtime.flow import Flow
from tarflow.serve.repository import Models, Serving, write_repository

from .conftest import DEMO
from .triton_server import OLDEST, Server, serving, wait_until_ready

Tensors = dict[str, NDArray[Any]]
KINDS = {"int32": "INT32", "int64": "INT64", "float32": "FP32"}
INVALID = {tritonclient.http: "400", tritonclient.grpc: "StatusCode.INVALID_ARGUMENT"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Ready; and at the end stopped, with nothing left running."""
    folder = tmp_path_factory.mktemp("triton")
    bundle = Bundle.open(DEMO)
    write_repository(bundle, folder / "models", Serving(instances=2), Models(("sample",)))
    write_repository(bundle, folder / "models", Serving(), Models(("encode", "denoise")))
    with serving(folder / "models", folder) as server:
        wait_until_ready(server)
        yield server
        assert server.stop() == 0, server.log.read_text()
        with pytest.raises(ProcessLookupError):
            os.killpg(server.process.pid, 0)


@pytest.fixture(scope="module")
def drawn(server: Server, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float32]:
    """Samples 0 ... 63 of seed 7, labels 0-9 in turn, guidance 1.5: drawn on the command line of Triton's Python."""
    path = tmp_path_factory.mktemp("drawn") / "samples.npy"
    options = "--n 64 --labels 0-9 --guidance 1.5 --seed 7 --reproducible -o grid.png --save samples.npy"
    command: list[str | Path] = [OLDEST / "bin" / "tarflow", "generate", DEMO, *options.split()]
    subprocess.run(command, cwd=path.parent, check=True, capture_output=True)
    samples: NDArray[np.float32] = np.load(path)
    return samples


@pytest.fixture(params=[tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])
def protocol(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


def client_of(protocol: ModuleType, server: Server) -> Callable[..., Tensors]:
    """client(model, tensors, wanted outputs or None for all) -> outputs by name."""
    address = server.http if protocol is tritonclient.http else server.grpc

    def infer(model: str, tensors: Tensors, *wanted: str) -> Tensors:
        inputs = []
        for name, array in tensors.items():
            inputs.append(protocol.InferInput(name, list(array.shape), KINDS[array.dtype.name]))
            inputs[-1].set_data_from_numpy(array)
        outputs = [protocol.InferRequestedOutput(name) for name in wanted] or None
        with contextlib.closing(protocol.InferenceServerClient(address)) as client:  # Triton waits for open connections
            answer = client.infer(f"digits-{model}", inputs, outputs=outputs)
        response = answer.get_response() if protocol is tritonclient.http else answer.get_response(as_json=True)
        return {output["name"]: answer.as_numpy(output["name"]) for output in response["outputs"]}

    return infer


def column(*values: float, kind: type = np.int64) -> NDArray[Any]:
    """One number a sample: (N, 1)."""
    return np.array(values, kind)[:, None]


def guided(indices: range) -> Tensors:
    """What ``drawn`` has at these indices."""
    labels = [index % 10 for index in indices]
    guidance = column(*[1.5] * len(indices), kind=np.float32)
    return {"seed": column(*[7] * len(indices)), "index": column(*indices), "label": column(*labels)} | {
        "guidance": guidance
    }


def test_every_output_of_every_model_is_the_flows(
    server: Server, protocol: ModuleType, drawn: NDArray[np.float32]
) -> None:
    infer, flow = client_of(protocol, server), Flow.open(DEMO)
    found = infer("sample", guided(range(3, 8)))
    assert found.keys() == {"images", "certificate", "log_prob"}
    np.testing.assert_array_equal(found["images"], drawn[3:8])
    assert 0 < found["certificate"].max() < 1e-4
    assert found["log_prob"].dtype == np.float64
    assert found["log_prob"].shape == (5, 1)
    assert infer("sample", guided(range(2)), "certificate").keys() == {"certificate"}
    unguided = infer("sample", {"seed": column(1, 1), "index": column(0, 1)}, "images")
    assert unguided.keys() == {"images"}
    np.testing.assert_allclose(unguided["images"], flow.sample(2, seed=1, reproducible=True), atol=1e-5)

    labels = column(*(index % 10 for index in range(20)))
    encoded = infer("encode", {"images": drawn[:20], "label": labels})
    z, log_det = flow.encode(drawn[:20], labels[:, 0])
    expected = {"latent": z, "log_det": log_det[:, None], "bits_per_dim": flow.bits_of(z, log_det)[:, None]}
    assert encoded.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(encoded[name], array, atol=1e-4)
    strength = column(*[0.5] * 20, kind=np.float32)
    denoised = infer("denoise", {"images": drawn[:20], "label": labels, "strength": strength})
    np.testing.assert_allclose(denoised["images"], flow.denoise(drawn[:20], labels[:, 0], 0.5), atol=1e-5)


ONE = {"seed": column(0), "index": column(0)}
INFINITE = np.full((1, 1, 8, 8), np.inf, np.float32)


@pytest.mark.parametrize(
    ("model", "tensors", "message"),
    [
        ("sample", ONE | {"label": column(10)}, "label 10 is out of range; this model has classes 0 to 9"),
        ("sample", ONE | {"label": column(-2)}, "label -2 is out of range; this model has classes 0 to 9"),
        ("sample", ONE | {"seed": column(-1)}, "seed is -1; expected 0 or more"),
        ("sample", ONE | {"label": column(1), "guidance": column(np.nan, kind=np.float32)}, "guidance holds"),
        ("sample", ONE | {"guidance": column(1, kind=np.float32)}, "guidance does nothing for samples without a label"),
        ("encode", {"images": INFINITE}, "not finite"),
        ("denoise", {"images": INFINITE}, "not finite"),
        ("sample", {"seed": column(0)}, "index"),
        ("sample", ONE | {"seed": column(0, kind=np.int32)}, "INT32"),
        ("sample", {"seed": np.zeros((65, 1), np.int64), "index": np.zeros((65, 1), np.int64)}, "64"),
    ],
)
def test_wrong_input_is_an_invalid_argument(
    server: Server, protocol: ModuleType, model: str, tensors: Tensors, message: str
) -> None:
    with pytest.raises(InferenceServerException) as raised:
        client_of(protocol, server)(model, tensors)
    assert message in raised.value.message()
    assert raised.value.status() == INVALID[protocol]


def test_many_at_once_good_and_wrong_get_their_own_answers(server: Server, drawn: NDArray[np.float32]) -> None:
    wrong: list[object] = []

    def ask(number: int) -> None:
        chance, protocol = random.Random(number), (tritonclient.http, tritonclient.grpc)[number % 2]
        infer = client_of(protocol, server)
        for _ in range(6):
            first = chance.randrange(50)
            indices = range(first, first + chance.randint(1, 9))
            try:
                if chance.random() < 0.2:
                    with pytest.raises(InferenceServerException, match="out of range"):
                        infer("sample", guided(indices) | {"label": column(*[11] * len(indices))})
                wanted = chance.choice([("images",), ("images", "certificate")])
                found = infer("sample", guided(indices), *wanted)
                assert found.keys() == {*wanted}
                np.testing.assert_array_equal(found["images"], drawn[indices.start : indices.stop])
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_triton_that_would_answer_with_empty_tensors_does_not_load_a_model(tmp_path: Path) -> None:
    """2.51 with NumPy 2, which is what the tests themselves run on."""
    write_repository(Bundle.open(DEMO), tmp_path / "models", Serving(), Models(("sample",)))
    with serving(tmp_path / "models", tmp_path, environment=Path(sys.prefix)) as server:
        assert server.process.wait() != 0
    assert f"this Triton cannot read arrays of NumPy {np.__version__}" in server.log.read_text()
    assert "pip install 'numpy<2'" in server.log.read_text()

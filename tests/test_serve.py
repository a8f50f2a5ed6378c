"""``tarflow serve`` from outside: a client nobody here wrote, samples that are their seed's, caches, batches, docs."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
import tritonclient.http as triton
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from schemathesis import checks
from schemathesis.specs.openapi import checks as document_checks

from tarflow.runtime.bundle import Bundle
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.image import to_uint8
from tarflow.serve.metrics import Metrics
from tarflow.serve.packing import ranges
from tarflow.serve.samples import accepted
from tarflow.serve.service import Refusal

from .conftest import DEMO, Cli, report_of
from .serving import Running, alone, array, calling, drawn, running

CHECKS = [
    checks.not_a_server_error,
    document_checks.status_code_conformance,
    document_checks.content_type_conformance,
    document_checks.response_headers_conformance,
    document_checks.response_schema_conformance,
    document_checks.unsupported_method,
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("serve"), "--max-n", 16) as found:
        yield found


@pytest.fixture
def client(service: Running) -> Iterator[triton.InferenceServerClient]:
    found = triton.InferenceServerClient(f"127.0.0.1:{service.port}")
    yield found
    found.close()


def tensor(name: str, array: Any, datatype: str, binary: bool = True) -> triton.InferInput:
    found = triton.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array, binary_data=binary)
    return found


def test_a_server_that_is_ready_says_so_in_one_document(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tarflow.cli.main", "serve", str(DEMO), "--port", "0", "--threads", "1", "--json"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        ready = json.loads(process.stdout.readline())
        assert httpx.get(f"{ready['url']}/v2/health/ready").status_code == 200
        assert ready["url"] == f"http://{ready['host']}:{ready['port']}"
        assert ready["bundle_hash"] == Bundle.open(DEMO).hash
    finally:
        process.terminate()
        rest, _ = process.communicate()
    assert rest == ""


def test_triton_s_client_finds_the_service_alive_ready_and_described(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    for name in ("sample", "encode", "denoise"):
        assert client.is_model_ready(name)
        assert client.is_model_ready(name, "1")
    assert not client.is_model_ready("unet")
    described = client.get_model_metadata("sample", "1")
    assert [(t["name"], t["datatype"], t["shape"]) for t in described["outputs"]] == [
        ("images", "FP32", [-1, 1, 8, 8]),
        ("finite", "BOOL", [-1]),
        ("certificate", "FP32", [-1]),
        ("log_prob", "FP64", [-1]),
    ]
    with pytest.raises(triton.InferenceServerException, match="no such model"):
        client.get_model_metadata("unet")


@pytest.mark.parametrize("binary", [True, False])
def test_triton_s_client_draws_the_flow_s_samples_and_numbers_are_tensors_or_parameters(
    client: triton.InferenceServerClient, flow: Flow, binary: bool
) -> None:
    labels = np.array([3, 7, -1])
    numbers: dict[str, Any] = {"first_sample": np.array([14], np.uint64), "guidance": np.array([1.5], np.float32)}
    seed = np.array([2**64 - 1], np.uint64)
    inputs = [tensor("labels", labels, "INT64", binary), tensor("seed", seed, "UINT64", binary)]
    if binary:
        inputs += [tensor(name, one, "UINT64" if one.dtype == np.uint64 else "FP32") for name, one in numbers.items()]
    said = {} if binary else {name: one.item() for name, one in numbers.items()}
    outputs = [triton.InferRequestedOutput(name, binary) for name in ("images", "finite", "certificate", "log_prob")]
    answer = client.infer("sample", inputs, "1", outputs, "r1", parameters=said)
    expected = flow.sample(
        3, labels=labels, seed=2**64 - 1, first_sample=14, guidance=Guidance(1.5), certify=True, reproducible=True
    )
    assert answer.get_response()["id"] == "r1"
    assert np.array_equal(answer.as_numpy("images"), np.asarray(expected))
    assert answer.as_numpy("finite").all()
    assert np.array_equal(answer.as_numpy("certificate"), expected.certificate)
    assert np.array_equal(answer.as_numpy("log_prob"), expected.log_prob)
    assert answer.get_response()["parameters"]["density"] == expected.report.density
    one_label = [tensor("labels", np.array([4]), "INT64", binary), tensor("n", np.array([2]), "INT64", binary)]
    unasked = client.infer("sample", one_label)
    assert [output["name"] for output in unasked.get_response()["outputs"]] == ["images", "finite"]
    assert np.array_equal(unasked.as_numpy("images"), alone(flow, {"n": 2, "labels": 4}))


def test_triton_s_client_encodes_and_denoises(client: triton.InferenceServerClient, flow: Flow) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8)).astype(np.uint8)
    images, labels = flow.dequantise(pixels, seed=4, first_sample=2), np.arange(5)
    of_images = client.infer("encode", [tensor("images", images, "FP32"), tensor("labels", labels, "INT64")])
    said = {"seed": 4, "first_sample": 2}
    of_pixels = client.infer(
        "encode", [tensor("pixels", pixels, "UINT8"), tensor("labels", labels, "INT64")], parameters=said
    )
    latent, log_det = flow.encode(images, labels)
    bits = flow.bits_per_dim(images, labels)
    nats = flow.log_likelihood(images, labels)
    wanted = {"latent": latent, "log_det": log_det, "bits_per_dim": bits, "log_likelihood": nats}
    for name, expected in wanted.items():
        np.testing.assert_allclose(of_images.as_numpy(name), expected, rtol=1e-5, atol=1e-4)
        assert np.array_equal(of_images.as_numpy(name), of_pixels.as_numpy(name))
    answer = client.infer(
        "denoise", [tensor("images", images, "FP32"), tensor("strength", np.array([0.5], np.float32), "FP32")]
    )
    np.testing.assert_allclose(answer.as_numpy("images"), flow.denoise(images, strength=0.5), atol=1e-5)


REQUESTS: list[dict[str, Any]] = [
    {
        "labels": [(i + k) % 11 - 1 for k in range(1 + i % 7)] if i % 4 else i % 10,
        "seed": i // 5,
        "first_sample": 13 * i,
        "guidance": 1.0 * (i % 4 == 0),
        "denoise": False if i % 6 == 5 else None,
    }
    for i in range(40)
]  # fmt: skip


def infer(service: Running, model: str, images: Any) -> tuple[int, Any]:
    """The status and the answer of a model that is given images as JSON."""
    tensor = {"name": "images", "datatype": "FP32", "shape": list(images.shape), "data": images.ravel().tolist()}
    status, _, answer = service.ask("POST", f"/v2/models/{model}/infer", {"inputs": [tensor]})
    return status, json.loads(answer)


def test_encoding_that_overflows_is_an_error_that_names_the_rows(service: Running, flow: Flow) -> None:
    images = np.random.default_rng(0).choice([-8, 8], (16, 1, 8, 8)).astype(np.float32)
    broken = np.flatnonzero(~np.isfinite(flow.bits_per_dim(images)))
    assert 0 < len(broken) < 16, "some must overflow and some not, or this test shows nothing"
    status, answer = infer(service, "encode", images)
    assert (status, answer["error"].split(" have ")) == (
        400,
        [f"images {ranges(tuple(broken))}", "no finite likelihood: they are nothing like the model's"],
    )
    status, answer = infer(service, "denoise", images)
    finite = {output["name"]: output["data"] for output in answer["outputs"]}["finite"]
    assert (status, all(finite)) == (200, False)


@pytest.mark.parametrize("model", ["encode", "denoise"])
def test_floats_of_another_range_are_warned_of_or_refused(service: Running, model: str) -> None:
    images = np.random.default_rng(0).random((1, 1, 8, 8))
    status, answer = infer(service, model, images)
    assert (status, "taken as images in [-1, 1]" in answer["parameters"]["warning"]) == (200, True)
    status, answer = infer(service, model, images * 255)
    assert (status, "expected floats in [-1, 1]" in answer["error"]) == (400, True)


@pytest.mark.anyio
async def test_a_request_s_bits_do_not_depend_on_who_shares_its_batch(flow: Flow) -> None:
    async with calling(flow, workers=2) as (client, service):
        assert service.batcher.shares
        together = await drawn(client, *REQUESTS)
        backwards = await drawn(client, *reversed(REQUESTS))
        page = service.metrics.page().decode()
    batches = float(re.findall(r"^tarflow_batches_total (\S+)", page, re.M)[0])
    assert batches < 0.6 * 2 * len(REQUESTS), "they did share"
    for body, first, second in zip(REQUESTS, together, reversed(backwards), strict=True):
        assert np.array_equal(array(first.content), alone(flow, body)), body
        assert first.content == second.content


@pytest.mark.anyio
async def test_where_rows_are_not_independent_requests_are_drawn_alone_and_right(flow: Flow) -> None:
    async with calling(flow) as (client, service):
        service.batcher.shares = False
        for body, answer in zip(REQUESTS[1:4], await drawn(client, *REQUESTS[1:4]), strict=True):
            assert np.array_equal(array(answer.content), alone(flow, body))
        assert b"tarflow_batches_total 3.0" in service.metrics.page()


def test_samples_come_as_a_grid_as_pictures_in_a_zip_and_as_an_array(service: Running, flow: Flow) -> None:
    body = {"labels": [1, 2, 3], "seed": 5, "first_sample": 7, "certify": True, "zoom": 1}
    expected = alone(flow, body)
    log_prob = flow.sample(
        3, labels=[1, 2, 3], seed=5, first_sample=7, certify=True, reproducible=True
    ).log_prob.tolist()
    status, headers, grid = service.ask("POST", "/v1/samples", body)
    assert [float(word) for word in headers["x-tarflow-log-prob"].split(",")] == log_prob
    assert (status, headers["content-type"]) == (200, "image/png")
    assert headers["x-tarflow-shape"] == "3,1,8,8"
    assert float(headers["x-tarflow-certificate"]) < 1e-4
    with Image.open(io.BytesIO(grid)) as picture:
        text = picture.text  # type: ignore[attr-defined]  # of PNG images only
        assert (text["seed"], text["sample_indices"], text["bundle_hash"]) == ("5", "7-9", flow.bundle.hash)
        assert np.array_equal(np.asarray(picture)[2:10, 2:10], to_uint8(expected)[0, 0])
    first = service.ask("POST", "/v1/samples", body, {"Accept": "image/webp, application/zip;q=0.9, image/png;q=0.1"})
    assert first[1]["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(first[2])) as archive:
        assert archive.namelist() == ["5-7.png", "5-8.png", "5-9.png", "samples.json"]
        said = json.loads(archive.read("samples.json"))["samples"]
        assert [(s["index"], s["label"], s["finite"]) for s in said] == [(7, 1, True), (8, 2, True), (9, 3, True)]
        assert [s["log_prob"] for s in said] == log_prob
        assert json.loads(archive.read("samples.json"))["density"].startswith("of the raw sample, exact under")
        with Image.open(archive.open("5-9.png")) as picture:
            assert np.array_equal(np.asarray(picture), to_uint8(expected)[2, 0])
    assert first[2] == service.ask("POST", "/v1/samples", body | {"format": "zip"})[2], "the same bytes again"
    status, headers, content = service.ask("POST", "/v1/samples", body | {"format": "npy"})
    assert np.array_equal(array(content), expected)
    assert service.ask("POST", "/v1/samples", body, {"Accept": "text/html"})[0] == 406


def test_one_sample_may_be_kept_for_ever_and_is_not_drawn_to_say_that_it_has_not_changed(
    service: Running, flow: Flow
) -> None:
    path = "/v1/samples/9/123456789012.png?label=4&guidance=1&zoom=1"
    status, headers, content = service.ask("GET", path)
    assert status == 200
    assert headers["cache-control"] == "public, max-age=300", "another bundle may be served here tomorrow"
    with Image.open(io.BytesIO(content)) as picture:
        body = {"labels": 4, "guidance": 1.0, "seed": 9, "first_sample": 123456789012}
        assert np.array_equal(np.asarray(picture), to_uint8(alone(flow, body))[0, 0])
    before = service.metric("tarflow_samples_total")
    for tag in (headers["etag"], f'"x", W/{headers["etag"]}', "*"):
        status, again, nothing = service.ask("GET", path, headers={"If-None-Match": tag})
        assert (status, again["etag"], nothing) == (304, headers["etag"], b"")
    assert service.metric("tarflow_samples_total") == before
    assert service.ask("HEAD", path)[0] == 200
    assert service.metric("tarflow_samples_total") == before
    stream = service.ask("GET", "/v1/samples/stream?n=1&seed=9&first_sample=3&labels=4&guidance=1")[2].decode()
    (link,) = json.loads(stream.rsplit("data: ", 1)[1])["links"]
    status, forever, _ = service.ask("GET", f"/{link}")
    assert (status, forever["cache-control"]) == (200, "public, max-age=31536000, immutable")
    status, _, said = service.ask("GET", "/" + re.sub("edition=[0-9a-f]+", "edition=0", link))
    assert (status, b"another bundle" in said) == (404, True)
    other = service.ask("GET", path.replace("label=4", "label=5"))[1]["etag"]
    assert len({headers["etag"], other}) == 2
    for wrong in ("9/18446744073709551616.png", "-1/0.png", "9/x.png", "9/1.png?label=10", "9/1.png?guidance=nan"):
        assert service.ask("GET", f"/v1/samples/{wrong}")[0] == 400, wrong


def test_metrics_show_samples_batches_blocks_sweeps_and_certificates(service: Running) -> None:
    before = service.metric("tarflow_certificate_count")
    assert service.ask("POST", "/v1/samples", {"n": 3, "certify": True})[0] == 200
    assert service.metric("tarflow_certificate_count") == before + 3
    text = service.ask("GET", "/metrics")[2].decode()
    for name in (
        "samples_total", "nonfinite_samples_total", "batches_total", "batched_requests_total", "compute_seconds_total",
        "queue_requests", "batch_samples_count", 'block_seconds_count{block="0"}', 'block_seconds_count{block="3"}',
        'passes_total{block="0"}',
        'responses_total{code="200",route="/v1/samples"}', 'request_seconds_count{route="/v1/samples"}',
    ):  # fmt: skip
        assert f"\ntarflow_{name} " in text, name
    assert service.metric("tarflow_passes_total") % 15 == 0, "15 dependent steps a block and tile"


def test_an_error_that_is_not_finite_does_not_spoil_the_sum(flow: Flow) -> None:
    report, metrics = report_of(flow.sample(2, certify=True)), Metrics()
    metrics.drawn(replace(report, certificate=np.array([np.nan, 0.5], np.float32)), [2], 1.0)
    assert b"tarflow_certificate_sum 0.5" in metrics.page()
    assert b"tarflow_certificate_count 1.0" in metrics.page()


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("*/*", "png"),
        ("application/*", "zip"),
        ("application/x-npy", "npy"),
        ("image/png;q=0.5, application/zip", "zip"),
        ("image/png;q=0, */*;q=0.5", "zip"),
        ("application/zip;q=0, application/*", "npy"),
        ("*/*;q=0.1, application/x-npy;q=0.2", "npy"),
        ("image/png;q=0", None),
        ("text/html", None),
        ("image/png;q=much", None),
    ],
)
def test_the_most_specific_range_of_an_accept_header_counts(accept: str, form: str | None) -> None:
    if form is not None:
        assert accepted(accept) == form
    else:
        with pytest.raises(Refusal):
            accepted(accept)


def test_the_log_is_json_lines_with_the_id_a_client_sent(service: Running) -> None:
    headers = service.ask("GET", "/v1/samples/1/2.png", headers={"X-Request-Id": "from-outside.7"})[1]
    assert headers["x-request-id"] == "from-outside.7"
    assert service.ask("GET", "/nowhere", headers={"X-Request-Id": 'a"b'})[1]["x-request-id"] != 'a"b'
    (line,) = [line for line in service.lines() if line.get("id") == "from-outside.7"]
    found = [line[key] for key in ("event", "method", "path", "status")]
    assert found == ["request", "GET", "/v1/samples/1/2.png", 200]


def test_the_page_of_the_api_needs_no_other_server(service: Running) -> None:
    status, headers, page = service.ask("GET", "/docs")
    assert status == 200
    assert not re.search(rb"(?:src|href)=\"?(?:https?:)?//|@import|url\(", page)
    assert "default-src 'none'" in headers["content-security-policy"]
    document = json.loads(service.ask("GET", "/openapi.json")[2])
    assert all(path.encode() in page for path in document["paths"])


def test_no_request_made_from_the_openapi_document_breaks_the_service_or_the_document(service: Running) -> None:
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{service.port}/openapi.json")
    once = settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate], database=None)
    probed = []
    for result in schema.get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]  # what cannot be read would fail here

        @given(case=operation.as_strategy())
        @settings(once, suppress_health_check=list(HealthCheck))
        def probe(case: Any) -> None:
            case.call_and_validate(checks=CHECKS)

        probe()
        probed.append(operation.label)
    assert {"POST /v1/samples", "GET /v1/samples/{seed}/{index}.png", "POST /v2/models/{name}/infer"} <= set(probed)


def test_ranges_are_short() -> None:
    assert ranges(()) == ""
    assert ranges((3, 4, 5, 9)) == "3-5,9"
    assert ranges(tuple(range(0, 300, 2)), most=2) == "0,2,..."


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--queue", "0"], 2, "--queue is 0; expected 1 or more"),
        (["--max-n", "0"], 2, "--max-n is 0"),
        (["--timeout", "0"], 2, "--timeout is 0"),
        (["--delay-ms", "-1"], 2, "delay is -0.001 s"),
        (["--host", "no such host"], 2, "--host is 'no such host', with --port 0; expected an address"),
        (["--token-file", "/no/such/file"], 2, "--token-file"),
        (["--decode", "magic"], 2, "--decode is 'magic'"),
        (["--memory", "much"], 2, "--memory is 'much'"),
        (["--ray", "--replicas", "4,1"], 2, "--replicas is '4,1'"),
        (["--replicas", "2"], 2, "--replicas means nothing without --ray"),
        (["--port", "70000"], 2, "65535"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(cli: Cli, arguments: list[str], code: int, said: str) -> None:
    done = cli("serve", DEMO, *(["--port", 0] if "--port" not in arguments else []), *arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_and_a_missing_extra_say_what_to_do(cli: Cli, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = cli("serve", DEMO, "--port", port)
    assert done.returncode == 3
    assert f"--port {port} of 127.0.0.1 is in use; choose another" in done.stderr
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError(\"No module named 'fastapi'\", name='fastapi')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = cli("serve", DEMO, "--port", 0, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 3
    assert "pip install 'tarflow[serve]'" in done.stderr


def test_httpx_is_served_over_one_connection_that_stays(service: Running) -> None:
    places = set()
    with httpx.Client(base_url=f"http://127.0.0.1:{service.port}") as client:
        for _ in range(3):
            answer = client.get("/v2/health/live")
            assert answer.status_code == 200
            places.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
    assert len(places) == 1

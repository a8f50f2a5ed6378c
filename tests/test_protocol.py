"""The inference protocol on the wire: what is written can be read, and what is malformed is refused with a reason."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tarflow.runtime.flow import Flow
from tarflow.serve.protocol import HEADER, LARGEST_JSON, TYPES, read_asked, write_answer
from tarflow.serve.samples import read_drawing
from tarflow.serve.service import Refusal

from .serving import calling


def request(**inputs: Any) -> dict[str, Any]:
    entry = {"name": "x", "datatype": "INT64", "shape": [2], "data": [1, 2], **inputs}
    return {"inputs": [{key: value for key, value in entry.items() if value is not None}]}


@given(
    word=st.sampled_from(sorted(TYPES)),
    shape=st.lists(st.integers(0, 4), max_size=4),
    seed=st.integers(0, 2**32 - 1),
    binary=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_tensor_that_was_written_is_read_bit_for_bit(word: str, shape: list[int], seed: int, binary: bool) -> None:
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, TYPES[word].itemsize), np.uint8)
    tensor: NDArray[Any] = bits[..., 0].astype(bool) if word == "BOOL" else bits.view(TYPES[word])[..., 0]
    if TYPES[word].kind == "f":
        tensor = np.where(np.isfinite(tensor), tensor, 1).astype(TYPES[word])
    content, headers = write_answer({}, {"x": tensor}, {"x": binary})
    document = json.loads(content[: int(headers.get(HEADER, len(content)))])
    body = json.dumps({"inputs": document["outputs"]}).encode()
    split = len(body)
    asked = read_asked([str(split)] if binary else [], body + (tensor.tobytes() if binary else b""))
    assert asked.tensors["x"].dtype == tensor.dtype
    assert asked.tensors["x"].shape == tensor.shape
    assert asked.tensors["x"].tobytes() == tensor.tobytes()


def test_numbers_json_has_no_word_for_become_null_and_travel_whole_as_binary() -> None:
    tensor = np.array([1.5, np.nan, np.inf], np.float32)
    content, headers = write_answer({}, {"x": tensor}, {"x": False})
    assert json.loads(content)["outputs"][0]["data"] == [1.5, None, None]
    content, headers = write_answer({}, {"x": tensor}, {"x": True})
    assert np.array_equal(np.frombuffer(content[int(headers[HEADER]) :], np.float32), tensor, equal_nan=True)


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"inputs": 3},
        {"inputs": [3]},
        {"inputs": [{}] * 33},
        {"inputs": request()["inputs"] * 2},
        {"parameters": []},
        {"outputs": [{"name": 1}]},
        {"parameters": {"binary_data_output": 1}},
        request(name=""),
        request(datatype="BYTES"),
        request(datatype="FP16"),
        request(shape=[-1]),
        request(shape=[True, 2]),
        request(shape=[2.0]),
        request(shape=[1] * 9),
        request(shape=[2**40]),
        request(shape=[3]),
        request(data=None),
        request(data="12"),
        request(data=["1", "2"]),
        request(data=[1, "x" * 10_000] + [""] * 50_000),  # as one array of text: 2 GB
        request(shape=[0, 2**31 - 1, 2**31 - 1, 2**31 - 1], data=[]),
        request(data=[[1], [2, 3]]),
        request(data=[[1], 2]),
        request(data=[{"a": 1}, 2]),
        request(data=[1, [2]]),
        request(data=[1.5, 2]),
        request(data=[True, False]),
        request(data=[None, 1]),
        request(data=[2**63, 1]),
        request(data=[10**400, 1]),
        request(datatype="UINT64", data=[-1, 1]),
        request(datatype="UINT8", data=[256, 1]),
        request(parameters={"binary_data_size": 16}),
        request(data=None, parameters={"binary_data_size": 16}),
        request(data=None, parameters={"binary_data_size": -1}),
        request(data=None, parameters={"binary_data_size": 8}),
        request(data=None, parameters={"binary_data_size": "16"}),
        request(data=None, parameters={"shared_memory_region": "r"}),
    ],
)
def test_a_malformed_request_is_refused(document: Any) -> None:
    with pytest.raises(Refusal) as refused:
        read_asked([], json.dumps(document).encode())
    assert refused.value.status_code == 400


@pytest.mark.parametrize(
    ("lengths", "body"),
    [
        ([], b""),
        ([], b"{"),
        ([], b'{"inputs": [NaN]}'),
        ([], b"\xff\xfe"),
        ([], b"[" * 100_000),
        ([], b'{"a":' * 50_000),
        (["-1"], b"{}"),
        (["1e3"], b"{}"),
        (["99"], b"{}"),
        ([""], b"{}"),
        (["2", "2"], b"{}"),
        (["0"], b"{}"),
        (["2"], b"{}rest"),
        (["9" * 400], b"{}"),
    ],
)
def test_tricks_with_lengths_and_depth_are_refused(lengths: list[str], body: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        read_asked(lengths, body)
    assert refused.value.status_code == 400


def test_json_that_would_hold_everybody_up_is_refused_unparsed() -> None:
    with pytest.raises(Refusal) as refused:
        read_asked([], b" " * (LARGEST_JSON + 1))
    assert refused.value.status_code == 413


WRONG = [
    ("sample", {"inputs": [{"name": "label", "datatype": "INT64", "shape": [1], "data": [1]}]}, "no input 'label'"),
    ("sample", {"inputs": [{"name": "labels", "datatype": "INT32", "shape": [1], "data": [1]}]}, "expected INT64"),
    ("sample", {"inputs": [{"name": "seed", "datatype": "UINT64", "shape": [2], "data": [1, 2]}]}, "expected UINT64"),
    ("sample", {"inputs": [{"name": "labels", "datatype": "INT64", "shape": [0], "data": []}]}, "empty"),
    ("sample", {"inputs": [{"name": "labels", "datatype": "INT64", "shape": [1], "data": [10]}]}, "out of range"),
    ("sample", {"inputs": [{"name": "labels", "datatype": "INT64", "shape": [1], "data": [-2]}]}, "labels"),
    ("sample", {"parameters": {"n": 257}}, "expected 1 to 256"),
    ("sample", {"parameters": {"priority": 1}}, "unknown"),
    ("sample", {"parameters": {"guidance": -1}}, "guidance"),
    ("sample", {"outputs": [{"name": "latent"}]}, "no output"),
    ("encode", {}, "either images"),
    ("encode", {"inputs": [{"name": "images", "datatype": "FP32", "shape": [1, 8, 8], "data": [0] * 64}]}, "-1, 1, 8"),
    ("encode", {"inputs": [{"name": "images", "datatype": "FP32", "shape": [0, 1, 8, 8], "data": []}]}, "1 to 256"),
    ("encode", {"inputs": [{"name": "images", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [1e39] * 64}]},
     "finite"),
    ("denoise", {}, "needs input 'images'"),
    ("denoise", {"inputs": [{"name": "images", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [0] * 64}],
                 "parameters": {"strength": "much"}}, "strength"),
    ("denoise", {"inputs": [{"name": "images", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [0] * 64}],
                 "parameters": {"strength": 10**400}}, "larger than any number"),
    ("sample", {"inputs": [{"name": "\ud800", "datatype": "INT64", "shape": [1], "data": [1]}]}, "valid string"),
    ("sample", {"parameters": {"\ud800": 1}}, "unknown"),
]  # fmt: skip


@pytest.mark.anyio
async def test_what_a_model_cannot_do_is_refused_by_name(flow: Flow) -> None:
    async with calling(flow) as (client, service):
        for model, body, reason in WRONG:
            answer = await client.post(f"/v2/models/{model}/infer", content=json.dumps(body))
            assert answer.status_code == 400, (model, body, answer.text)
            assert reason in answer.json()["error"]
        for path in ("/v2/models/unet", "/v2/models/sample/versions/2", "/v2/models/..%2f..%2fetc/ready"):
            assert (await client.get(path)).status_code == 404
        assert b"tarflow_batches_total 0.0" in service.metrics.page(), "nothing was computed for any of them"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"labels": "cats"}, "labels: Input should be a valid integer or a valid list; found 'cats'"),
        ({"n": "four"}, "n: Input should be a valid integer; found 'four'"),
        ({"labels": "c" * 1000}, "labels: Input should be a valid integer or a valid list"),
        ({"denoise": "x"}, "denoise: Input should be a valid boolean or a valid number; found 'x'"),
    ],
)
def test_a_field_that_is_wrong_is_named_once_with_what_was_found(body: dict[str, object], said: str) -> None:
    with pytest.raises(Refusal) as refused:
        read_drawing("application/json", json.dumps(body).encode())
    assert refused.value.detail == said

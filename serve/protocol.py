"""The wire of the Open Inference Protocol (KServe v2 over REST): JSON, and the binary tensor extension.

A request is JSON; with ``Inference-Header-Content-Length: L`` its first L bytes are, and what follows are the tensors
whose ``binary_data_size`` says so, row-major and little-endian, in the order of the inputs. Answers likewise.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from .service import Refusal, validation_message

HEADER = "Inference-Header-Content-Length"
TYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"), "UINT8": np.dtype("u1"), "INT32": np.dtype("<i4"), "INT64": np.dtype("<i8"),
    "UINT64": np.dtype("<u8"), "FP32": np.dtype("<f4"), "FP64": np.dtype("<f8"),
}  # fmt: skip
LARGEST_JSON = 4 << 20  # bytes: parsing holds the interpreter, and more belongs into binary tensors
_MOST_PARTS = 1 << 17  # lists and names: an image a row at a time has fewer, and a million of them take seconds
_MOST_NUMBERS = 1 << 40
_KINDS: dict[str, set[type]] = {
    "b": {bool},
    "u": {int},
    "i": {int},
    "f": {int, float},
}  # what JSON may hold for a kind of type


class InputTensor(BaseModel, strict=True):
    """A tensor; ``data`` is left out where ``parameters.binary_data_size`` says that it follows the JSON."""

    name: str = Field(min_length=1, max_length=200)
    datatype: str = Field(json_schema_extra={"enum": list(TYPES)})
    shape: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(max_length=8)
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class OutputTensor(BaseModel, strict=True):
    name: str = Field(min_length=1, max_length=200)
    parameters: dict[str, Any] = {}


class InferRequest(BaseModel, strict=True):
    """What is wanted of a model; see its metadata for the names."""

    id: str | None = Field(None, max_length=200)
    parameters: dict[str, Any] = {}
    inputs: list[InputTensor] = Field([], max_length=32)
    outputs: list[OutputTensor] | None = Field(None, max_length=32)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to infer, read: tensors and parameters by name; outputs with whether they go binary, None for all."""

    identity: str | None
    tensors: Mapping[str, NDArray[Any]]
    parameters: Mapping[str, Any]
    outputs: Mapping[str, bool] | None
    binary: bool  # what is not said otherwise goes binary


def read_asked(lengths: list[str], body: bytes) -> Asked:
    """Read a request; ``lengths`` are the values of HEADER. Raises Refusal for anything malformed."""
    split = _split(lengths, body)
    try:
        request = InferRequest.model_validate(read_object(body[:split], f"; binary tensors need {HEADER}"))
    except ValidationError as error:
        _refuse(validation_message(error.errors()))
    tail, tensors = memoryview(body)[split:], {}
    for entry in request.inputs:
        if entry.name in tensors:
            _refuse(f"input '{entry.name}' is given twice")
        tensors[entry.name], used = _tensor(entry, tail)
        tail = tail[used:]
    if len(tail):
        _refuse(
            f"{len(tail)} bytes follow the last binary tensor; binary_data_size and {HEADER} must add up to the body"
        )
    binary = _flag(request.parameters, "binary_data_output", False)
    outputs = {output.name: _flag(output.parameters, "binary_data", binary) for output in request.outputs or ()}
    own = {name: value for name, value in request.parameters.items() if name != "binary_data_output"}
    return Asked(request.id or None, tensors, own, outputs or None, binary)


def write_answer(
    head: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], binary: Mapping[str, bool]
) -> tuple[bytes, dict[str, str]]:
    """The body of an answer and its headers; ``binary`` says which tensors go so. JSON says null for no number."""
    outputs, tail = [], []
    for name, tensor in tensors.items():
        entry: dict[str, Any] = {"name": name, "datatype": datatype_of(tensor), "shape": list(tensor.shape)}
        if binary[name]:
            tail.append(tensor.tobytes())
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = json_numbers(tensor)
        outputs.append(entry)
    content = json.dumps({**head, "outputs": outputs}, allow_nan=False).encode()
    if not tail:
        return content, {"Content-Type": "application/json"}
    return b"".join([content, *tail]), {"Content-Type": "application/octet-stream", HEADER: str(len(content))}


def json_numbers(tensor: NDArray[Any]) -> list[Any]:
    """A tensor's numbers in one list, None for those that JSON has no word for."""
    flat: list[Any] = tensor.reshape(-1).tolist()
    return flat if np.isfinite(tensor).all() else [value if math.isfinite(value) else None for value in flat]


def datatype_of(array: NDArray[Any]) -> str:
    return next(word for word, known in TYPES.items() if known == array.dtype)


def _split(lengths: list[str], body: bytes) -> int:
    """Where JSON ends."""
    if len(lengths) > 1:
        _refuse(f"{HEADER} is given twice")
    if lengths and not re.fullmatch(r"[0-9]{1,12}", lengths[0]):
        _refuse(f"{HEADER} is '{lengths[0][:20]}'; expected the length of the JSON part in bytes")
    split = int(lengths[0]) if lengths else len(body)
    if split > len(body):
        _refuse(f"{HEADER} is {split}, but the body has {len(body)} bytes")
    if split > LARGEST_JSON:
        _refuse(f"the JSON part has {split} bytes; expected at most {LARGEST_JSON}: send tensors as binary data", 413)
    return split


def read_object(content: bytes, advice: str = "") -> dict[str, Any]:
    """A JSON object. Raises Refusal."""
    if sum(map(content.count, (b"[", b"{", b":"))) > _MOST_PARTS:
        _refuse(f"the body is of more than {_MOST_PARTS:,} lists and names{advice}")
    try:
        found = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        said = "nested too deep" if isinstance(error, RecursionError) else str(error)[:100]
        _refuse(f"the body is no JSON ({said}){advice}")
    return found if isinstance(found, dict) else _refuse("the body is no JSON object")


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")


def _tensor(entry: InputTensor, tail: memoryview) -> tuple[NDArray[Any], int]:
    """One input: its array, and how many bytes of the tail it took."""
    name, datatype, shape = entry.name, entry.datatype, entry.shape
    if datatype not in TYPES:
        _refuse(f"input '{name}' has datatype '{datatype[:20]}'; expected one of {', '.join(TYPES)}")
    if math.prod(max(size, 1) for size in shape) > _MOST_NUMBERS:  # numpy refuses it even if one size is 0
        _refuse(f"input '{name}': its shape is larger than any body")
    dtype = TYPES[datatype]
    if "binary_data_size" not in entry.parameters:
        if set(entry.parameters) & {"shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"}:
            _refuse("shared memory is not served here; send the tensor itself")
        return _from_json(entry.data, dtype, shape, name), 0
    size, needed = entry.parameters["binary_data_size"], math.prod(shape) * dtype.itemsize
    if type(size) is not int or size != needed:
        _refuse(f"input '{name}': binary_data_size is {str(size)[:20]}; its shape takes {needed} bytes")
    if entry.data is not None:
        _refuse(f"input '{name}' has both data and binary_data_size")
    if size > len(tail):
        _refuse(f"input '{name}' has {size} bytes, but {len(tail)} follow: the body is cut short")
    content = tail[:size]
    if datatype == "BOOL" and np.frombuffer(content, np.uint8).max(initial=0) > 1:
        _refuse(f"input '{name}': a BOOL is 0 or 1")
    return np.frombuffer(content, dtype).reshape(shape).copy(), size


def _from_json(data: list[Any] | None, dtype: np.dtype[Any], shape: list[int], name: str) -> NDArray[Any]:
    """Numbers in a flat or nested list, none of which the type would change but by rounding."""
    if data is None:
        _refuse(f"input '{name}' has no data: expected a list of numbers, or binary_data_size")
    flat = _flat(data)
    if flat is None:
        _refuse(f"input '{name}': data is no regular list of numbers")
    if len(flat) != math.prod(shape):
        _refuse(f"input '{name}': data is {len(flat)} numbers; its shape takes {math.prod(shape)}")
    kinds = set(map(type, flat))
    if not kinds <= _KINDS[dtype.kind]:
        _refuse(f"input '{name}': data holds {' and '.join(kind.__name__ for kind in kinds)}; expected {dtype}")
    if flat and dtype.kind in "iu" and not np.iinfo(dtype).min <= min(flat) <= max(flat) <= np.iinfo(dtype).max:
        _refuse(f"input '{name}' holds numbers that {dtype} does not")
    try:
        with np.errstate(over="ignore"):  # becomes infinite, and is refused where that matters
            return np.array(flat, dtype).reshape(shape)
    except OverflowError:
        _refuse(f"input '{name}' holds numbers that {dtype} does not")


def _flat(data: list[Any]) -> list[Any] | None:
    """The numbers of a flat or nested list; None if lists of one level differ in length, or anything else is in it."""
    while data and isinstance(data[0], list):
        length = len(data[0])
        if not all(isinstance(part, list) and len(part) == length for part in data):
            return None
        data = [item for part in data for item in part]
    return data if set(map(type, data)) <= {int, float, bool} else None


def _flag(parameters: dict[str, Any], key: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        _refuse(f"'{key}' is neither true nor false")
    return bool(value)


def _refuse(message: str, status: int = 400) -> NoReturn:
    raise Refusal(status, message)

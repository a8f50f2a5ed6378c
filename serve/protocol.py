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
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .service import Refusal

HEADER = "Inference-Header-Content-Length"
TYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"), "UINT8": np.dtype("u1"), "INT32": np.dtype("<i4"), "INT64": np.dtype("<i8"),
    "UINT64": np.dtype("<u8"), "FP32": np.dtype("<f4"), "FP64": np.dtype("<f8"),
}  # fmt: skip
LARGEST_JSON = 4 << 20  # bytes: parsing holds the interpreter, and more belongs into binary tensors
_MOST_TENSORS = 32
_MOST_AXES = 8
_MOST_NUMBERS = 1 << 40
_KINDS = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}  # what JSON may hold for a kind of type


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
    document = _object(_json(body[:split]), "the body")
    tail, tensors = memoryview(body)[split:], {}
    for entry in _list(document, "inputs"):
        name, tensor, used = _tensor(_object(entry, "an input"), tail)
        if name in tensors:
            _refuse(f"input '{name}' is given twice")
        tensors[name], tail = tensor, tail[used:]
    if len(tail):
        _refuse(
            f"{len(tail)} bytes follow the last binary tensor; binary_data_size and {HEADER} must add up to the body"
        )
    parameters = _object(document.get("parameters", {}), "parameters")
    binary = _flag(parameters, "binary_data_output", False)
    outputs = None
    if document.get("outputs"):
        outputs = {}
        for entry in _list(document, "outputs"):
            output = _object(entry, "an output")
            said = _object(output.get("parameters", {}), "an output's parameters")
            outputs[_text(output, "name")] = _flag(said, "binary_data", binary)
    identity = _text(document, "id") if document.get("id") else None
    own = {name: value for name, value in parameters.items() if name != "binary_data_output"}
    return Asked(identity, tensors, own, outputs, binary)


def write_answer(
    head: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], binary: Mapping[str, bool]
) -> tuple[bytes, dict[str, str]]:
    """The body of an answer and its headers; ``binary`` says which tensors go so. JSON says null for no number."""
    outputs, tail = [], []
    for name, tensor in tensors.items():
        datatype = next(word for word, known in TYPES.items() if known == tensor.dtype)
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(tensor.shape)}
        if binary[name]:
            tail.append(tensor.tobytes())
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = _finite(tensor)
        outputs.append(entry)
    content = json.dumps({**head, "outputs": outputs}, allow_nan=False).encode()
    if not tail:
        return content, {"Content-Type": "application/json"}
    return b"".join([content, *tail]), {"Content-Type": "application/octet-stream", HEADER: str(len(content))}


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


def _json(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        said = "nested too deep" if isinstance(error, RecursionError) else str(error)[:100]
        return _refuse(f"the body is no JSON ({said}); binary tensors need {HEADER}")


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")


def _tensor(entry: dict[str, Any], tail: memoryview) -> tuple[str, NDArray[Any], int]:
    """One input: its name, its array, and how many bytes of the tail it took."""
    name, datatype = _text(entry, "name"), _text(entry, "datatype")
    if datatype not in TYPES:
        _refuse(f"input '{name}' has datatype '{datatype[:20]}'; expected one of {', '.join(TYPES)}")
    dtype, shape = TYPES[datatype], _shape(entry, name)
    count = math.prod(shape)
    parameters = _object(entry.get("parameters", {}), f"input '{name}': parameters")
    if "binary_data_size" not in parameters:
        if set(parameters) & {"shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"}:
            _refuse("shared memory is not served here; send the tensor itself")
        return name, _from_json(entry.get("data"), dtype, shape, name), 0
    size = parameters["binary_data_size"]
    if type(size) is not int or size != count * dtype.itemsize:
        _refuse(f"input '{name}': binary_data_size is {str(size)[:20]}; its shape takes {count * dtype.itemsize} bytes")
    if "data" in entry:
        _refuse(f"input '{name}' has both data and binary_data_size")
    if size > len(tail):
        _refuse(f"input '{name}' has {size} bytes, but {len(tail)} follow: the body is cut short")
    content = tail[:size]
    if datatype == "BOOL" and np.frombuffer(content, np.uint8).max(initial=0) > 1:
        _refuse(f"input '{name}': a BOOL is 0 or 1")
    return name, np.frombuffer(content, dtype).reshape(shape).copy(), size


def _shape(entry: dict[str, Any], name: str) -> list[int]:
    shape = _list(entry, "shape", _MOST_AXES)
    if not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        _refuse(f"input '{name}': a shape is a list of sizes, 0 or more")
    if math.prod(max(size, 1) for size in shape) > _MOST_NUMBERS:  # numpy refuses it even if one size is 0
        _refuse(f"input '{name}': its shape is larger than any body")
    return shape


def _from_json(data: Any, dtype: np.dtype[Any], shape: list[int], name: str) -> NDArray[Any]:
    """Numbers in a flat or nested list, none of which the type would change but by rounding."""
    if not isinstance(data, list):
        _refuse(f"input '{name}' has no data: expected a list of numbers, or binary_data_size")
    flat = _flat(data)
    if flat is None:
        _refuse(f"input '{name}': data is no regular list of numbers")
    if len(flat) != math.prod(shape):
        _refuse(f"input '{name}': data is {len(flat)} numbers; its shape takes {math.prod(shape)}")
    try:
        found = np.array(flat) if flat else np.zeros(0, dtype)
        if found.dtype.kind == "f" and dtype.kind == "u" and set(map(type, flat)) == {int}:
            found = np.array(flat, object).astype(np.uint64)  # numpy has no type for both signs of 64 bits
    except (ValueError, OverflowError):
        _refuse(f"input '{name}': data holds numbers that {dtype} does not")
    if found.dtype.kind not in _KINDS[dtype.kind]:
        _refuse(f"input '{name}': data is {found.dtype}; expected {dtype}")
    if found.size and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if int(found.min()) < limits.min or int(found.max()) > limits.max:
            _refuse(f"input '{name}' holds numbers that {dtype} does not")
    with np.errstate(over="ignore"):  # becomes infinite, and is refused where that matters
        return found.astype(dtype).reshape(shape)


def _flat(data: list[Any]) -> list[Any] | None:
    """The numbers of a flat or nested list; None if lists of one level differ in length, or anything else is in it."""
    while data and isinstance(data[0], list):
        length = len(data[0])
        if not all(isinstance(part, list) and len(part) == length for part in data):
            return None
        data = [item for part in data for item in part]
    return data if set(map(type, data)) <= {int, float, bool} else None


def _finite(tensor: NDArray[Any]) -> list[Any]:
    flat = tensor.reshape(-1)
    if tensor.dtype.kind != "f" or np.isfinite(flat).all():
        return list(flat.tolist())
    return [value if math.isfinite(value) else None for value in flat.tolist()]


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(f"{what} is no JSON object")
    return dict(value)


def _list(entry: dict[str, Any], key: str, most: int = _MOST_TENSORS) -> list[Any]:
    value = entry.get(key, [])
    if not isinstance(value, list) or len(value) > most:
        _refuse(f"'{key}' is no list, or one of more than {most}")
    return list(value)


def _text(entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= 200:
        _refuse(f"'{key}' is no text, or empty, or very long")
    return str(value)


def _flag(parameters: dict[str, Any], key: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        _refuse(f"'{key}' is neither true nor false")
    return bool(value)


def _refuse(message: str, status: int = 400) -> NoReturn:
    raise Refusal(status, message)

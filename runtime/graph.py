"""What a graph of a stranger may do: read weights from one file, and compute with the operators that exports write.

A reader of as much of ONNX's wire format (protobuf) as that takes. It knows every place where a node, a tensor or an
opset may stand, steps over all else, and looks at no byte twice. Sub-graphs wait in a list: however deep they nest,
nothing recurses.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .document import short
from .errors import BundleError
from .manifest import AGAIN, WEIGHTS

_LARGEST = 256 << 20  # bytes; an export's graphs have kilobytes, and a causal mask of T * T bytes
_MOST_FIELDS = 1 << 18  # an export's graphs have some hundred for each layer
_LONGEST_TEXT = 256  # bytes; nothing that is accepted is as long
_INNER = {  # by kind of message: which of its fields hold which others
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 9: "opset", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {},
    "opset": {},
}
_NODE_OPERATOR, _NODE_DOMAIN, _OPSET_DOMAIN, _KEY, _VALUE = 4, 7, 1, 1, 2  # numbers of fields
_TENSOR_SIZE, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_PLACE = 1, 2, 8, 13
_PLACE = ("location", "offset", "length")  # all that a tensor may say about where its numbers are
_NUMBER, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # how a field is written; other ways went out of use
_OWN = "com.microsoft:"  # ONNX Runtime's own operators, of which some versions trust what they are given
_NATURAL = re.compile(r"[0-9]{1,18}")
Span = tuple[int, int, int]  # a field's number, and where its bytes begin and end
Number = tuple[int, int]  # a field's number, and the number that it is


@functools.cache
def operators() -> frozenset[str]:
    """All that a graph may compute with, as domain:operator; ONNX's own domain is ai.onnx."""
    lines = Path(__file__).with_name("operators.txt").read_text().splitlines()
    return frozenset(line for line in lines if not line.startswith("#"))


def check_graph(path: Path, weights_size: int, for_cuda: bool = False) -> None:
    """Raise BundleError for a graph that reads what no hash covers, or computes with what no export writes.

    Every operator, in functions and sub-graphs too, is among :func:`operators`, every opset of a domain there, ONNX
    Runtime's own only in a graph ``for_cuda``. Every tensor's numbers are in the graph, or among the ``weights_size``
    bytes of the weights file beside it.
    """
    size = path.stat().st_size
    if size > _LARGEST:
        raise BundleError(f"'{path}' has {size} bytes; expected a graph of {_LARGEST} at most: {AGAIN}")
    graph = _Graph(path.read_bytes())
    known = {operator for operator in operators() if for_cuda or not operator.startswith(_OWN)}
    try:
        for kind, fields, _ in graph.messages():
            if kind == "node":
                _check_operator(known, graph.text(fields, _NODE_DOMAIN), graph.text(fields, _NODE_OPERATOR))
            elif kind == "opset":
                _check_domain(known, graph.text(fields, _OPSET_DOMAIN))
            elif kind == "tensor":
                _check_place(graph.places(fields), weights_size)
    except _Refused as refused:
        raise BundleError(f"'{path}' {refused}; {AGAIN}") from None


class Weight(NamedTuple):
    """A tensor that a graph reads from the weights file: ONNX's number of its type, its shape, its bytes there."""

    type: int
    shape: tuple[int, ...]
    start: int
    length: int


def weights_of(path: Path) -> dict[str, Weight]:
    """The weights that a graph reads, by the names it has for them. It was checked before."""
    graph, found = _Graph(path.read_bytes()), {}
    for kind, fields, numbers in graph.messages():
        if kind == "tensor" and (place := graph.places(fields)):
            shape = tuple(value for number, value in numbers if number == _TENSOR_SIZE)
            type_ = dict(numbers).get(_TENSOR_TYPE, 0)
            name = graph.text(fields, _TENSOR_NAME)
            found[name] = Weight(type_, shape, int(place["offset"]), int(place["length"]))
    return found


class _Refused(Exception):
    """What is wrong with a graph, to be said behind its name."""


class _Graph:
    """The messages in a graph's bytes. Raises _Refused where they are no such thing."""

    def __init__(self, content: bytes) -> None:
        self._content, self._left = content, _MOST_FIELDS

    def messages(self) -> Iterator[tuple[str, list[Span], list[Number]]]:
        """Every message that matters: its kind, its fields that are bytes, and those that are whole numbers."""
        waiting = [("model", 0, len(self._content))]
        while waiting:
            kind, start, end = waiting.pop()
            numbers: list[Number] = []
            fields, inner = self._fields(start, end, numbers), _INNER[kind]
            if inner:
                waiting += [(inner[number], start, end) for number, start, end in fields if number in inner]
            yield kind, fields, numbers

    def text(self, fields: list[Span], number: int) -> str:
        """A field that is text; "" where there is none. Twice the same would be for others to choose from."""
        found = [self._content[start : min(end, start + _LONGEST_TEXT)] for n, start, end in fields if n == number]
        if len(found) > 1:
            raise _Refused(f"is damaged: it says {short(found[0])} and {short(found[1])} in one place")
        return found[0].decode("utf-8", "replace") if found else ""

    def places(self, fields: list[Span]) -> dict[str, str]:
        """What a tensor says about where its numbers are."""
        said: dict[str, str] = {}
        for number, start, end in fields:
            if number == _TENSOR_PLACE:
                entry = self._fields(start, end, [])
                key = self.text(entry, _KEY)
                if key in said or key not in _PLACE:
                    raise _Refused(f"is damaged: {short(key)} of a tensor; expected {', '.join(_PLACE)}, once each")
                said[key] = self.text(entry, _VALUE)
        return said

    def _fields(self, at: int, end: int, numbers: list[Number]) -> list[Span]:
        """The fields of a message that are bytes: texts, messages, lists. Whole numbers go to ``numbers``."""
        content, found, seen = self._content, [], 0
        try:
            while at < end:
                seen += 1
                tag = content[at]
                at += 1
                if tag > 127:
                    tag, at = self._number(at - 1)
                encoding = tag & 7 if tag < 1 << 32 else -1
                if encoding == _BYTES:
                    length = content[at]
                    at += 1
                    if length > 127:
                        length, at = self._number(at - 1)
                    found.append((tag >> 3, at, at + length))
                    at += length
                elif encoding == _NUMBER:
                    value, at = (content[at], at + 1) if content[at] < 128 else self._number(at)
                    numbers.append((tag >> 3, value))
                elif encoding in (_EIGHT_BYTES, _FOUR_BYTES):
                    at += 8 if encoding == _EIGHT_BYTES else 4
                else:
                    raise _Refused(f"is no ONNX graph, or damaged: a field before byte {at} is of no known kind")
        except IndexError:
            at = end + 1
        self._left -= seen
        if at > end or self._left < 0:
            what = f"something ends behind byte {end}, where it should" if at > end else "it has too many fields"
            raise _Refused(f"is no ONNX graph, or damaged: {what}")
        return found

    def _number(self, at: int) -> tuple[int, int]:
        """Seven bits a byte, the lowest first; and where it ends."""
        value, shift = 0, 0
        while True:
            byte = self._content[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value, at
            if shift > 63:
                raise _Refused(f"is no ONNX graph, or damaged: a number before byte {at} does not end")


def _check_operator(known: set[str], domain: str, name: str) -> None:
    operator = f"{domain or 'ai.onnx'}:{name}"
    if operator not in known:
        raise _Refused(f"computes with {short(operator)}, which no export writes: it was not opened")


def _check_domain(known: set[str], domain: str) -> None:
    if domain and domain not in {operator.partition(":")[0] for operator in known}:
        raise _Refused(f"has operators of the domain {short(domain)}, which no export writes: it was not opened")


def _check_place(said: dict[str, str], weights_size: int) -> None:
    """Refuse a tensor whose numbers are anywhere but in the graph or inside the weights file."""
    if not said:
        return
    location = said.get("location")
    if location != WEIGHTS:
        raise _Refused(
            f"reads weights from {short(location)}; expected '{WEIGHTS}', and nothing else: it was not opened"
        )
    offset, length = (said.get(key, "") for key in ("offset", "length"))
    if not (_NATURAL.fullmatch(offset) and _NATURAL.fullmatch(length)):
        raise _Refused(f"is damaged: it reads {short(length)} bytes of weights at {short(offset)}; expected numbers")
    if int(offset) + int(length) > weights_size:
        raise _Refused(f"reads {length} bytes from byte {offset} on of '{WEIGHTS}', which has {weights_size}")

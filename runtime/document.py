"""JSON documents: written whole or not at all; read as what may be damaged, edited or made to deceive: typed, bounded,
and every refusal names the place.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .errors import BundleError, Remedy, limit_of_machine
from .files import replacing

_LARGEST, _LARGEST_INTEGER = sys.float_info.max, 2**63 - 1
_DEEPEST = 64  # levels of a document; ours have five
_UNSAFE = re.compile(r"[\\:\0\ud800-\udfff]")  # half a surrogate pair too: JSON may hold one, a file system not
_HEX = re.compile(r"[0-9a-f]{64}")
T = TypeVar("T")


class Reader(NamedTuple):
    """Typed access to a JSON document that names the place when something is wrong.

    ``noun`` is what the document is, ``advice`` what to do about a damaged one, ``remedy`` the same as an operation.
    """

    source: str
    noun: str
    advice: str
    remedy: Remedy | None = None

    def wrong(self, what: str) -> BundleError:
        return self._refused(f"'{self.source}': {what}. The {self.noun} is damaged or was edited; {self.advice}")

    def parse(self, content: bytes) -> dict[str, Any]:
        """The document, whose outermost value is an object. Numbers are finite, nesting is shallow."""
        try:
            document = json.loads(content.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
            if _depth(document) > _DEEPEST:
                raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            said = str(error)[:120]
            raise self._refused(f"'{self.source}' is damaged: it cannot be parsed ({said}); {self.advice}") from None
        return self.typed(document, dict, "the document")

    def read(self, path: Path, most: int) -> dict[str, Any]:
        """The document in a file of at most so many bytes."""
        return self.parse(self.content(path, most))

    def content(self, path: Path, most: int) -> bytes:
        """What a file of at most so many bytes holds."""
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise self.wrong("it is no regular file")
        try:
            with path.open("rb") as file:
                content = file.read(most + 1)
        except OSError as error:
            refused = self._refused(f"'{self.source}' cannot be read: {error.strerror}; {self.advice}")
            raise limit_of_machine(error, f"reading '{self.source}'") or refused from None
        if len(content) > most:
            raise self.wrong(f"it is larger than {most >> 20} MiB; a {self.noun} is not")
        return content

    def versioned(self, path: Path, most: int, format: str, schema: int) -> dict[str, Any]:
        """The document in a file of this format and schema version."""
        document = self.read(path, most)
        self.one_of(document, "format", (format,))
        if self.natural(document, "schema", 1) != schema:
            raise self.wrong(f"'schema' is {short(document['schema'])}; this version reads {schema}")
        return document

    def typed(self, value: object, kind: type[T], where: str) -> T:
        if not isinstance(value, kind):
            raise self.wrong(f"{where} is {type(value).__name__}; expected {kind.__name__}")
        return value

    def get(self, mapping: Mapping[str, Any], key: str, kind: type[T]) -> T:
        if key not in mapping:
            raise self.wrong(f"'{key}' is missing")
        return self.typed(mapping[key], kind, f"'{key}'")

    def natural(self, mapping: Mapping[str, Any], key: str, least: int, most: int = _LARGEST_INTEGER) -> int:
        value = self.get(mapping, key, int)
        if isinstance(value, bool) or not least <= value <= most:
            bound = f"of {least} or more" if most == _LARGEST_INTEGER else f"from {least} to {most}"
            raise self.wrong(f"'{key}' is {short(value)}; expected an integer {bound}")
        return value

    def one_of(self, mapping: Mapping[str, Any], key: str, names: tuple[str, ...]) -> str:
        value = self.get(mapping, key, str)
        if value not in names:
            raise self.wrong(f"'{key}' is {short(value)}; expected one of {', '.join(names)}")
        return value

    def number(self, mapping: Mapping[str, Any], key: str, least: float = -_LARGEST) -> float:
        """A number of at least so much; integers count as numbers, true and false do not."""
        value = mapping.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= _LARGEST:
            bound = "" if least == -_LARGEST else f" of {least:g} or more"
            raise self.wrong(f"'{key}' is {short(value)}; expected a number{bound}")
        return float(value)

    def numbers(self, mapping: Mapping[str, Any], key: str, least: float = -_LARGEST) -> tuple[float, ...]:
        """A list of numbers, each at least so large."""
        return tuple(self.number({key: item}, key, least) for item in self.get(mapping, key, list))

    def integers(self, mapping: Mapping[str, Any], key: str, least: int) -> tuple[int, ...]:
        """A list of integers, each at least so large."""
        items = self.get(mapping, key, list)
        if not all(type(item) is int and item >= least for item in items):
            raise self.wrong(f"'{key}' is {short(items)}; expected a list of integers of {least} or more")
        return tuple(items)

    def hash(self, value: str) -> str:
        if not _HEX.fullmatch(value):
            raise self.wrong(f"'{value[:70]}' is no SHA-256 in lower-case hexadecimal")
        return value

    def confined(self, name: str) -> str:
        """A relative path of plain components, with forward slashes, that stays inside the bundle."""
        if {"", ".", ".."} & set(name.split("/")) or _UNSAFE.search(name):
            raise BundleError(
                f"'{self.source}' names the file {short(name)}, which is not a plain relative path inside the "
                "bundle; it was not opened"
            )
        return name

    def _refused(self, message: str) -> BundleError:
        return BundleError(message, remedy=self.remedy)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is no number that a float64 holds")
    return number


def _depth(document: object) -> int:
    """How deep a JSON document nests, without recursion."""
    depth, level = 0, [document]
    while level:
        depth += 1
        lists = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, (dict, list))]
        level = [x for inner in lists for x in inner]
    return depth


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


def short(value: object) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."

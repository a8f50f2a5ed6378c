"""What is recorded: a name, and the SHA-256 of exact bytes, or a short value of a JSON document as it stands."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Found = Iterator[tuple[str, str]]
_MEASURED = re.compile(r"seconds|memory|_per_second|^(python|platform|exporter|packages|versions)$")
_VERSION = re.compile(r"\d+\.\d+\.\d+[\w.+]*")


def digest(*parts: bytes | NDArray[Any]) -> str:
    """SHA-256 of exact bytes; the type and shape of an array count too."""
    found = hashlib.sha256()
    for part in parts:
        if not isinstance(part, bytes):
            found.update(f"{part.dtype} {part.shape} ".encode())
        found.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return found.hexdigest()


def under(place: str, found: Found) -> Found:
    """The same entries, in a place."""
    return ((f"{place}/{name}", value) for name, value in found)


def keys_and_values(document: object, place: str = "") -> Found:
    """The leaves of a JSON document. Of times, memory and versions, which are never the same, the keys alone."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield from keys_and_values("measured" if _MEASURED.search(key) else value, f"{place}.{key}".lstrip("."))
    elif isinstance(document, list) and document and isinstance(document[0], dict):
        for number, value in enumerate(document):
            yield from keys_and_values(value, f"{place}[{number}]")
    else:
        text = _VERSION.sub("version", json.dumps(document))
        yield place, text if len(text) <= 64 else digest(text.encode())


def keys(document: object) -> Found:
    """The keys alone, for documents that measure."""
    return ((key, "there") for key, _ in keys_and_values(document))


def files(folder: Path) -> Found:
    """What lies in a folder, locks apart. Manifests and logs are read as JSON, of texts versions are left out."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"):
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        if path.name == "manifest.json":
            yield from under(name, keys_and_values(json.loads(content)))
        elif path.suffix == ".jsonl":
            yield from under(name, keys_and_values([json.loads(line) for line in content.splitlines()]))
        elif path.suffix == ".md":
            yield name, digest(_VERSION.sub("version", content.decode()).encode())
        else:
            yield name, digest(content)


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """A line for each entry that the two do not have alike."""
    return [
        f"{name}: {before.get(name, 'not there')} before, {after.get(name, 'not there')} now"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]

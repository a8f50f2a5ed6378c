"""What the stand-in for CUDA wrote down: a line a call, as ``src/state.hpp`` says."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

NOTE = "note"
LAUNCHES = ("kernel", "product", "cublas", "cudaMemcpyAsync", "cudaMemcpy2DAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaMemset")


@dataclass(frozen=True, slots=True)
class Event:
    """One call. ``captured``: a node of a graph. ``bad``: what is wrong with it during a capture, or nothing."""

    thread: int
    call: str
    values: dict[str, str]
    captured: bool
    bad: str


def read(path: Path | None = None) -> list[Event]:
    """All that was written so far, by default in this process."""
    lines = (path or Path(os.environ["STANDIN_LOG"])).read_text().splitlines()
    return [event(line) for line in lines]


def event(line: str) -> Event:
    thread, call, *words = line.split(" ")
    values = dict(word.split("=", 1) for word in words if "=" in word)
    return Event(int(thread), call, values, "captured" in words, values.pop("bad", ""))


def note(text: str) -> None:
    """A line of its own, from this process, for :func:`part` to find."""
    ctypes.CDLL("libcudart.so.13").standin_note(f"{NOTE} at={text}".encode())


def part(events: Iterable[Event], text: str) -> list[Event]:
    """What happened between a note and the next."""
    found, inside = [], False
    for one in events:
        if one.call == NOTE:
            inside = one.values["at"] == text
        elif inside:
            found.append(one)
    return found


def calls(events: Iterable[Event], *names: str) -> int:
    return sum(one.call in names for one in events)


def allocated(events: Iterable[Event]) -> int:
    """Bytes of device memory that are held at the end."""
    signs = {"allocated": 1, "released": -1}
    return sum(signs.get(one.call, 0) * int(one.values.get("bytes", 0)) for one in events)


def bad(events: Iterable[Event]) -> Counter[str]:
    """What CUDA would not have let happen, by call and reason."""
    return Counter(f"{one.call}, {one.bad}" for one in events if one.bad)


def absent(events: Iterable[Event]) -> list[str]:
    """Calls that nothing stood in for."""
    return sorted({one.values["call"] for one in events if one.call == "absent"})

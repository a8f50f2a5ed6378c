"""What the commands share: where results and messages go, and how files are read."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.bundle import Bundle
from ..runtime.errors import InputError
from ..runtime.hidden import restore
from .messages import flags_in

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


DEMO = Path(__file__).parent.parent / "demo"
DEFAULT_BUNDLE = Path("tarflow-bundle")


def default_bundle() -> Path:
    """./tarflow-bundle if it is there, else the demo that ships with the package."""
    restore(DEFAULT_BUNDLE)
    return DEFAULT_BUNDLE if DEFAULT_BUNDLE.exists() else DEMO


def emit(**document: Any) -> None:
    """One JSON document on stdout, by its keys. Paths become strings, numbers JSON has no word for null."""
    print(json.dumps(_plain(document), indent=1, allow_nan=False, default=os.fspath))


def emit_line(**document: Any) -> None:
    """The same on one line, at once: for whoever waits for it while the command goes on."""
    print(json.dumps(_plain(document), allow_nan=False, default=os.fspath), flush=True)


def identity(bundle: Bundle) -> dict[str, Any]:
    """How a document says which bundle it is about."""
    return {"bundle": bundle.folder, "bundle_hash": bundle.hash}


def ready_streams() -> None:
    """Let streams that are closed swallow what is said, and the others escape what they cannot encode, names say."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file opened would be a stream
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(message: str) -> None:
    """A line for people, on stderr, if there is still anybody."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


class Notes(logging.Handler):
    """Says what the library logs in the words of the command line."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"tarflow: {flags_in(record.getMessage())}")


def tell_of_classes(bundle: Bundle, labels: Sequence[int] | None) -> None:
    """Say that samples come from the null class, where there are others and none was asked for."""
    classes = bundle.manifest.config.classes
    if classes and labels is None:
        say(f"no labels given: drawing from the null class; --labels 0-{classes - 1} deals out all classes")


def few(indices: Sequence[object]) -> str:
    """The first of some indices, and how many more there are."""
    return ", ".join(map(str, indices[:10])) + (f" and {len(indices) - 10} more" if len(indices) > 10 else "")


def show(rows: list[tuple[str, str]], title: str | None = None) -> None:
    """A two-column list on stdout."""
    if title:
        print(title)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def numbers(text: str) -> list[int]:
    """The numbers of "1,8,32"; none if it is not that."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        return []


def parse_sizes(batch: str) -> list[int]:
    """Batch sizes from "1,8,32". Raises InputError."""
    sizes = numbers(batch)
    if not sizes:
        raise InputError.of("batch", f"'{batch}'", "a list of numbers, such as 1,8,32")
    if min(sizes) < 1:
        raise InputError.of("batch", f"'{batch}'", "sizes of 1 or more")
    return sizes


def read_array(path: Path, what: str) -> NDArray[Any]:
    """A .npy file, or the array called ``what`` of a .npz file, never unpickled. Raises InputError."""
    from ..runtime.claims import read_npy, read_npz

    if not path.is_file():
        raise InputError(f"no file '{path}' for {what}; expected an array saved with numpy.save")
    try:
        return read_npz(path, what) if path.suffix.lower() == ".npz" else read_npy(path)
    except (ValueError, OSError) as error:
        raise InputError(f"'{path}' is not an .npy array ({str(error)[:100]}); save {what} with numpy.save") from None


def parse_labels(text: str | None, first: int, count: int) -> NDArray[np.int64] | None:
    """``3``, ``0-9``, ``1,4,7-9``, ``-1`` (the null class) or ``y.npy`` -> one label a sample.

    Ranges and lists are dealt out by sample index, so that sample i has the same label whoever draws it.
    """
    import numpy as np

    if text is None:
        return None
    if text.endswith(".npy"):
        labels = read_array(Path(text), "labels")
        if labels.ndim != 1 or len(labels) != count or labels.dtype.kind not in "iu":
            found = f"'{text}' holds {labels.dtype} of shape {labels.shape}"
            raise InputError(f"{found}; expected {count} integers, one a sample")
        return labels
    choices = label_choices(text)
    return np.array(choices, np.int64)[(first % len(choices) + np.arange(count)) % len(choices)]


def label_choices(text: str, what: str = "labels") -> list[int]:
    """The classes that a text such as ``1,4,7-9`` deals out in turn. Raises InputError."""
    choices: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:(\d+)-(\d+)|(-?\d+))\s*", part)
        if not match:
            file = " or y.npy" if what == "labels" else ""
            expected = f"a class (3), a range (0-9), a list (1,4,7){file}"
            raise InputError(f"{what} '{text}' are not understood; expected {expected}", field=what)
        low, high, single = match.groups()
        if max(map(len, filter(None, match.groups()))) > 9:
            raise InputError(f"{what} '{part}' are out of range; no model has that many classes")
        span = range(int(low), int(high) + 1) if single is None else range(int(single), int(single) + 1)
        if not span or len(span) > 1_000_000:
            raise InputError(f"{what} '{part}' are an empty or endless range; write the smaller class first, as in 0-9")
        choices += span
    return choices


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's
        return _plain(value.tolist())
    return None if isinstance(value, float) and not isfinite(value) else value

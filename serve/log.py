"""One JSON object a line on stderr, where that can be written; where not, nothing waits for it and nothing fails."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import select
import sys
from datetime import UTC, datetime
from typing import Any

_STDERR = 2
_AT_ONCE = 4096  # bytes that a pipe takes without waiting if it takes any: PIPE_BUF


def log(event: str, level: str = "info", **fields: Any) -> None:
    """Write a line: when, what, and the fields."""
    stamp = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = json.dumps({"time": stamp, "level": level, "event": event, **fields}, default=str) + "\n"
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(line)


class Lines(logging.Handler):
    """What libraries log, in the same lines."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"message": record.getMessage()[:500]}
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = repr(record.exc_info[1])[:500]
        log(record.name, record.levelname.lower(), **fields)


def keep_stderr_from_deciding() -> None:
    """From now on what this process writes to stderr is lost where it cannot be written at once: on a full disk, in a
    pipe that nobody reads, in one whose reader has gone, without a stderr at all.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= _STDERR:  # else the first socket would be stderr to libraries
        pass
    os.close(number)
    sys.stderr = io.TextIOWrapper(_Unwaiting(), "utf-8", "backslashreplace", write_through=True)


class _Unwaiting(io.RawIOBase):
    """The bytes of stderr."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return _STDERR

    def isatty(self) -> bool:
        return os.isatty(_STDERR)

    def write(self, content: Any) -> int:
        with contextlib.suppress(OSError):
            for start in range(0, len(content), _AT_ONCE):
                if not select.select([], [_STDERR], [], 0)[1]:
                    break
                os.write(_STDERR, content[start : start + _AT_ONCE])
        return len(content)

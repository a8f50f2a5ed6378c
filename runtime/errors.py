"""What goes wrong, by who can mend it. Every message says what was found, what was expected, what would help.

A message speaks of fields by the names they have in Python, in backquotes: "`batch_size` is 0; expected 1 or more".
What would help is a :class:`Remedy`, which a door that has a command for it can spell out. The command line writes
``--batch-size`` and the command to type; HTTP its own names; the library neither.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

_LONGEST_REASON = 300  # characters of a reason told in passing
_LIMITS = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN)
_LIMITS_IN_WORDS = re.compile(  # of engines and libraries, whose errors carry no number
    r"bad_alloc|(failed|unable) to allocate|out of memory|pthread_create|start new thread|failed to map segment|"
    r"cannot allocate memory|too many open files|resource temporarily unavailable",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Remedy:
    """Something to do, as an operation of this package: ``export``, ``build``, ``calibrate`` ... and what to give it.

    ``arguments`` are fields of that operation and their values; None where the reader knows it better.
    """

    operation: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


class TarflowError(Exception):
    """Any error this package raises on purpose. ``exit_code`` is what the command line returns.

    ``field`` names what was wrong, ``found`` and ``expected`` say it apart from the message; ``remedy`` is what the
    message's last words advise. All are None where there is no such thing.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        found: object = None,
        expected: str | None = None,
        remedy: Remedy | None = None,
    ) -> None:
        super().__init__(message)
        self.field, self.found, self.expected, self.remedy = field, found, expected, remedy

    @classmethod
    def of(cls, field: str, found: object, expected: str, advice: str = "", remedy: Remedy | None = None) -> Self:
        """The error of one field: "`field` is found; expected this: advice"."""
        message = f"`{field}` is {found}; expected {expected}" + (f": {advice}" if advice else "")
        return cls(message, field=field, found=found, expected=expected, remedy=remedy)


class CheckFailed(TarflowError):
    """A result was computed and found outside its tolerance."""

    exit_code = 1


class InputError(TarflowError, ValueError):
    """The caller asked for something that cannot be done: a label, a shape, a number out of range."""

    exit_code = 2


class MachineError(TarflowError):
    """The machine lacks something: a package, a provider, memory, disk."""

    exit_code = 3


class BundleError(TarflowError):
    """A file that is damaged, foreign, or made for another version."""

    exit_code = 4


def limit_of_machine(error: Exception, doing: str) -> MachineError | None:
    """The error of a machine that has no more memory, threads or open files for ``doing`` this; None for any other."""
    text = str(error).strip() or "out of memory"
    found = _LIMITS_IN_WORDS.search(text)
    if not found and not isinstance(error, MemoryError) and getattr(error, "errno", None) not in _LIMITS:
        return None
    said = text[found.start() if found else 0 :].splitlines()[0][:_LONGEST_REASON]
    return MachineError(
        f"a limit of this machine or process was reached while {doing}: {said}; allow it more memory, threads or open "
        "files (ulimit -a shows what it may have), or use fewer `threads`"
    )


def briefly(error: Exception) -> str:
    """The reason in a message, without its advice: the lines of its list if it has one, else its first clause."""
    first, *more = str(error).splitlines()
    listed = [line.strip() for line in more if line.startswith("  ")]
    text = ", ".join(listed) if listed else first.split("; ")[0]
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."

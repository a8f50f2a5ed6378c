"""The library's errors in the command line's words: fields become flags, what would help becomes a command to type."""

from __future__ import annotations

import re
import shlex
from typing import Any

from ..runtime.errors import Remedy, TarflowError

_FLAGS = {  # of fields whose flag is not their name with dashes
    "scale": "--guidance",
    "what": "--guide",
    "denoise": "--denoise-strength",
    "check": "--no-verify",
    "largest_n": "--max-n",
    "largest_body": "--max-body",
    "folder": "-o",
    "gpus": "--gpu",
    "tasks": "--models",
}
_ARGUMENTS = ("bundle", "checkpoint", "images")  # named by their place, in this order, not by a flag
_NEEDED = {  # in capitals, what only the reader knows
    "export": {"checkpoint": "CHECKPOINT", "folder": "BUNDLE"},
    "verify": {"bundle": "BUNDLE"},
    "bisect": {"bundle": "BUNDLE"},
}
_FIELD = re.compile(r"`(\w+)`")


def spell(error: TarflowError) -> str:
    """What the command line prints for an error."""
    text = flags_in(str(error))
    return text if error.remedy is None else f"{text}: {command(error.remedy)}"


def flags_in(message: str) -> str:
    """A message with the fields it names in backquotes spelled as flags."""
    return _FIELD.sub(lambda found: flag(found[1]), message)


def flag(field: str) -> str:
    """How a field is given here."""
    if field in _ARGUMENTS:
        return field
    return _FLAGS.get(field, "--" + field.replace("_", "-"))


def command(remedy: Remedy) -> str:
    """The command to type; what only its reader knows stands in capitals."""
    given = _NEEDED.get(remedy.operation, {}) | {k: v for k, v in remedy.arguments.items() if v is not None}
    words = ["tarflow", remedy.operation]
    words += [_word(given.pop(place)) for place in _ARGUMENTS if place in given]
    for field, value in given.items():
        if value is True:
            words.append(flag(field))
        elif value is not False:
            words += [flag(field), _word(value)]
    return " ".join(words)


def _word(value: Any) -> str:
    """A value as a shell takes it: tuples with commas, what needs quotes in quotes."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else shlex.quote(str(value))

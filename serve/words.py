"""The library's errors in HTTP's words: fields have the names that they have in a body or a query."""

from __future__ import annotations

import re

from ..runtime.errors import TarflowError

_NAMES = {"scale": "guidance", "what": "guide"}  # of fields that are called otherwise here
_FIELD = re.compile(r"`(\w+)`")


def http_words(error: TarflowError, **names: str) -> str:
    """What a client is told of an error; ``names`` are fields' names where it did not ask by the usual ones."""
    known = _NAMES | names
    return _FIELD.sub(lambda found: known.get(found[1], found[1]), str(error))

"""Values of fields, by their types: what is of another is an InputError, with the field's name. Needs no numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Integral, Real

from .errors import InputError

_LONGEST = 60  # characters of a value that is told


def is_flag(value: object) -> bool:
    """Whether this is True or False, NumPy's included."""
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")


def is_whole(value: object) -> bool:
    """Whether this is an integer, NumPy's included; True and False are none."""
    return isinstance(value, Integral) and not is_flag(value)


def is_number(value: object) -> bool:
    """Whether this is a real number, NumPy's included; True and False are none."""
    return isinstance(value, Real) and not is_flag(value)


def is_text(value: object) -> bool:
    return isinstance(value, str)


_KINDS: dict[str, Callable[[object], bool]] = {
    "True or False": is_flag,
    "an integer": is_whole,
    "a number": is_number,
    "a string": is_text,
    "a function": callable,
}


def check_field(field: str, value: object, kind: str, optional: bool = False) -> None:
    """Raise InputError unless ``value`` is of this kind, one of _KINDS; or None, if that may be."""
    if not (optional and value is None) and not _KINDS[kind](value):
        raise InputError.of(field, told(value), f"{kind} or None" if optional else kind)


def check_keywords(call: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError, as Python does, for a keyword that ``call`` does not have; and say which it has."""
    for name in set(given).difference(known):
        raise TypeError(f"{call}() got an unexpected keyword argument '{name}'; it has {', '.join(known)}")


def told(value: object) -> str:
    """A value of whatever type, as a message has it: short, in one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({type(value).__name__})"

"""A request as files and tags keep it. A field that was added later is kept only where it is not its default, so that
what was written before the field came stays the same to the byte.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import fields
from typing import Any

from .guidance import Guidance
from .request import Request

# What files and tags had a place for from the beginning. Nothing joins these: new fields are kept by themselves.
_REQUEST = {"n", "labels", "guidance", "seed", "first_sample", "denoise", "certify", "redraw_nonfinite"}
_REQUEST |= {"decode", "tolerance", "reproducible", "batch_size"}
_GUIDANCE = ("scale", "what", "annealed", "attention_temperature")


def kept_guidance(guidance: Guidance) -> dict[str, Any]:
    """All of a guidance, its four first fields always."""
    return {name: getattr(guidance, name) for name in _GUIDANCE} | _later(guidance, _GUIDANCE)


def added(request: Request) -> dict[str, Any]:
    """The fields of a request that were added since, where they say something."""
    return _later(request, _REQUEST)


def _later(options: Request | Guidance, first: Container[str]) -> dict[str, Any]:
    values = {field.name: (getattr(options, field.name), field.default) for field in fields(options)}
    return {name: value for name, (value, default) in values.items() if name not in first and value != default}

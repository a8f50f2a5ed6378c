"""What a client may say about drawing, in the names HTTP has for it; it becomes the one Request of the library."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..runtime.guidance import Guidance
from ..runtime.kept import added, kept_guidance
from ..runtime.request import Request, Resolved
from .service import Refusal, Service

LAST = 2**64 - 1  # seed and sample index
Format = Literal["png", "zip", "npy"]
Whole = Annotated[int, Field(ge=0, le=LAST)]
Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Label = Annotated[int, Field(ge=-1, lt=2**31)]
Zoom = Annotated[int, Field(ge=1, le=32)]


class Style(BaseModel):
    """How samples are drawn. A field that has a name of Request's is that field."""

    guidance: Strength = Field(0.0, description="Scale of classifier-free guidance; 0 is none, 1 to 3 usual.")
    guide: Literal["a", "b", "ab"] = Field("ab", description="What is guided: log_scale, shift or both.")
    annealed: bool = Field(False, description="Let guidance grow along the sequence.")
    attention_temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="Of the unconditional branch.")


class Drawing(Style):
    """Which samples, drawn how. A sample is a function of the bundle and of what is said here, never of its mates."""

    model_config = ConfigDict(extra="forbid", strict=True)

    n: int | None = Field(None, ge=1, description="How many. Default: as many as labels, or 1.")
    labels: Label | list[Label] | None = Field(
        None, description="One class for all or one each; -1 or none: null class."
    )
    seed: Whole = Field(0, description="Of the noise.")
    first_sample: Whole = Field(0, description="Index of the first sample; sample k of a seed is always the same.")
    denoise: bool | Strength | None = Field(
        None, description="Or a strength. Default: if the model has noise to remove."
    )
    certify: bool = Field(
        False, description="Encode the samples again and report the largest round-trip error of each."
    )
    format: Format | None = Field(None, description="Default: what Accept prefers, else png.")
    zoom: Zoom | None = Field(None, description="Of pictures: each pixel repeated. Default: up to 48 pixels.")


_PLAIN = {field.name for field in fields(Request)} & Drawing.model_fields.keys() - {"n", "labels", "guidance"}


def request_of(service: Service, drawing: Drawing) -> Resolved:
    """What was asked for, as the service draws it. Raises Refusal and InputError for what cannot be drawn."""
    settings, labels = service.settings, drawing.labels
    each = [labels] if isinstance(labels, int) else labels
    count = drawing.n or max(1, len(each or ()))
    if count > settings.largest_n:
        raise Refusal(400, f"n is {count}; expected 1 to {settings.largest_n}: draw more by first_sample")
    if isinstance(labels, list) and len(labels) != count:
        raise Refusal(400, f"labels holds {len(labels)} for {count} samples; expected one for all, or one each")
    own: dict[str, Any] = {name: getattr(drawing, name) for name in _PLAIN}
    request = Request(
        n=count,
        labels=None if each is None else tuple(each),
        guidance=Guidance(drawing.guidance, drawing.guide, drawing.annealed, drawing.attention_temperature),
        decode=settings.decode,
        tolerance=settings.tolerance,
        reproducible=True,
        **own,
    )
    return request.resolved(service.flow.config)


def edition_of(service: Service) -> str:
    """A name for all that a sample's bits depend on beside the request: this engine and its rounding included."""
    flow, settings = service.flow, service.settings
    machine = flow.backend.description, flow.backend.machine
    parts = version("tarflow"), flow.bundle.hash, *machine, settings.decode, settings.tolerance
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def style_of(request: Resolved) -> dict[str, Any]:
    """How samples were drawn, as tags and ``samples.json`` have it."""
    return {"guidance": kept_guidance(request.guidance), "strength": request.strength, **added(request)}

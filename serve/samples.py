"""``/v1/samples``: pictures and arrays, by seed and index."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from ..runtime.flow import Guidance
from ..runtime.image import grid, png
from .batcher import Draw, Drawn, Style
from .service import Refusal, Service, aside

Format = Literal["png", "zip", "npy"]
MEDIA: dict[Format, str] = {"png": "image/png", "zip": "application/zip", "npy": "application/x-npy"}
_LAST = 2**64 - 1
_YEAR = 31_536_000  # seconds: what caches take for for ever
_MINUTES = 300  # seconds: for how long a picture may be another bundle's, served here before
_MOST_PIXELS = 1 << 25  # of all pictures in an answer

Whole = Annotated[int, Field(ge=0, le=_LAST)]
Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Label = Annotated[int, Field(ge=-1, lt=2**31)]


class Drawing(BaseModel):
    """Which samples, drawn how. A sample is a function of the bundle and of what is said here, never of its mates."""

    model_config = ConfigDict(extra="forbid", strict=True)

    n: int | None = Field(default=None, ge=1, description="How many. Default: as many as labels, or 1.")
    labels: Label | list[Label] | None = Field(
        default=None, description="One class for all or one each; -1 or none: null class."
    )
    seed: Whole = Field(default=0, description="Of the noise.")
    first_sample: Whole = Field(
        default=0, description="Index of the first sample; sample k of a seed is always the same."
    )
    guidance: Strength = Field(default=0.0, description="Scale of classifier-free guidance; 0 is none, 1 to 3 usual.")
    guide: Literal["a", "b", "ab"] = Field(default="ab", description="What is guided: log_scale, shift or both.")
    annealed: bool = Field(default=False, description="Let guidance grow along the sequence.")
    attention_temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Of the unconditional branch."
    )
    denoise: bool | Strength | None = Field(
        default=None, description="Or a strength. Default: if the model has noise to remove."
    )
    certify: bool = Field(
        default=False, description="Encode the samples again and report the largest round-trip error of each."
    )
    format: Format | None = Field(default=None, description="Default: what Accept prefers, else png.")
    zoom: int | None = Field(
        default=None, ge=1, le=32, description="Of pictures: each pixel repeated. Default: up to 48 pixels."
    )


def draw_of(service: Service, drawing: Drawing) -> Draw:
    """The draw that was asked for. Raises Refusal and InputError for one that cannot be."""
    count = drawing.n or (len(drawing.labels) if isinstance(drawing.labels, list) else 1)
    if count > service.settings.largest_n:
        raise Refusal(400, f"n is {count}; expected 1 to {service.settings.largest_n}: draw more by first_sample")
    guidance = Guidance(drawing.guidance, drawing.guide, drawing.annealed, drawing.attention_temperature)
    classes, strength = service.flow.resolve(
        count,
        labels=drawing.labels,
        guidance=guidance,
        seed=drawing.seed,
        first_sample=drawing.first_sample,
        denoise=drawing.denoise,
    )
    return Draw(drawing.seed, drawing.first_sample, classes, Style(guidance, strength), drawing.certify)


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["samples"])

    @router.post("/samples", response_class=Response)
    async def draw_samples(request: Request, drawing: Drawing) -> Response:
        """Draw samples: a grid as PNG, single PNGs in a zip, or an array (n, channels, size, size) float32 as npy."""
        form = drawing.format or accepted(request.headers.get("accept", "*/*"))
        draw = draw_of(service, drawing)
        if form != "npy":
            _refuse_large(service, len(draw.classes), drawing.zoom)
        drawn = await service.draw(request, draw)
        body = await aside(_size(service, drawn, drawing.zoom), _PACK[form], service, draw, drawn, drawing.zoom)
        return Response(body, media_type=MEDIA[form], headers=headers_of(draw, drawn))

    @router.head("/samples/{seed}/{index}.png", include_in_schema=False)
    @router.get("/samples/{seed}/{index}.png", response_class=Response)
    async def one_sample(
        request: Request,
        seed: Annotated[int, Path(ge=0, le=_LAST)],
        index: Annotated[int, Path(ge=0, le=_LAST)],
        label: Annotated[
            int | None, Query(ge=-1, lt=2**31, description="Its class; -1 or none: the null class.")
        ] = None,
        guidance: Annotated[float, Query(ge=0, allow_inf_nan=False)] = 0.0,
        guide: Annotated[Literal["a", "b", "ab"], Query()] = "ab",
        annealed: Annotated[bool, Query()] = False,
        attention_temperature: Annotated[float, Query(gt=0, allow_inf_nan=False)] = 1.0,
        denoise: Annotated[float | None, Query(ge=0, allow_inf_nan=False, description="Strength; 0 for none.")] = None,
        zoom: Annotated[int | None, Query(ge=1, le=32)] = None,
        edition: Annotated[
            str | None, Query(max_length=64, description="Of bundle, engine and version, as the page's links have it.")
        ] = None,
    ) -> Response:
        """One sample as PNG. With the edition in its address it never changes, so caches may keep it for ever; without,
        they ask again after some minutes.
        """
        drawing = Drawing(
            n=1, labels=label, seed=seed, first_sample=index, guidance=guidance, guide=guide, annealed=annealed,
            attention_temperature=attention_temperature, denoise=False if denoise == 0 else denoise, zoom=zoom,
        )  # fmt: skip
        draw = draw_of(service, drawing)
        _refuse_large(service, 1, zoom)
        if edition not in (None, edition_of(service)):
            raise Refusal(404, "this is an address of another bundle, engine or version than is served here now")
        scope = "public" if service.settings.token is None else "private"
        age = f"max-age={_MINUTES}" if edition is None else f"max-age={_YEAR}, immutable"
        caching = {"ETag": _etag(service, draw, zoom), "Cache-Control": f"{scope}, {age}"}
        if _matches(request.headers.get("if-none-match", ""), caching["ETag"]):
            return Response(status_code=304, headers=caching)
        if request.method == "HEAD":
            answer = Response(media_type="image/png", headers=caching)
            del answer.headers["content-length"]  # which only drawing would tell
            return answer
        drawn = await service.draw(request, draw)
        body = await aside(_size(service, drawn, zoom), _single, service, draw, drawn, zoom)
        return Response(body, media_type="image/png", headers=headers_of(draw, drawn) | caching)

    return router


def edition_of(service: Service) -> str:
    """A name for all that a sample's bits depend on beside the request: this engine and its rounding included."""
    flow, settings = service.flow, service.settings
    machine = flow.backend.description, flow.backend.machine
    parts = version("tarflow"), flow.bundle.hash, *machine, settings.decode, settings.tolerance
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _etag(service: Service, draw: Draw, zoom: int | None) -> str:
    """A name for the bytes: of all they are a function of."""
    style = asdict(draw.style)
    parts = edition_of(service), draw.seed, draw.first_sample, draw.classes.tolist(), style, zoom
    return f'"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"'


def _matches(wanted: str, etag: str) -> bool:
    """If-None-Match compares weakly, and may hold a list or a star."""
    return any(tag.strip().removeprefix("W/") in (etag, "*") for tag in wanted.split(","))


def accepted(accept: str) -> Format:
    """The format an Accept header likes best (RFC 9110, 12.5.1): of what fits a format, the most specific counts.
    Raises Refusal if it likes none.
    """
    liked: list[tuple[float, int, Format]] = []
    wanted = [_media_range(part, place) for place, part in enumerate(accept.split(","))]
    for form, known in MEDIA.items():
        names = (known, f"{known.split('/')[0]}/*", "*/*")
        fitting = [(names.index(media), place, quality) for media, quality, place in wanted if media in names]
        if fitting and min(fitting)[2] > 0:
            _, place, quality = min(fitting)
            liked.append((-quality, place, form))
    if not liked:
        raise Refusal(406, f"Accept is '{accept[:100]}'; this can be had: {', '.join(MEDIA.values())}")
    return min(liked, key=lambda choice: choice[:2])[2]


def _media_range(part: str, place: int) -> tuple[str, float, int]:
    """A media range, its quality, and its place in the header."""
    media, *parameters = (piece.strip().lower() for piece in part.split(";"))
    quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
    try:
        return media, float(quality), place
    except ValueError:
        return media, 0.0, place


def headers_of(draw: Draw, drawn: Drawn) -> dict[str, str]:
    """What a client that reads only the headers should know."""
    headers = {"X-Tarflow-Shape": ",".join(map(str, drawn.images.shape)), "X-Tarflow-Seed": str(draw.seed)}
    if drawn.nonfinite:
        headers["X-Tarflow-Nonfinite"] = ranges(drawn.nonfinite)
    if draw.certify and drawn.certificate is not None:
        known = drawn.certificate[np.isfinite(drawn.certificate)]
        headers["X-Tarflow-Certificate"] = f"{known.max(initial=0):.3g}" if len(known) else "nan"
    return headers


def ranges(indices: tuple[int, ...], most: int = 100) -> str:
    """3, 4, 5, 9 -> "3-5,9"; after ``most`` ranges, "..."."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    words = [str(low) if low == high else f"{low}-{high}" for low, high in runs[:most]]
    return ",".join([*words, *(["..."] if len(runs) > most else [])])


def _grid(service: Service, draw: Draw, drawn: Drawn, zoom: int | None) -> bytes:
    return png(grid(drawn.images), _text(service, draw, drawn), zoom or _zoom(service))


def _single(service: Service, draw: Draw, drawn: Drawn, zoom: int | None) -> bytes:
    return png(grid(drawn.images[:1], gap=0), _text(service, draw, drawn), zoom or _zoom(service))


def _zip(service: Service, draw: Draw, drawn: Drawn, zoom: int | None) -> bytes:
    """Pictures named by seed and index, and samples.json; the same samples give the same bytes."""
    file = io.BytesIO()
    samples = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for i, image in enumerate(drawn.images):
            index = draw.first_sample + i
            name = f"{draw.seed}-{index}.png"
            archive.writestr(zipfile.ZipInfo(name), png(grid(image[None], gap=0), {}, zoom or _zoom(service)))
            samples.append({
                "file": name, "index": index, "label": int(draw.classes[i]), "finite": index not in drawn.nonfinite,
                "certificate": _certificate(draw, drawn, i),
            })  # fmt: skip
        said = {
            "bundle_hash": service.flow.bundle.hash,
            "seed": draw.seed,
            "style": asdict(draw.style),
            "samples": samples,
        }
        archive.writestr(zipfile.ZipInfo("samples.json"), json.dumps(said, indent=1))
    return file.getvalue()


def _certificate(draw: Draw, drawn: Drawn, i: int) -> float | None:
    if not draw.certify or drawn.certificate is None or not np.isfinite(drawn.certificate[i]):
        return None
    return float(drawn.certificate[i])


def _npy(service: Service, draw: Draw, drawn: Drawn, zoom: int | None) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(drawn.images))
    return file.getvalue()


_PACK: dict[Format, Any] = {"png": _grid, "zip": _zip, "npy": _npy}


def _size(service: Service, drawn: Drawn, zoom: int | None) -> int:
    """About how many bytes of pictures there are to pack."""
    return int(drawn.images.nbytes * (zoom or _zoom(service)) ** 2)


def _refuse_large(service: Service, n: int, zoom: int | None) -> None:
    """Raise Refusal for pictures that would take seconds and gigabytes to pack."""
    zoom = zoom or _zoom(service)
    pixels = n * (service.flow.config.image_size * zoom) ** 2
    if pixels > _MOST_PIXELS:
        cure = "ask for less zoom" if zoom > 1 else "ask for npy, or for fewer"
        found = f"{n} images at zoom {zoom} are {pixels:,} pixels"
        raise Refusal(400, f"{found}; expected {_MOST_PIXELS:,} at most: {cure}")


def _zoom(service: Service) -> int:
    return max(1, 48 // service.flow.config.image_size)


def _text(service: Service, draw: Draw, drawn: Drawn) -> dict[str, str]:
    last = draw.first_sample + len(drawn.images) - 1
    text = {
        "Software": "tarflow",
        "seed": str(draw.seed),
        "sample_indices": f"{draw.first_sample}-{last}",
        "bundle_hash": service.flow.bundle.hash,
    }
    return text | ({"nonfinite": ranges(drawn.nonfinite)} if drawn.nonfinite else {})

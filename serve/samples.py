"""``/v1/samples``: pictures and arrays, by seed and index."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import Field

from ..runtime.request import Resolved
from .drawing import LAST, Drawing, Format, Label, Strength, Style, Zoom, edition_of, request_of, style_of
from .packing import MEDIA, Packing, array, headers_of
from .service import Refusal, Service, aside

_YEAR = 31_536_000  # seconds: what caches take for for ever
_MINUTES = 300  # seconds: for how long a picture may be another bundle's, served here before


class OneSample(Style):
    """The query of one sample's address."""

    label: Label | None = Field(None, description="Its class; -1 or none: the null class.")
    denoise: Strength | None = Field(None, description="Strength; 0 for none.")
    zoom: Zoom | None = None
    edition: str | None = Field(
        None, max_length=64, description="Of bundle, engine and version, as the page's links have it."
    )

    def of(self, seed: int, index: int) -> Drawing:
        own = self.model_dump(exclude={"label", "denoise", "edition"})
        denoise = False if self.denoise == 0 else self.denoise
        return Drawing(n=1, labels=self.label, seed=seed, first_sample=index, denoise=denoise, **own)


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["samples"])

    @router.post("/samples", response_class=Response)
    async def draw_samples(request: Request, drawing: Drawing) -> Response:
        """Draw samples: a grid as PNG, single PNGs in a zip, or an array (n, channels, size, size) float32 as npy."""
        form = drawing.format or accepted(request.headers.get("accept", "*/*"))
        wanted = request_of(service, drawing)
        if form == "npy":
            drawn = await service.draw(request, wanted)
            body = await aside(drawn.images.nbytes, array, drawn)
        else:
            packing = Packing(service, wanted.n, drawing.zoom)
            drawn = await service.draw(request, wanted)
            body = await aside(packing.size(drawn), packing.as_zip if form == "zip" else packing.as_grid, drawn)
        return Response(body, media_type=MEDIA[form], headers=headers_of(drawn))

    @router.head("/samples/{seed}/{index}.png", include_in_schema=False)
    @router.get("/samples/{seed}/{index}.png", response_class=Response)
    async def one_sample(
        request: Request,
        seed: Annotated[int, Path(ge=0, le=LAST)],
        index: Annotated[int, Path(ge=0, le=LAST)],
        said: Annotated[OneSample, Query()],
    ) -> Response:
        """One sample as PNG. With the edition in its address it never changes, so caches may keep it for ever; without,
        they ask again after some minutes.
        """
        wanted = request_of(service, said.of(seed, index))
        packing = Packing(service, 1, said.zoom)
        if said.edition not in (None, edition_of(service)):
            raise Refusal(404, "this is an address of another bundle, engine or version than is served here now")
        scope = "public" if service.settings.token is None else "private"
        age = f"max-age={_MINUTES}" if said.edition is None else f"max-age={_YEAR}, immutable"
        caching = {"ETag": _etag(service, wanted, said.zoom), "Cache-Control": f"{scope}, {age}"}
        if _matches(request.headers.get("if-none-match", ""), caching["ETag"]):
            return Response(status_code=304, headers=caching)
        if request.method == "HEAD":
            answer = Response(media_type="image/png", headers=caching)
            del answer.headers["content-length"]  # which only drawing would tell
            return answer
        drawn = await service.draw(request, wanted)
        body = await aside(packing.size(drawn), packing.as_single, drawn)
        return Response(body, media_type="image/png", headers=headers_of(drawn) | caching)

    return router


def _etag(service: Service, request: Resolved, zoom: int | None) -> str:
    """A name for the bytes: of all they are a function of."""
    which = request.seed, request.first_sample, request.classes().tolist()
    parts = edition_of(service), *which, style_of(request), zoom
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

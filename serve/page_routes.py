"""The page at ``/`` and what it asks for: a drawing watched block by block, the likelihood of a picture."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from ..quality.scores import DRAWS, score
from ..runtime.flow import Flow
from ..runtime.picture import Picture
from ..runtime.request import Resolved
from .batcher import OnProgress
from .drawing import LAST, Drawing, edition_of, request_of
from .metrics import Metrics
from .picture import LARGEST_BYTES, MEDIA_TYPES, open_picture, sheet
from .service import Refusal, Service
from .watch import draw

PAGE = Path(__file__).parent / "page"
MEDIA = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Model(BaseModel):
    """What the page, or anyone, must know of the model before asking for something."""

    name: str
    size: int = Field(description="Height and width of an image.")
    channels: int
    blocks: int
    classes: int = Field(description="0: unconditional.")
    class_names: list[str] | None = Field(description="What the classes are called, if the bundle says so.")
    precision: str
    backend: str
    bundle_hash: str
    certificate_limit: float = Field(description="Round-trip error above which a sample decoded serially is suspect.")
    largest_n: int = Field(description="Images one request may draw.")
    largest_bytes: int = Field(description="Bytes a picture may have.")


class Likelihood(BaseModel):
    """How likely a picture is, and under which class most."""

    bits_per_dim: float = Field(description="Of p(x), with classes their even mixture: mean of the draws.")
    bits_spread: float = Field(description="Standard deviation of the draws.")
    draws: int = Field(description="Draws of the dequantisation noise.")
    log_likelihoods: list[float] | None = Field(description="log p(x | class), nats, over [-1, 1] pixels.")
    probabilities: list[float] | None = Field(description="p(class | x) under an even prior; null without classes.")
    notes: list[str] = Field(description="What was done to the picture to make it fit the model.")
    size: int
    picture: str = Field(description="What the model saw: PNG in base64.")


def routes(service: Service) -> APIRouter:
    """The page's files, and what the page asks for. Raises Refusal for what is not answered."""
    router = APIRouter(tags=["page"])
    _add_files(router)
    _add_model(router, service)
    _add_stream(router, service)
    _add_likelihood(router, service)
    return router


# --- the page itself ------------------------------------------------------------------------------------------------


def _add_files(router: APIRouter) -> None:
    """Read once: nothing a request says becomes a path."""
    for path in sorted(PAGE.iterdir()):
        answer = _file(path.read_bytes(), MEDIA[path.suffix])
        address = "/" if path.name == "index.html" else f"/page/{path.name}"
        router.add_api_route(address, answer, methods=["GET", "HEAD"], include_in_schema=False)


def _file(content: bytes, media_type: str) -> Callable[[Request], Response]:
    headers = HEADERS | {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return answer


def _add_model(router: APIRouter, service: Service) -> None:
    @router.get("/v1/model")
    def model() -> Model:
        """The model in numbers, and what this service takes at most."""
        flow = service.flow
        manifest, config = flow.bundle.manifest, flow.config
        return Model(
            name=manifest.name,
            size=config.image_size,
            channels=config.channels,
            blocks=config.blocks,
            classes=config.classes,
            class_names=list(manifest.class_names) or None,
            precision=manifest.precision,
            backend=flow.backend.description,
            bundle_hash=flow.bundle.hash,
            certificate_limit=flow.suspect_above(),
            largest_n=service.settings.largest_n,
            largest_bytes=min(LARGEST_BYTES, service.settings.largest_body),
        )


# --- a drawing that is watched --------------------------------------------------------------------------------------


class Watched(BaseModel):
    """The query of a drawing that is watched."""

    n: int = Field(8, ge=1, description="Samples.")
    labels: str | None = Field(
        None,
        pattern=r"^(-1|[0-9]{1,6})(,(-1|[0-9]{1,6}))*$",
        max_length=8192,
        description="Classes, dealt out by sample index: 3, or 0,1,2. -1 is the null class.",
    )
    guidance: float = Field(0.0, ge=0, le=1e6, description="Strength of guidance; 0 is none.")
    attention_temperature: float = Field(
        1.0, gt=0, le=1e6, description="Of the branch guided away from: what guides without classes."
    )
    seed: int = Field(0, ge=0, le=LAST)
    first_sample: int = Field(0, ge=0, lt=2**63, description="Index of the first sample.")

    def request(self, service: Service) -> Resolved:
        """Raises Refusal and InputError for what cannot be drawn."""
        dealt = None
        if self.labels is not None:
            choices, most = [int(label) for label in self.labels.split(",")], service.settings.largest_n + 1
            indices = range(self.first_sample, self.first_sample + min(self.n, most))
            dealt = [choices[i % len(choices)] for i in indices]
        own = self.model_dump(exclude={"labels"})
        return request_of(service, Drawing(labels=dealt, certify=True, **own))


def _add_stream(router: APIRouter, service: Service) -> None:
    @router.get(
        "/v1/samples/stream",
        response_class=StreamingResponse,
        responses={200: {"description": _EVENTS, "content": {"text/event-stream": {}}}},
    )
    async def stream(request: Request, said: Annotated[Watched, Query()]) -> StreamingResponse:
        """Samples as server-sent events: the noise, the images after each block, the images that were asked for."""
        wanted, told = said.request(service), _Told(service.metrics)

        def work(progress: OnProgress) -> None:
            report = draw(service.flow, wanted, edition_of(service), told.tell, progress)
            service.metrics.drawn(report, [wanted.n], report.seconds)

        drawing = asyncio.create_task(service.compute(request, work))
        drawing.add_done_callback(told.end)
        events = told.events(drawing)
        try:
            first = await anext(events)  # a refusal before it is an answer of its own
        except BaseException:
            drawing.cancel()
            raise
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        body = _body(first, events, drawing, service.metrics)
        return StreamingResponse(body, media_type="text/event-stream", headers=headers)


_EVENTS = """Server-sent events with JSON data.

- `start`: the noise, the `states` to come, and `of`, the number of block events.
- `block`: images `first` to `first + count - 1` as they are after `block`, which took `seconds`.
- `done`: the images; `certificate` and `log_prob` (nats) by sample, null where not finite; `suspects`, indices of those
  whose certificate is above `suspect_above` or not finite; `density`, what that density is of; times; `links` to each.
- `error`: a `message`; nothing follows.

A `picture` is a PNG in base64, `columns` images a row, without gaps."""


class _Told:
    """What the thread that draws tells, for the event loop to read in order."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._loop = metrics, asyncio.get_running_loop()
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue()

    def tell(self, name: str, data: dict[str, Any]) -> None:
        if name == "block":
            self._metrics.inverted(data["block"], data["seconds"])
        self._loop.call_soon_threadsafe(self._queue.put_nowait, _event(name, data))

    def end(self, drawing: asyncio.Task[None]) -> None:
        self._queue.put_nowait(None)
        if not drawing.cancelled():
            drawing.exception()  # seen, even if nobody reads on

    async def events(self, drawing: asyncio.Task[None]) -> AsyncIterator[bytes]:
        """What is told, in order; then what the drawing raised, if it did."""
        while (event := await self._queue.get()) is not None:
            yield event
        await drawing


async def _body(
    first: bytes, events: AsyncIterator[bytes], drawing: asyncio.Task[None], metrics: Metrics
) -> AsyncIterator[bytes]:
    try:
        yield first
        async for event in events:
            yield event
    except Refusal as refusal:
        yield _event("error", {"status": refusal.status_code, "message": refusal.detail})
    finally:
        if drawing.cancel():  # it was not done, and nobody reads any more
            metrics.abandoned.labels("left").inc()


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode()


# --- the likelihood of a picture ------------------------------------------------------------------------------------


def _add_likelihood(router: APIRouter, service: Service) -> None:
    content = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES}

    @router.post("/v1/likelihood", openapi_extra={"requestBody": {"required": True, "content": content}})
    async def likelihood(
        request: Request,
        seed: Annotated[int, Query(ge=0, le=LAST, description="Of the dequantisation noise.")] = 0,
    ) -> Likelihood:
        """Bits per dimension of a picture, and its class by Bayes' rule over exact likelihoods."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind not in MEDIA_TYPES:
            raise Refusal(415, f"the content type is '{kind[:80]}'; expected {' or '.join(MEDIA_TYPES)}")
        flow, data = service.flow, await request.body()
        read = partial(open_picture, data, flow.config.channels, flow.config.image_size)
        return await service.compute_of(request, read, partial(_likelihood, flow, seed))


def _likelihood(flow: Flow, seed: int, picture: Picture, progress: OnProgress) -> Likelihood:
    found = score(flow, picture.pixels, seed, progress)
    return Likelihood(
        bits_per_dim=found.bits_per_dim.mean(),
        bits_spread=found.bits_per_dim.std(ddof=1),
        draws=DRAWS,
        log_likelihoods=None if found.log_likelihoods is None else found.log_likelihoods.tolist(),
        probabilities=None if found.probabilities is None else found.probabilities.tolist(),
        notes=list(picture.notes),
        size=flow.config.image_size,
        picture=sheet(picture.pixels[None] / 127.5 - 1),
    )

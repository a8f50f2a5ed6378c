"""The application: routes over one service, errors as one sentence of JSON."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from ..runtime.errors import InputError
from ..runtime.flow import Flow
from . import inference, page_routes, samples
from .description import describe, page
from .gate import Gate
from .service import Refusal, Service, said, validation_message
from .settings import Settings
from .words import http_words


def create_app(flow: Flow, settings: Settings | None = None) -> FastAPI:
    """The ASGI application of one flow; ``app.state.service`` is its service, started and stopped by its lifespan."""
    service = Service(flow, settings or Settings())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="tarflow",
        version=version("tarflow"),
        description=f"Samples and likelihoods of {flow.bundle.manifest.name}.",
        lifespan=lifespan,
        docs_url=None,  # would load a script from elsewhere
        redoc_url=None,
        openapi_url=None,
    )
    app.state.service = service
    app.include_router(samples.routes(service))
    app.include_router(inference.routes(service))
    app.include_router(page_routes.routes(service))
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(InputError, _unfit)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_middleware(Gate, service=service)
    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", response_class=Response, responses=text, tags=["operation"])
    async def metrics() -> Response:
        """Counters and histograms in Prometheus' text format."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    document = describe(app)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        return JSONResponse(document)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        csp = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
        return HTMLResponse(page(document), headers=csp)

    return app


async def _refused(request: Request, error: Any) -> Response:
    return said(error)


async def _unfit(request: Request, error: Any) -> Response:
    return said(Refusal(400, http_words(error)))


async def _invalid(request: Request, error: Any) -> Response:
    return said(Refusal(400, validation_message(error.errors())))

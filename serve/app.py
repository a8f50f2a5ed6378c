"""The application: routes over one service, errors as one sentence of JSON."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..runtime.errors import InputError
from ..runtime.flow import Flow
from . import page_routes, samples
from .gate import Gate
from .service import Refusal, Service
from .settings import Settings


def create_app(flow: Flow, settings: Settings | None = None) -> FastAPI:
    """The ASGI application of one flow; ``app.state.service`` is its service."""
    service = Service(flow, settings or Settings())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(title="tarflow", version=version("tarflow"), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(samples.routes(service))
    if hasattr(page_routes, "routes"):
        app.include_router(page_routes.routes(service))
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(InputError, _unfit)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_middleware(Gate, service=service)

    @app.get("/metrics", response_class=Response, tags=["operation"])
    async def metrics() -> Response:
        """Counters and histograms in Prometheus' text format."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _said(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers)


async def _refused(request: Request, error: Any) -> Response:
    return _said(error.status, error.message, error.headers)


async def _unfit(request: Request, error: Any) -> Response:
    return _said(400, str(error))


async def _invalid(request: Request, error: Any) -> Response:
    """What was wrong where; never what was sent, which may be large or no JSON."""
    found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5]]
    return _said(400, "; ".join(found)[:1000])


async def _http(request: Request, error: Any) -> Response:
    return _said(error.status_code, str(error.detail), error.headers)

"""Routes of the Open Inference Protocol (KServe v2): health, metadata, infer."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from .models import VERSION, Model, Tensor, Tensors, denoising, drawn_tensors, encoding, models_of, wanted_of
from .protocol import HEADER, Asked, InferRequest, InputTensor, read_asked, write_answer
from .service import Refusal, Service, aside


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    parameters: dict[str, Any] = Field(description="The model inside, and the parameters a request may have.")


class InferResponse(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[InputTensor]


_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_INFER: dict[str, Any] = {
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": InferRequest.model_json_schema(ref_template="#/components/schemas/{model}")
                },
                **_BINARY,
            },
        },
    },
    "responses": {200: {"model": InferResponse, "content": _BINARY}},
}


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v2", tags=["inference"])
    models = models_of(service)

    def model_of(name: str, wanted: str = VERSION) -> Model:
        if name not in models or wanted != VERSION:
            raise Refusal(404, f"there is no such model here; expected {', '.join(models)}, version {VERSION}")
        return models[name]

    @router.head("/health/live", include_in_schema=False)
    @router.get("/health/live")
    async def live() -> dict[str, bool]:
        """Whether the process answers."""
        return {"live": True}

    @router.head("/health/ready", include_in_schema=False)
    @router.get("/health/ready")
    async def ready() -> dict[str, bool]:
        """Whether to send requests here: 503 until the graphs are loaded, and once the service is told to stop."""
        if not service.ready:
            raise Refusal(503, "the service is stopping" if service.draining else "the service is starting")
        return {"ready": True}

    @router.get("")
    async def server() -> ServerMetadata:
        return ServerMetadata(name="tarflow", version=version("tarflow"), extensions=["binary_tensor_data"])

    @router.get("/models/{name}")
    @router.get("/models/{name}/versions/{wanted}")
    async def metadata(name: str, wanted: str = VERSION) -> ModelMetadata:
        return _metadata(service, model_of(name, wanted))

    @router.get("/models/{name}/ready")
    @router.get("/models/{name}/versions/{wanted}/ready")
    async def model_ready(name: str, wanted: str = VERSION) -> dict[str, bool]:
        model_of(name, wanted)
        return await ready()

    @router.post("/models/{name}/infer", **_INFER)
    @router.post("/models/{name}/versions/{wanted}/infer", **_INFER)
    async def infer(request: Request, name: str, wanted: str = VERSION) -> Response:
        """Run a model. Tensors travel as JSON or, with the header Inference-Header-Content-Length, as binary data."""
        model = model_of(name, wanted)
        body = await request.body()
        asked = await aside(len(body), _read, model, request.headers.getlist(HEADER), body)
        tensors, said = await _answer(service, request, model, asked)
        head = {"model_name": name, "model_version": VERSION, "parameters": said}
        if asked.identity is not None:
            head["id"] = asked.identity
        binary = model.wanted(asked)
        output = {name: tensors[name] for name in binary}
        size = sum(tensor.nbytes for tensor in output.values())
        content, headers = await aside(size, write_answer, head, output, binary)
        return Response(content, headers=headers)

    return router


def _read(model: Model, lengths: list[str], body: bytes) -> Asked:
    asked = read_asked(lengths, body)
    model.check(asked)
    return asked


async def _answer(service: Service, request: Request, model: Model, asked: Asked) -> tuple[Tensors, dict[str, Any]]:
    if model.name == "sample":
        return drawn_tensors(await service.draw(request, wanted_of(service, model, asked)))
    work = (encoding if model.name == "encode" else denoising)(service, asked)
    return await service.compute(request, work), {}


def _metadata(service: Service, model: Model) -> ModelMetadata:
    manifest = service.flow.bundle.manifest
    said = {
        "bundle": manifest.name,
        "bundle_hash": service.flow.bundle.hash,
        "precision": manifest.precision,
        "backend": service.flow.backend.description,
        "classes": manifest.config.classes,
        "largest_n": service.settings.largest_n,
        "request_parameters": list(model.parameters),
    }
    return ModelMetadata(
        name=model.name,
        versions=[VERSION],
        platform="tarflow",
        inputs=model.inputs,
        outputs=model.outputs,
        parameters=said,
    )

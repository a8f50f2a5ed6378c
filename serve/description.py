"""The OpenAPI document, and a page of it that needs no other server."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

REFUSALS = {
    "400": "The request cannot be what was meant; the message says what was expected.",
    "401": "The service asks for a token.",
    "403": "Host is no name of this server, or a browser asks for the page of another site.",
    "404": "There is no such thing here.",
    "406": "None of the formats Accept names can be had.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is compressed, or of another type.",
    "429": "The queue is full; Retry-After says when to ask again.",
    "503": "The service is starting, stopping or out of memory.",
    "504": "No result in time.",
}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_HEADERS = {"429": "Retry-After", "401": "WWW-Authenticate"}


def describe(app: FastAPI) -> dict[str, Any]:
    """The document: every operation with the refusals any of them may give, in one shape."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas["Refused"] = _ERROR
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for operation in operations(document):
        responses = operation[2]["responses"]
        responses.pop("422", None)  # all that is wrong with a request is a 400 here
        for status, meaning in REFUSALS.items():
            responses[status] = _refused(status, meaning)
    if app.state.service.settings.token is not None:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


def _refused(status: str, meaning: str) -> dict[str, Any]:
    schema = {"schema": {"$ref": "#/components/schemas/Refused"}}
    response: dict[str, Any] = {"description": meaning, "content": {"application/json": schema}}
    if status in _HEADERS:
        response["headers"] = {_HEADERS[status]: {"schema": {"type": "string"}}}
    return response


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(method, path, operation) of everything in a document."""
    return [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def page(document: dict[str, Any]) -> str:
    """The document as HTML: one section an operation, the schemas behind it."""
    sections = "".join(_section(*operation) for operation in operations(document))
    schemas = "".join(
        f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>{_code(schema)}</details>'
        for name, schema in sorted(document["components"]["schemas"].items())
    )
    title = f"{document['info']['title']} {document['info']['version']}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f"<main><h1>{escape(title)}</h1><p>{escape(document['info'].get('description', ''))} The document itself: "
        f'<a href="openapi.json">openapi.json</a>.</p>{sections}<h2>Schemas</h2>{schemas}</main></html>'
    )


def _section(method: str, path: str, operation: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(p['name'])}</code><td>{escape(p['in'])}<td>{escape(p.get('description', ''))}"
        f"<td><code>{escape(json.dumps(p['schema']))}</code>"
        for p in operation.get("parameters", [])
    )
    table = f"<table><tr><th>name<th>in<th>meaning<th>schema{rows}</table>" if rows else ""
    bodies = {k: v["schema"] for k, v in operation.get("requestBody", {}).get("content", {}).items()}
    body = "".join(f"<p>Body, <code>{escape(kind)}</code>:</p>{_code(schema)}" for kind, schema in bodies.items())
    answers = "".join(
        f"<li><code>{escape(status)}</code> {escape(answer['description'])} "
        f"<small>{escape(', '.join(answer.get('content', {})))}</small>"
        for status, answer in operation["responses"].items()
        if status not in REFUSALS
    )
    said = escape(operation.get("description", operation.get("summary", "")))
    head = f"<h3><b>{method}</b> <code>{escape(path)}</code></h3><p>{said}</p>"
    return f"<section>{head}{table}{body}<ul>{answers}</ul></section>"


def _code(schema: Any) -> str:
    return f"<pre>{escape(json.dumps(schema, indent=1))}</pre>"


_STYLE = (
    ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif}main{max-width:60rem;margin:auto}"
    "section{border-top:1px solid #8886;margin-top:1.5rem}pre,table{overflow:auto;font-size:.85rem}"
    "pre{background:#8881;padding:.5rem;max-height:24rem}"
    "td,th{text-align:left;vertical-align:top;padding:.1rem .6rem .1rem 0}"
)

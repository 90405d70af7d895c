"""``GET /openapi.json``: made from the routes and schemas that the server itself uses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import engineroom
from engineroom.server.apis.answers import AnthropicError, Anything, OpenAIError
from engineroom.server.apis.routing import Route
from engineroom.server.http.call import Call
from engineroom.server.http.frames import dumps

__all__ = ["described", "document"]

_REF: Final = "#/components/schemas/{model}"
_TEXTS: Final = {
    400: "The request is not as it should be, or asks for what the runtime does not honour",
    401: "A key is needed, or the key is not known",
    403: "The key, or the page's origin, is not allowed here",
    404: "There is no such model or route",
    408: "The request, or its body, took too long",
    413: "The body is too large",
    415: "The body is no JSON, or is compressed",
    421: "The server is not called so",
    429: "A limit is reached; try again after the time in Retry-After",
    431: "The headers are too large",
    500: "The model failed; the server's log says why",
    501: "This server has no such thing",
    503: "Stopping, full, or the model is not to be had now",
}
_ALWAYS: Final = (400, 401, 403, 421, 431)


def described(routes: Sequence[Route]) -> tuple[Route, ...]:
    """The routes, and one more that describes them all, itself included."""

    @cache
    def body() -> bytes:
        return dumps(document(every))

    async def openapi(call: Call) -> None:
        """The description of every route."""
        await call.answer(200, body())

    every = (
        *routes,
        Route(
            path="/openapi.json",
            method="GET",
            endpoint=openapi,
            summary="This description",
            tag="operations",
            response=Anything,
        ),
    )
    return every


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """OpenAPI 3.1."""
    inputs = {route.request for route in routes if route.request is not None}
    outputs: set[type[BaseModel]] = {OpenAIError, AnthropicError}
    outputs |= {route.response for route in routes if route.response is not None}
    wanted: list[Any] = [(each, "validation") for each in sorted(inputs, key=_name)]
    wanted += [(each, "serialization") for each in sorted(outputs, key=_name)]
    names, definitions = models_json_schema(wanted, ref_template=_REF)
    paths: dict[str, Any] = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        operation: dict[str, Any] = {
            "summary": route.summary,
            "description": " ".join((route.endpoint.__doc__ or "").split()),
            "operationId": f"{route.method.lower()}_{re.sub(r'[^a-z0-9]+', '_', path)}".rstrip("_"),
            "tags": [route.tag],
            "security": [] if route.access == "open" else [{}, {"bearer": []}, {"x-api-key": []}],
            "responses": _responses(route, names),
        }
        if "{model}" in path:
            operation["parameters"] = [
                {
                    "name": "model",
                    "in": "path",
                    "required": True,
                    "description": "A model's id or alias",
                    "schema": {"type": "string", "minLength": 1},
                    "example": "default",
                }
            ]
        if route.request is not None:
            media: dict[str, Any] = {"schema": names[route.request, "validation"]}
            if route.example:
                media["example"] = route.example
            operation["requestBody"] = {
                "required": route.body_needed,
                "content": {"application/json": media},
            }
        paths.setdefault(path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "engineroom",
            "version": engineroom.__version__,
            "summary": "One LLM inference service in front of any runtime",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _responses(route: Route, names: Any) -> dict[str, Any]:
    if route.response is None:
        content: dict[str, Any] = {route.media: {"schema": {"type": "string"}}}
    else:
        content = {route.media: {"schema": names[route.response, "serialization"]}}
    if route.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    found: dict[str, Any] = {
        "200": {"description": "Done", "content": content, "headers": _HEADERS}
    }
    error = AnthropicError if route.path.startswith("/v1/messages") else OpenAIError
    for status in sorted({*route.errors, *_ALWAYS}):
        headers = dict(_HEADERS)
        if status in (429, 503):
            headers["retry-after"] = {
                "description": "Seconds after which to try again",
                "schema": {"type": "integer"},
            }
        schemas = [names[error, "serialization"]]
        if route.path == "/readyz" and status == 503:
            schemas = [names[route.response, "serialization"]]
        found[str(status)] = {
            "description": _TEXTS[status],
            "content": {"application/json": {"schema": schemas[0]}},
            "headers": headers,
        }
    return found


_HEADERS: Final = {
    "x-request-id": {
        "description": "The request's id, as in the server's log",
        "schema": {"type": "string"},
    }
}


def _name(schema: type[BaseModel]) -> str:
    return schema.__name__

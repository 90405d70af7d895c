"""``GET /openapi.json``: made from the routes and schemas that the server itself uses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import engineroom
from engineroom.server.apis.routing import SSE, Route
from engineroom.server.http.call import Call
from engineroom.server.http.frames import Answer, dumps

__all__ = ["described", "document"]

_REF: Final = "#/components/schemas/"
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
_BOUNDS: Final = {
    "ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum",
}  # fmt: skip
_LENGTHS: Final = {
    "string": {"min_length": "minLength", "max_length": "maxLength"},
    "array": {"min_length": "minItems", "max_length": "maxItems"},
    "object": {"min_length": "minProperties", "max_length": "maxProperties"},
}
_ALWAYS: Final = (400, 401, 403, 421, 431)
_HEADERS: Final = {
    "x-request-id": {
        "description": "The request's id, as in the server's log",
        "schema": {"type": "string"},
    }
}


_EVENT: Final = {
    "type": "object",
    "description": "An event of the stream",
    "required": ["data"],
    "properties": {
        "event": {"type": "string", "description": "Its name, in the APIs whose events have one"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "description": "JSON in the form of the API; [DONE] ends OpenAI's older ones",
        },
    },
}
"""Up to OpenAPI 3.1, the schema of a stream of events is that of each of them."""


class Anything(Answer, forbid_unknown_fields=False):
    """A JSON object."""


def described(routes: Sequence[Route]) -> tuple[Route, ...]:
    """The routes, and one more that describes them all, itself included."""

    async def openapi(call: Call) -> None:
        """The description of every route."""
        prefix = call.context.settings.root_path
        servers = b'{"servers":%b,' % dumps([{"url": prefix}]) if prefix else b"{"
        await call.answer(200, servers + description[1:])

    every_route = (
        *routes,
        Route("GET", "/openapi.json", openapi, "This description", "operations", response=Anything),
    )
    # At once, for it takes a while: no request is to hold the event loop with it.
    description = dumps(document(every_route))
    return every_route


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """OpenAPI 3.1."""
    paths: dict[str, Any] = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        operation: dict[str, Any] = {
            "summary": route.summary,
            "description": " ".join((route.endpoint.__doc__ or "").split()),
            "operationId": f"{route.method.lower()}_{re.sub(r'[^a-z0-9]+', '_', path)}".rstrip("_"),
            "tags": [route.tag],
            "security": [] if route.access == "open" else [{}, {"bearer": []}, {"x-api-key": []}],
            "responses": _responses(route),
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
            media: dict[str, Any] = {"schema": _ref(route.request)}
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
            "schemas": _schemas(routes),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _responses(route: Route) -> dict[str, Any]:
    done = {"type": "string"} if route.response is None else _ref(route.response)
    content: dict[str, Any] = {route.media: {"schema": done}}
    if route.streams is not None:
        content[route.streams] = {"schema": _EVENT if route.streams == SSE else {}}
    responses: dict[str, Any] = {
        "200": {"description": "Done", "content": content, "headers": _HEADERS}
    }
    for status in sorted({*route.errors, *_ALWAYS}):
        headers: dict[str, Any] = dict(_HEADERS)
        if status in (429, 503):
            headers["retry-after"] = {
                "description": "Seconds after which to try again",
                "schema": {"type": "integer"},
            }
        schema = done if status in route.own_errors else _ref(route.error)
        responses[str(status)] = {
            "description": _TEXTS[status],
            "content": {"application/json": {"schema": schema}},
            "headers": headers,
        }
    return responses


def _ref(schema: type) -> dict[str, str]:
    return {"$ref": _REF + schema.__name__}


def _schemas(routes: Sequence[Route]) -> dict[str, Any]:
    """Every schema under its class's name.

    :raises ValueError: two of them have the same name.
    """
    received = {route.request for route in routes if route.request is not None}
    sent = {route.response for route in routes if route.response is not None}
    models: list[tuple[type[BaseModel], Any]] = [(model, "validation") for model in received]
    models += [(model, "serialization") for model in sent if issubclass(model, BaseModel)]
    _, definitions = models_json_schema(
        sorted(models, key=lambda model: model[0].__name__), ref_template=_REF + "{model}"
    )
    answers = {model for model in sent if issubclass(model, Answer)}
    _, components = msgspec.json.schema_components(
        [*answers, *(route.error for route in routes)], ref_template=_REF + "{name}"
    )
    schemas: dict[str, Any] = {
        name: _with_bounds(schema) for name, schema in definitions.get("$defs", {}).items()
    }
    for name, schema in components.items():
        if name in schemas or "." in name:
            raise ValueError(f"two schemas are called {name.rpartition('.')[2]!r}; rename one")
        schemas[name] = _as_sent(schema)
    return dict(sorted(schemas.items()))


def _with_bounds(schema: Any) -> Any:
    """The schema with bounds by JSON Schema's names: pydantic writes its own where a function of
    ours stands behind them.
    """
    if isinstance(schema, list):
        return [_with_bounds(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    known = _LENGTHS.get(str(schema.get("type")), {}) | _BOUNDS
    return {
        known.get(key, key) if isinstance(value, int | float) else key: _with_bounds(value)
        for key, value in schema.items()
    }


def _as_sent(schema: Mapping[str, Any]) -> dict[str, Any]:
    """An answer's schema: what has a default is sent all the same, so a reader can rely on it."""
    fields: dict[str, dict[str, Any]] = schema["properties"]
    properties = {
        name: {key: item for key, item in value.items() if key != "default"}
        for name, value in fields.items()
    }
    required = [*schema["required"], *(n for n, value in fields.items() if "default" in value)]
    return {**schema, "properties": properties, "required": required}

"""An API is a module with ``ROUTES`` and a name in one list; answers are what describes them."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")

from pydantic import BaseModel

from engineroom.server import apis
from engineroom.server.apis import openapi
from engineroom.server.apis.openai_common import Chunk, Usage
from engineroom.server.apis.routing import Route
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, ErrorBody
from engineroom.server.http.frames import Answer, dumps
from engineroom.server.routes import APIS, all_routes, document


class Greeting(Answer, kw_only=True):
    """A greeting."""

    kind: str = "greeting"
    text: str


class Plain(ErrorBody, kw_only=True):
    """An error in a word."""

    error: str

    @classmethod
    def of(cls, error: ApiError, request_id: str) -> Plain:
        return cls(error=error.code or "")


async def greet(call: Call) -> None:
    """Greet somebody."""
    await call.answer_json(Greeting(text="hello"))


def route(**fields: Any) -> Route:
    return Route(
        **{
            "path": "/greet", "method": "GET", "endpoint": greet, "summary": "Greet", "tag": "t",
            "response": Greeting, **fields,
        }
    )  # fmt: skip


def test_every_module_with_routes_is_in_the_list():
    modules = [
        importlib.import_module(f"{apis.__name__}.{module.name}")
        for module in pkgutil.iter_modules(apis.__path__)
    ]
    assert {m for m in modules if hasattr(m, "ROUTES")} == set(APIS)


def test_every_path_is_answered_by_one_route():
    routes = [(route.method, route.path) for route in all_routes()]
    assert len(routes) == len(set(routes))


def test_answers_describe_themselves_and_errors_have_the_form_of_their_api():
    described = openapi.document(openapi.described([route(error=Plain)]))
    schemas = described["components"]["schemas"]
    # What has a default is sent all the same.
    assert sorted(schemas["Greeting"]["required"]) == ["kind", "text"]
    assert "default" not in schemas["Greeting"]["properties"]["kind"]
    responses = described["paths"]["/greet"]["get"]["responses"]
    error = responses["401"]["content"]["application/json"]["schema"]
    assert error == {"$ref": "#/components/schemas/Plain"}
    assert "/openapi.json" in described["paths"]


def test_an_answer_called_as_a_request_is_noticed():
    request = type("Greeting", (BaseModel,), {})
    with pytest.raises(ValueError, match="two schemas are called 'Greeting'"):
        openapi.document([route(method="POST", request=request)])


def test_two_answers_of_one_name_are_noticed():
    other = type("Greeting", (Answer,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match="two schemas are called 'Greeting'"):
        openapi.document([route(), route(path="/other", response=other)])


def test_every_reference_of_the_description_is_there():
    schemas = document()["components"]["schemas"]
    text = dumps(document()).decode()
    names = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names == set(schemas)


def test_what_is_absent_is_not_sent_and_half_a_surrogate_is():
    head: dict[str, Any] = {"id": "x", "object": "o", "created": 1, "model": "\ud800"}
    assert dumps(Chunk(**head, choices=[])) == (
        b'{"id":"x","object":"o","created":1,"model":"\\ud800","system_fingerprint":null,'
        b'"choices":[]}'
    )
    assert b'"usage":null' in dumps(Chunk(**head, choices=[], usage=None))
    assert all(issubclass(route.response, Answer | BaseModel) for route in all_routes()
               if route.response is not None)  # fmt: skip
    assert Usage.__struct_config__.forbid_unknown_fields

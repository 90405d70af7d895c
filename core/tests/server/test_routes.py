"""An API is a module with ``ROUTES`` and a name in one list; answers are what describes them."""

from __future__ import annotations

import importlib
import json
import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs the extra engineroom[chat]")

import httpx
from pydantic import BaseModel

from engineroom.schemas import GenerationParams, InferenceRequest
from engineroom.server import apis, routes
from engineroom.server.apis import openapi
from engineroom.server.apis.openai_common import Chunk, Usage
from engineroom.server.apis.routing import Route, work_route
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, ErrorBody
from engineroom.server.http.exchange import Writer, stream_all
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


class Lines(Writer):
    """A JSON object a line."""

    HEADERS = ((b"content-type", b"application/x-ndjson"),)
    ping = b"\n"

    def framer(self, index):
        return lambda text: dumps({"text": text}) + b"\n"

    def finish(self, index, response):
        return b"{}\n"

    def fail(self, error, responses):
        return dumps(Plain.of(error, "")) + b"\n"


async def talk(call: Call) -> None:
    """Say the prompt."""
    body = await call.json()
    request = InferenceRequest(
        model_id="m", prompt=body["prompt"], params=GenerationParams(max_new_tokens=9)
    )
    await stream_all(call, [request], Lines())


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
        b'{"id":"x","object":"o","created":1,"model":"\\ud800","choices":[]}'
    )
    assert b'"usage":null' in dumps(Chunk(**head, choices=[], usage=None))
    assert all(issubclass(route.response, Answer | BaseModel) for route in all_routes()
               if route.response is not None)  # fmt: skip
    assert Usage.__struct_config__.forbid_unknown_fields


@pytest.fixture
def another_api(monkeypatch):
    """An API that streams lines of JSON and has errors of its own form, named in the list."""
    streams = "application/x-ndjson"
    new = work_route("/talk", talk, "Talk", "t", response=Greeting, error=Plain, streams=streams)
    caches = (routes.all_routes, routes.document)
    monkeypatch.setattr(routes, "APIS", (*APIS, SimpleNamespace(ROUTES=(new,))))
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("another_api")
def test_an_api_needs_nothing_but_a_module_and_its_name(start):
    with start(heartbeat_s=0.02, max_body_bytes=100) as run:
        described = httpx.get(run.url + "/openapi.json").json()["paths"]["/talk"]["post"]
        assert "application/x-ndjson" in described["responses"]["200"]["content"]
        with httpx.stream("POST", run.url + "/talk", json={"prompt": "!wait one"}) as answer:
            assert answer.headers["content-type"] == "application/x-ndjson"
            lines = answer.iter_lines()
            assert next(lines) == ""  # a sign of life
            run.call(run.handler.gate.set)
            said = [json.loads(line) for line in lines if line]
        assert said == [{"text": "!wait"}, {"text": " one"}, {}]
        refused = httpx.post(run.url + "/talk", json={"prompt": "x" * 200})
        assert (refused.status_code, refused.json()) == (413, {"error": "body_too_large"})
        failed = httpx.post(run.url + "/talk", json={"prompt": "a b !break d"})
        assert json.loads(failed.text.splitlines()[-1]) == {"error": "failed"}

"""What a text must match: each API's names for it reach the runtime, as one thing."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx

from engineroom import STRUCTURED_KINDS, Capabilities, GenerationParams
from engineroom.testing import EchoHandler

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TEXT_OF_SCHEMA = json.dumps(SCHEMA)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}
CHAT_ROUTE, TEXT_ROUTE = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES, OWN = "/v1/responses", "/v1/messages", "/v1/inference"
LEAST = {
    CHAT_ROUTE: CHAT,
    TEXT_ROUTE: TEXT,
    RESPONSES: {"model": "m", "input": "hi"},
    MESSAGES: CHAT | {"max_tokens": 5},
    OWN: {"model_id": "m", "prompt": "hi"},
}


class StructuredEcho(EchoHandler):
    """A fake runtime that says it honours every kind, and keeps what it was asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def capabilities(self):
        params = frozenset(GenerationParams.model_fields)
        return Capabilities(params=params, chat=True, structured_output=frozenset(STRUCTURED_KINDS))

    def generate_tokens(self, loaded_model, request):
        self.asked.append(request.params.structured_output)
        return super().generate_tokens(loaded_model, request)


@pytest.fixture
def echo():
    return StructuredEcho()


@pytest.fixture
def server(start, echo):
    with start([{"model_id": "m", "source": "echo:"}], handler=echo) as run:
        yield run


def named(schema):
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}


def flat(schema):
    return {"format": {"type": "json_schema", "name": "n", "schema": schema}}


ASKED = [
    (CHAT_ROUTE, {"response_format": named(SCHEMA)}, {"json_schema": SCHEMA}),
    (CHAT_ROUTE, {"response_format": {"type": "json_object"}}, {"json_object": True}),
    (CHAT_ROUTE, {"response_format": {"type": "text"}}, None),
    (TEXT_ROUTE, {"response_format": named(SCHEMA)}, {"json_schema": SCHEMA}),
    (CHAT_ROUTE, {"guided_json": SCHEMA}, {"json_schema": SCHEMA}),
    (CHAT_ROUTE, {"guided_regex": "a+"}, {"regex": "a+"}),
    (TEXT_ROUTE, {"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
    (TEXT_ROUTE, {"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
    (CHAT_ROUTE, {"grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
    (CHAT_ROUTE, {"grammar": ""}, None),
    (CHAT_ROUTE, {"structured_outputs": {"json": SCHEMA}}, {"json_schema": SCHEMA}),
    (TEXT_ROUTE, {"structured_outputs": {"choice": ["a"]}}, {"choice": ["a"]}),
    (TEXT_ROUTE, {"structured_outputs": {"json_object": True}}, {"json_object": True}),
    (TEXT_ROUTE, {"structured_outputs": {}}, None),
    (
        TEXT_ROUTE,
        {"structured_outputs": {"regex": "a", "disable_any_whitespace": False}},
        {"regex": "a"},
    ),
    (TEXT_ROUTE, {"guided_regex": "a", "guided_decoding_backend": "outlines"}, {"regex": "a"}),
    (TEXT_ROUTE, {"guided_regex": "a", "guided_whitespace_pattern": None}, {"regex": "a"}),
    (CHAT_ROUTE, {"structured_outputs": {"json": TEXT_OF_SCHEMA}}, {"json_schema": SCHEMA}),
    (CHAT_ROUTE, {"guided_json": TEXT_OF_SCHEMA}, {"json_schema": SCHEMA}),
    (CHAT_ROUTE, {"json_schema": SCHEMA}, {"json_schema": SCHEMA}),
    (TEXT_ROUTE, {"json_schema": SCHEMA}, {"json_schema": SCHEMA}),
    (CHAT_ROUTE, {"format": SCHEMA}, {"json_schema": SCHEMA}),
    (TEXT_ROUTE, {"format": "json"}, {"json_object": True}),
    (CHAT_ROUTE, {"format": ""}, None),
    (
        CHAT_ROUTE,
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"json_schema": SCHEMA},
    ),
    (
        CHAT_ROUTE,
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        {"json_schema": SCHEMA},
    ),
    (
        MESSAGES,
        {"output_format": {"type": "json_schema", "schema": SCHEMA}},
        {"json_schema": SCHEMA},
    ),
    (RESPONSES, {"text": flat(SCHEMA)}, {"json_schema": SCHEMA}),
    (RESPONSES, {"text": {"format": {"type": "json_object"}}}, {"json_object": True}),
    (RESPONSES, {"text": {"format": {"type": "text"}, "verbosity": "medium"}}, None),
    (RESPONSES, {"structured_outputs": {"regex": "a"}}, {"regex": "a"}),
    (MESSAGES, {"output_config": flat(SCHEMA)}, {"json_schema": SCHEMA}),
    (MESSAGES, {"output_config": {}}, None),
    (MESSAGES, {"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
    (MESSAGES, {"structured_outputs": {"regex": "a"}}, {"regex": "a"}),
    (MESSAGES, {"grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
    (OWN, {"params": {"structured_output": {"regex": "a"}}}, {"regex": "a"}),
]


@pytest.mark.parametrize(("route", "fields", "asked"), ASKED)
@pytest.mark.parametrize("stream", [False, True])
def test_every_name_for_it_reaches_the_runtime(server, echo, route, fields, asked, stream):
    answer = httpx.post(server.url + route, json=LEAST[route] | fields | {"stream": stream})
    assert answer.status_code == 200, answer.text
    (output,) = echo.asked
    assert (output and output.model_dump(exclude_none=True)) == asked


@pytest.mark.parametrize(
    ("route", "fields", "said"),
    [
        (CHAT_ROUTE, {"guided_regex": "a", "guided_choice": ["b"]}, "give one of guided_regex and"),
        (
            CHAT_ROUTE,
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs: give exactly one",
        ),
        (CHAT_ROUTE, {"response_format": {"type": "json_schema"}}, "json_schema has no schema"),
        (CHAT_ROUTE, {"response_format": {"type": "xml"}}, "response_format.type"),
        (TEXT_ROUTE, {"guided_choice": []}, "guided_choice"),
        (
            CHAT_ROUTE,
            {"structured_outputs": {"structural_tag": "x"}},
            "'structural_tag' here; give one of json, ",
        ),
        (
            TEXT_ROUTE,
            {"structured_outputs": {"disable_any_whitespace": True}},
            "disable_any_whitespace",
        ),
        (
            TEXT_ROUTE,
            {"guided_regex": "a", "guided_whitespace_pattern": " "},
            "guided_whitespace_pattern",
        ),
        (MESSAGES, {"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        (CHAT_ROUTE, {"guided_json": "{"}, "is a text that is no JSON"),
        (CHAT_ROUTE, {"guided_json": "[" * 300_000}, "more than 262144 characters"),
        (CHAT_ROUTE, {"guided_json": "[" * 200_000}, "is a text that is no JSON"),
        (CHAT_ROUTE, {"format": "xml"}, "format"),
        (
            MESSAGES,
            {"guided_regex": "a", "output_config": flat(SCHEMA)},
            "give one of output_config",
        ),
        (MESSAGES, {"structured_outputs": {"choice": [""]}}, "structured_outputs.choice.0: "),
        (CHAT_ROUTE, {"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice.1: "),
        (RESPONSES, {"structured_outputs": {"regex": ""}}, "structured_outputs.regex: "),
        (TEXT_ROUTE, {"guided_choice": ["a", ""]}, "guided_choice.1: "),
        (TEXT_ROUTE, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not"),
        (TEXT_ROUTE, {"tool_choice": "required"}, "tool_choice is not supported"),
        (TEXT_ROUTE, {"tool_choice": {"type": "function", "name": "f"}}, "tool_choice is not"),
        (TEXT_ROUTE, {"functions": [{"name": "f"}]}, "functions is not supported"),
        (TEXT_ROUTE, {"thinking": {"type": "enabled"}}, "thinking is not supported"),
        (MESSAGES, {"thread": {"type": "continue"}}, "send the whole conversation"),
        (MESSAGES, {"output_config": {"effort": "lots"}}, "output_config.effort: Input should be"),
    ],
)
def test_what_is_not_as_it_should_be_is_refused_by_name(server, echo, route, fields, said):
    answer = httpx.post(server.url + route, json=LEAST[route] | fields)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text
    assert not echo.asked


def test_a_response_says_what_form_it_has(server):
    body = LEAST[RESPONSES] | {"text": flat(SCHEMA)}
    answer = httpx.post(server.url + RESPONSES, json=body).json()
    assert answer["text"] == flat(SCHEMA)


def test_a_runtime_without_it_refuses(shared):
    body = CHAT | {"response_format": {"type": "json_object"}}
    answer = httpx.post(shared.url + CHAT_ROUTE, json=body)
    assert answer.status_code == 400
    assert "structured_output.json_object" in answer.json()["error"]["message"]


def test_clients_with_threads_are_told_to_go_on_without(server):
    answer = httpx.post(
        server.url + MESSAGES, json=LEAST[MESSAGES] | {"thread": {"type": "create"}}
    )
    assert answer.json()["error"]["details"] == {"error_code": "thread_unsupported_request"}
    other = httpx.post(server.url + MESSAGES, json=LEAST[MESSAGES] | {"max_tokens": 0})
    assert "details" not in other.json()["error"]

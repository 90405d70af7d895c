"""Each API's own name for what of a schema, a tool or a pattern is refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("llguidance", reason="needs the extra engineroom[structured]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from drawing_double import DrawingHandler

SAY = [{"role": "user", "content": "hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES, OWN = "/v1/responses", "/v1/messages", "/v1/inference"
LEAST: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": SAY},
    TEXT: {"model": "m", "prompt": "hi"},
    RESPONSES: {"model": "m", "input": "hi"},
    MESSAGES: {"model": "m", "messages": SAY, "max_tokens": 5},
    OWN: {"model_id": "m", "messages": SAY},
}
BAD = {"type": "object", "properties": {"city": {"not": {}}}}
GOOD = {"type": "object", "properties": {}}
FORMAT = {"type": "json_schema", "name": "n", "schema": BAD}
NAMED = {"type": "json_schema", "json_schema": {"name": "n", "schema": BAD}}


def function(name: str, schema: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def flat(name: str, schema: Any) -> dict[str, Any]:
    return {"type": "function", "name": name, "parameters": schema}


FUNCTIONS = [function("now", GOOD), function("weather", BAD)]
ALLOWED = {"type": "allowed_tools", "mode": "required", "tools": [flat("weather", None)]}
PLACES: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"tools": FUNCTIONS, "tool_choice": "required"}, "tools.1.function.parameters"),
    (CHAT, {"tools": FUNCTIONS, "tool_choice": ALLOWED}, "tools.1.function.parameters"),
    (CHAT, {"response_format": NAMED}, "response_format.json_schema.schema"),
    (CHAT, {"response_format": {"type": "json_object", "schema": BAD}}, "response_format.schema"),
    (CHAT, {"guided_json": BAD}, "guided_json"),
    (TEXT, {"structured_outputs": {"json": BAD}}, "structured_outputs.json"),
    (TEXT, {"response_format": NAMED, "n": 2}, "response_format.json_schema.schema"),
    (TEXT, {"format": BAD}, "format"),
    (
        RESPONSES,
        {"tools": [flat("now", GOOD), flat("weather", BAD)], "tool_choice": "required"},
        "tools.1.parameters",
    ),
    (RESPONSES, {"text": {"format": FORMAT}}, "text.format.schema"),
    (
        MESSAGES,
        {"tools": [{"name": "weather", "input_schema": BAD}], "tool_choice": {"type": "any"}},
        "tools.0.input_schema",
    ),
    (MESSAGES, {"output_config": {"format": FORMAT}}, "output_config.format.schema"),
    (MESSAGES, {"output_format": FORMAT}, "output_format.schema"),
    (OWN, {"tools": FUNCTIONS, "tool_choice": "required"}, "tools.1.function.parameters"),
    (
        OWN,
        {"params": {"structured_output": {"json_schema": BAD}}},
        "params.structured_output.json_schema",
    ),
]


@pytest.fixture(scope="module")
def url(start):
    with start(handler=DrawingHandler()) as run:
        yield run.url


def refused(url: str, route: str, fields: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(url + route, json=LEAST[route] | fields)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.mark.parametrize(("route", "fields", "place"), PLACES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_names_the_place_as_the_api_does(url, route, fields, place, stream):
    error = refused(url, route, fields | {"stream": stream})
    assert error["message"].startswith(f"{place}.properties.city: "), error
    assert '["not"]' in error["message"]
    assert ("tool 'weather'" in error["message"]) == ("tools" in fields)
    assert route == MESSAGES or error["param"] == place.partition(".")[0]


@pytest.mark.parametrize(
    ("route", "fields", "said"),
    [
        (CHAT, {"guided_regex": r"\bfoo\b"}, r"guided_regex: cannot be honoured: invalid regex"),
        (CHAT, {"guided_regex": r"\bfoo\b"}, r"/\bfoo\b/"),
        (TEXT, {"structured_outputs": {"regex": r"C:\b\d"}}, r"/C:\b\d/"),
        (
            RESPONSES,
            {"guided_grammar": 'root ::= "\\\\x\\y" a'},
            "guided_grammar: it is not",
        ),
        (MESSAGES, {"grammar": 'start: "/usr/lib/a" "C:\\\\x" a'}, "grammar: cannot be honoured"),
    ],
)
def test_a_pattern_is_shown_as_the_client_wrote_it(url, route, fields, said):
    message = refused(url, route, fields)["message"]
    assert "<path>" not in message, message
    assert message.startswith(said) or (said.startswith("/") and said in message), message


@pytest.mark.parametrize("route", [CHAT, RESPONSES, MESSAGES])
def test_a_reference_to_itself_is_refused_before_the_stream_begins(url, route):
    itself = {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}}
    message = refused(url, route, {"guided_json": itself, "stream": True})["message"]
    assert "guided_json.properties.a: a $ref" in message


def test_without_llguidance_a_refusal_says_what_was_asked(url, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    tools = [function("now", GOOD)]
    error = refused(url, CHAT, {"tools": tools, "tool_choice": "required"})
    assert error["param"] == "tool_choice"
    assert error["message"].startswith("tool_choice: 'required' needs the library llguidance")
    schema = refused(url, CHAT, {"response_format": NAMED})
    where = "response_format.json_schema.schema"
    assert schema["message"].startswith(f"{where}: structured output needs")
    for found in (error, schema):
        assert 'pip install "engineroom[structured]"' in found["message"]


DEEPER = "levels of objects and lists, and is deeper at "


@pytest.mark.parametrize(
    ("route", "field", "levels", "said"),
    [
        (CHAT, "guided_json", 70, f"guided_json: the JSON schema may have 64 {DEEPER}items.items"),
        (CHAT, "guided_json", 400, f"guided_json: may have 254 {DEEPER}items.items"),
        (CHAT, "tools", 70, f"tool 'f': the JSON schema may have 64 {DEEPER}items.items"),
        (CHAT, "tools", 400, f"tools: may have 254 {DEEPER}0.function.parameters.items"),
        (CHAT, "chat_template_kwargs", 400, f"chat_template_kwargs: may have 254 {DEEPER}items"),
        (RESPONSES, "guided_json", 400, f"guided_json: may have 254 {DEEPER}items"),
        (MESSAGES, "guided_json", 400, f"guided_json: may have 254 {DEEPER}items"),
        (OWN, "template_args", 400, f"template_args: may have 254 {DEEPER}items"),
    ],
)
def test_what_is_too_deep_is_told_by_its_place(url, route, field, levels, said):
    deep: Any = {}
    for _ in range(levels):
        deep = {"items": deep}
    fields: dict[str, Any] = {field: deep}
    if field == "tools":
        fields = {"tools": [function("f", deep)], "tool_choice": "required"}
    message = refused(url, route, fields)["message"]
    assert said in message
    assert ("make it flatter" if levels == 400 else "refer to it by $ref") in message


def test_half_a_character_in_arguments_is_refused_by_field(url):
    def history(arguments: str) -> dict[str, Any]:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        told = {"role": "tool", "tool_call_id": "c", "content": "x"}
        return {"messages": [*SAY, {"role": "assistant", "tool_calls": [call]}, told]}

    choice = {"guided_choice": ["a"]}
    half = history('{"t": ["\\ud83c"]}')
    assert (
        "messages.1: tool_calls.0: function.arguments.t.0 must be text"
        in (refused(url, CHAT, half | choice)["message"])
    )
    assert "messages.1.tool_calls.0: " in refused(url, OWN, half)["message"]
    item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"\\udc00": 1}'}
    assert (
        "input.0: tool_calls.0: function.arguments has a key"
        in (refused(url, RESPONSES, {"input": [item]})["message"])
    )
    whole = history('{"t": "\\ud83c\\udf78"}')
    assert httpx.post(url + CHAT, json=LEAST[CHAT] | whole | choice).status_code == 200

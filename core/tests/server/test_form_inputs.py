"""What has broken other servers where an answer must match something: whole and streamed.

The runtime is a fake that draws whatever its grammar allows.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("llguidance", reason="needs the extra engineroom[structured]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from both_ways import Said, ask_both, refused_both
from drawing_double import DrawingHandler

from engineroom.generation.tool_formats import REASONING_FORMATS
from engineroom.generation.traits import ModelTraits

THINK = next(form for form in REASONING_FORMATS if form.name == "think")
ITSELF = {"$ref": "#/$defs/a"}
FORM = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def drawing(start):
    with start(handler=DrawingHandler()) as run:
        yield run.url


@pytest.fixture(scope="module")
def thinking(start):
    """Of a model that begins to think where it likes to."""
    with start(handler=DrawingHandler(ModelTraits(reasoning=THINK))) as run:
        yield run.url


@pytest.fixture(scope="module")
def begun(start):
    """Of a model whose prompt has begun to think."""
    with start(handler=DrawingHandler(ModelTraits(reasoning=THINK, tail="<think>\n"))) as run:
        yield run.url


def say(liked: str = "") -> list[dict[str, str]]:
    return [{"role": "user", "content": liked}]


def of_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}


def is_form(text: str) -> bool:
    value = json.loads(text)
    return value.keys() == {"ok", "n"} and value["ok"] in (True, False) and value["n"] in (1, 2, 3)


def lives(url: str) -> None:
    assert httpx.get(f"{url}/readyz").status_code == 200
    assert ask_both(url, messages=say("b"), guided_choice=["a", "b"])[0].content == "b"


# ── reasoning ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("thoughts", ["so", 'I say {"ok": 1}.\n\nOr <not>?', ""])
@pytest.mark.parametrize("how", ["thinking", "begun"])
def test_thoughts_are_free_and_what_follows_them_is_not(request, how, thoughts):
    url = request.getfixturevalue(how)
    opened = "<think>" if how == "thinking" else ""
    liked = f"{opened}{thoughts}</think>\n\nWell, I"
    for seed in range(3):
        whole, _ = ask_both(
            url, messages=say(liked), response_format=of_schema(FORM), seed=seed, max_tokens=400
        )
        assert whole.reasoning == thoughts
        assert is_form(whole.content) and whole.finish == "stop"


def test_who_does_not_think_keeps_to_the_form_at_once(thinking):
    whole, _ = ask_both(
        thinking, messages=say("{"), response_format=of_schema(FORM), seed=1, max_tokens=400
    )
    assert not whole.reasoning and is_form(whole.content)


# ── patterns, and what no grammar is ─────────────────────────────────────────────────────────


def test_an_escaped_sign_in_a_pattern(drawing):
    text = {"type": "string", "pattern": r"^hello there indeed\!$"}
    for schema in (text, {"type": "object", "properties": {"t": text}, "required": ["t"]}):
        whole, _ = ask_both(drawing, messages=say(), response_format=of_schema(schema), seed=1)
        assert "hello there indeed!" in json.dumps(json.loads(whole.content))
    whole, _ = ask_both(drawing, messages=say(), guided_regex=r"^hello there indeed\!$")
    assert whole.content == "hello there indeed!"
    lives(drawing)


def test_a_pattern_beside_a_length(drawing):
    schema = {"type": "string", "pattern": "^[a-z]*$", "maxLength": 5, "minLength": 2}
    for seed in range(3):
        whole, _ = ask_both(
            drawing, messages=say('"abcdefgh'), response_format=of_schema(schema), seed=seed
        )
        assert re.fullmatch("[a-z]{2,5}", json.loads(whole.content))
    lives(drawing)


def test_what_is_required_and_described_nowhere(drawing):
    whole, _ = ask_both(
        drawing,
        messages=say('{"a": 1}'),
        response_format=of_schema({"type": "object", "required": ["a"]}),
        seed=1,
        max_tokens=400,
    )
    assert "a" in json.loads(whole.content)
    lives(drawing)


@pytest.mark.parametrize(
    "body",
    [
        {"guided_grammar": "start: ("},
        {"guided_grammar": "start: nowhere"},
        {"guided_grammar": 'root ::= "a" | ('},
        {"grammar": "root ::= root"},
        {"guided_regex": "(a"},
        {"guided_regex": "a{9,3}"},
        {"response_format": of_schema({"type": "no such type"})},
        {
            "response_format": of_schema(
                {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
            )
        },
        {"response_format": of_schema({"properties": {"a": 5}})},
    ],
    ids=lambda body: json.dumps(body)[:60],
)
def test_what_is_no_grammar_is_refused_and_the_server_lives(drawing, body):
    assert refused_both(drawing, messages=say(), **body)
    lives(drawing)


# ── the same again ───────────────────────────────────────────────────────────────────────────


def weather(description: str) -> list[dict[str, Any]]:
    function = {"name": "weather", "description": description, "parameters": FORM}
    return [{"type": "function", "function": function}]


def test_another_description_of_a_tool_is_the_same_grammar(drawing):
    calls = []
    for description in ("How it is", "How it is.", "", 'Says "how" it is {in} <a> city \\ 🌸', "x"):
        whole, streamed = ask_both(
            drawing,
            messages=say(),
            tools=weather(description),
            tool_choice="required",
            parallel_tool_calls=False,
            seed=7,
            max_tokens=400,
        )
        ((name, arguments),) = whole.calls
        assert name == "weather" and is_form(arguments) and streamed.calls == whole.calls
        calls.append(arguments)
    assert len(set(calls)) == 1


def test_a_seed_and_a_schema_twice_and_beside_others(drawing):
    def ask(seed: int) -> Said:
        schema = of_schema({**FORM, "properties": {**FORM["properties"], "t": {"type": "string"}}})
        body = {"response_format": schema, "seed": seed, "temperature": 1, "max_tokens": 400}
        return ask_both(drawing, messages=say(), **body)[0]

    alone = [ask(seed).content for seed in range(4)]
    assert ask(2).content == alone[2] and len(set(alone)) > 1
    with ThreadPoolExecutor(8) as clients:
        assert [said.content for said in clients.map(ask, [*range(4)] * 2)] == alone * 2

"""Schemas through the real route, on a fake runtime that draws whatever the grammar allows.

Whatever it draws is valid, or the request is refused with 400 and the keyword. The small part is
always run; the JSON-Schema-Test-Suite where ``ENGINEROOM_JSON_SCHEMA_SUITE`` names the source
distribution of ``jsonschema``, which has it.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("llguidance", reason="needs the extra engineroom[structured]")
pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("jsonschema", reason="needs jsonschema")

import httpx
import jsonschema
from drawing_double import DrawingHandler

SUITE = "ENGINEROOM_JSON_SCHEMA_SUITE"


@pytest.fixture(scope="module")
def url(start):
    with start(handler=DrawingHandler(), max_requests=64) as run:
        yield run.url


@pytest.fixture(scope="module")
def client():
    with httpx.Client() as client:
        yield client


def ask(client: httpx.Client, url: str, schema: Any, liked: str, **body: Any) -> httpx.Response:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    say = [{"role": "user", "content": liked}]
    asked = {"model": "m", "messages": say, "response_format": form, "max_tokens": 400, **body}
    return client.post(f"{url}/v1/chat/completions", json=asked)


def told(answer: httpx.Response) -> tuple[str, str]:
    """The text, and why it ended."""
    (choice,) = answer.json()["choices"]
    return choice["message"]["content"], choice["finish_reason"]


TREE = {
    "type": "object",
    "properties": {"t": {"$ref": "#/$defs/tree"}},
    "additionalProperties": False,
}
FLOWER = {
    "type": "object",
    "properties": {"naïve 🌸": {"type": "number"}},
    "required": ["naïve 🌸"],
    "additionalProperties": False,
}
OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": ["string", "null"]}},
    "required": ["a"],
    "additionalProperties": False,
}
FEW = {"type": "array", "items": {"enum": [1, "two", None]}, "minItems": 1, "maxItems": 2}
EXACT = {"type": "string", "pattern": "^hello there indeed\\!$"}
SCHEMAS: dict[str, tuple[Any, Any, Any]] = {
    "object": (OBJECT, {"a": 1, "b": None}, {"b": "x"}),
    "required without properties": ({"type": "object", "required": ["a"]}, {"a": []}, {}),
    "pattern": (EXACT, "hello there indeed!", "hello there"),
    "pattern and length": ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "aa", "aaaa"),
    "lengths": ({"type": "string", "minLength": 2, "maxLength": 3}, "é🌸", "abcd"),
    "numbers": ({"type": "integer", "minimum": 3, "exclusiveMaximum": 9}, 8, 9),
    "items": (FEW, [1, "two"], []),
    "prefix": ({"prefixItems": [{"const": 1}], "items": False}, [1], [1, 2]),
    "any of": ({"anyOf": [{"type": "boolean"}, {"const": "🌸"}]}, "🌸", "x"),
    "references": ({"$defs": {"tree": TREE}, "$ref": "#/$defs/tree"}, {"t": {"t": {}}}, {"t": 1}),
    "other letters": (FLOWER, {"naïve 🌸": 1.5}, {"naive": 1}),
}
"""A schema, what is valid by it, and what is not."""


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_drawn_is_valid(client, url, name):
    schema, right, wrong = SCHEMAS[name]
    validator = jsonschema.Draft202012Validator(schema)
    text = json.dumps(right, ensure_ascii=False)
    assert told(ask(client, url, schema, text)) == (text, "stop")
    ended = 0
    for seed in range(6):
        liked = json.dumps(wrong, ensure_ascii=False) if seed % 2 else ""
        answer = ask(client, url, schema, liked, seed=seed)
        text, finish = told(answer)
        if finish == "stop":
            ended += 1
            validator.validate(json.loads(text))
    assert ended >= 3


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, "if"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
        ({"type": "string", "pattern": "^(?=a)b"}, "look-around"),
        ({"$ref": "#/$defs/none"}, "/$defs/none"),
        (False, "false"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_no_grammar_has_is_refused_by_keyword(client, url, schema, keyword, stream):
    answer = ask(client, url, schema, "", stream=stream)
    assert answer.status_code == 400, answer.text
    assert keyword in answer.json()["error"]["message"], answer.text


# ── the suite ────────────────────────────────────────────────────────────────────────────────


def groups() -> Iterator[tuple[str, Any]]:
    """The suite's groups for draft 2020-12: a schema, and instances with their verdicts."""
    with tarfile.open(os.environ[SUITE]) as archive:
        for member in archive:
            _, _, name = member.name.partition("/tests/draft2020-12/")
            if name.endswith(".json") and "/" not in name:
                file = archive.extractfile(member)
                assert file is not None
                for group in json.load(file):
                    yield f"{name}: {group['description']}", group


@pytest.mark.nightly
@pytest.mark.skipif(SUITE not in os.environ, reason=f"{SUITE} names no source distribution")
def test_nothing_invalid_is_accepted(client, url):
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for name, group in groups():
        schema = group["schema"]
        names = {*_names_in(schema), "false", "$dynamicAnchor", "Resource", "patternProperty"}
        for number, test in enumerate(group["tests"]):
            text = json.dumps(test["data"], ensure_ascii=False)
            what = f"{name}: {test['description']}"
            answer = ask(client, url, schema, text, seed=number)
            if answer.status_code != 200:
                counts["refused"] += 1
                if answer.status_code != 400 or not _says(answer, names):
                    wrong.append(f"{what}: {answer.status_code} {answer.text[:300]}")
                continue
            drawn, finish = told(answer)
            accepted = (drawn, finish) == (text, "stop")
            if not accepted:
                counts["rejected" if test["valid"] else "right"] += 1
            elif test["valid"]:
                counts["right"] += 1
            else:
                wrong.append(f"{what}: {text[:200]} was accepted")
    print(dict(counts))
    assert not wrong, f"{len(wrong)} of {counts}: " + "\n".join(wrong[:20])
    assert counts["right"] > 500 and counts["rejected"] < 40, counts


def _names_in(schema: Any) -> Iterator[str]:
    """Every name in a schema."""
    if isinstance(schema, bool):
        return
    if isinstance(schema, dict):
        yield from schema
    for part in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(part, dict | list):
            yield from _names_in(part)


def _says(answer: httpx.Response, names: set[str]) -> bool:
    """Whether a refusal says what it refuses."""
    message = answer.json()["error"]["message"]
    return any(re.search(rf"[ '\"]{re.escape(name)}\b", message) for name in names)

"""Structured output in the engine: beside neighbours, with seeds, proposals and beams."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from llama_benches import ask

pytest.importorskip("llguidance", reason="needs the extra engineroom[structured]")

Make = Callable[..., Awaitable[Any]]

DATE = r"[0-9]{4}-[0-9]{2}-[0-9]{2}( or never)?"
PERSON = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
ASKED: list[dict[str, Any]] = [
    {"structured_output": {"regex": DATE}},
    {"structured_output": {"regex": DATE}, "temperature": 1.5, "seed": 4},
    {"structured_output": {"regex": DATE}, "temperature": 1.5, "seed": 4, "top_k": 40},
    {"structured_output": {"regex": DATE}, "temperature": 1.0, "seed": 9, "top_p": 0.9},
    {"structured_output": {"json_schema": PERSON}, "temperature": 1.5, "seed": 1},
    {"structured_output": {"choice": ["red", "dark red"]}, "frequency_penalty": 1.0},
    {"structured_output": {"regex": "(ab|ba){2,6}"}, "repetition_penalty": 1.4, "logprobs": 2},
    {"temperature": 0.9, "seed": 7},
]


def check(params: dict[str, Any], text: str) -> None:
    output = params.get("structured_output", {})
    if "regex" in output:
        assert re.fullmatch(output["regex"], text), text
    elif "choice" in output:
        assert text in output["choice"]
    elif "json_schema" in output:
        value = json.loads(text)
        assert (
            set(value) == {"ok", "n"} and value["ok"] in (True, False) and value["n"] in (1, 2, 3)
        )


@pytest.mark.parametrize("options", [{}, {"prompt_lookup": True, "draft_tokens": 4}], ids=str)
async def test_texts_fit_and_are_the_same_alone_and_beside_others(
    make: Make, options: dict[str, Any]
) -> None:
    bench = await make(n_parallel=8, **options)
    requests = [ask("a date: 2024-01-01 ", max_new_tokens=60, **params) for params in ASKED]
    alone = [await bench.service.infer(request) for request in requests]
    beside = await asyncio.gather(*map(bench.service.infer, requests))
    for params, one, other in zip(ASKED, alone, beside, strict=True):
        assert one.error_message is None
        assert other.generated_text == one.generated_text
        assert other.finish_reason == one.finish_reason
        if "structured_output" in params:
            assert one.finish_reason == "eos_token"
        check(params, one.generated_text)
    assert len(alone[6].logprobs) == alone[6].generated_tokens


async def test_every_beam_is_under_the_grammar(make: Make) -> None:
    bench = await make(n_parallel=4)
    for output in ({"regex": "(yes|no)"}, {"regex": DATE}, {"choice": ["a", "ab", "abc"]}):
        params = {"structured_output": output, "num_beams": 3, "do_sample": False}
        response = await bench.service.infer(ask("yes or no? ", max_new_tokens=40, **params))
        assert response.error_message is None
        check(params, response.generated_text)


async def test_what_is_no_grammar_ends_its_request_alone(make: Make) -> None:
    bench = await make(n_parallel=2)
    neighbour = asyncio.create_task(bench.service.infer(ask("hello", max_new_tokens=80)))
    for output in ({"regex": "("}, {"grammar": "start: x"}, {"json_schema": {"not": {}}}):
        response = await bench.service.infer(ask("hello", structured_output=output))
        assert response.error_type == "ConfigurationError"
    assert (await neighbour).generated_text == (
        await bench.service.infer(ask("hello", max_new_tokens=80))
    ).generated_text

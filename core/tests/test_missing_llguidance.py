"""Without llguidance, what asks for a form is refused by its own name, with what to install."""

from __future__ import annotations

import asyncio
import re
import sys
from typing import Any

import pytest

pytest.importorskip("numpy", reason="needs a runtime")

from engineroom import ConfigurationError, InferenceRequest
from engineroom.engine.constraints import GrammarCompiler, grammar_of
from engineroom.generation.tool_formats import REASONING_FORMATS
from engineroom.generation.traits import ModelTraits
from engineroom.prompts import ModelTokens

THINK = next(format_ for format_ in REASONING_FORMATS if format_.name == "think")
TOOL = {"name": "now", "parameters": {"type": "object"}}
INSTALL = re.escape('pip install "engineroom[structured]"')


class Codec:
    traits = ModelTraits(reasoning=THINK)

    def model_tokens(self) -> ModelTokens:
        return ModelTokens([bytes([b]) for b in range(256)], frozenset(), [0], self.read)

    def read(self, text: str) -> list[int]:
        return list(text.encode())


def asking(**fields: Any) -> InferenceRequest:
    return InferenceRequest(model_id="m", messages=[{"role": "user", "content": "a"}], **fields)


def structured(**output: Any) -> dict[str, Any]:
    return {"params": {"structured_output": output}}


FORM = "params.structured_output"
NEEDS = "needs the library llguidance, which is not installed"
ASKED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [TOOL], "tool_choice": "required"}, f"tool_choice: 'required' {NEEDS}"),
    ({"tools": [TOOL], "tool_choice": {"name": "now"}}, f"tool_choice: tool 'now' {NEEDS}"),
    (
        {"tools": [TOOL, {**TOOL, "name": "f", "strict": True}]},
        f"tools.1.function.parameters: strict of tool 'f' {NEEDS}",
    ),
    (structured(regex="a"), f"{FORM}.regex: structured output {NEEDS}"),
    (structured(json_object=True), f"{FORM}.json_object: structured output {NEEDS}"),
    (structured(grammar='root ::= "a"'), f"{FORM}.grammar: structured output {NEEDS}"),
]


@pytest.mark.parametrize(("fields", "said"), ASKED)
def test_what_was_asked_is_named(monkeypatch, fields, said):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    request = asking(**fields)
    for work in (GrammarCompiler(Codec()).compile(request), grammar_of(Codec(), request)):
        with pytest.raises(ConfigurationError, match=INSTALL) as caught:
            asyncio.run(work)
        assert caught.value.message.startswith(said)
        assert caught.value.field == said.partition(": ")[0]


def test_a_bound_of_reasoning_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigurationError, match=INSTALL) as caught:
        asyncio.run(GrammarCompiler(Codec()).compile(asking(reasoning_budget=3), "<think>\n"))
    assert caught.value.message.startswith(f"reasoning_budget: a bound of the reasoning {NEEDS}")


def test_what_asks_for_no_form_needs_none_of_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    request = asking(tools=[TOOL])
    assert asyncio.run(GrammarCompiler(Codec()).compile(request)) is None
    assert asyncio.run(grammar_of(Codec(), request)) is None

"""Tools, forms, reasoning and log probabilities on the real engine, with SmolLM2."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real_model

QUESTION = [("user", "How is the weather in Rome?")]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"name": name, "parameters": PARAMETERS} for name in ("weather", "time")]
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n"
    "{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def thinking(bench_class: Any, smollm2: Path) -> Iterator[Any]:
    """SmolLM2 with a template that lets it think first."""
    bench = bench_class(smollm2, chat_template=THINKS)
    bench.load()
    yield bench
    bench.close()


def ask(**fields: Any) -> dict[str, Any]:
    return {"prompt": None, "messages": QUESTION, "max_new_tokens": 120, **fields}


def test_calls_that_must_be_are_valid_whatever_the_seed(thinking: Any) -> None:
    asked = [
        ask(
            tools=TOOLS, tool_choice="required", reasoning=False, temperature=1.0, seed=seed,
            parallel_tool_calls=False,
        )
        for seed in range(6)
    ]  # fmt: skip
    for response in thinking.answers(asked):
        response.raise_for_error()
        assert response.finish_reason == "tool_calls" and not response.generated_text
        (call,) = response.tool_calls
        arguments = json.loads(call.arguments)
        assert call.name in ("weather", "time") and arguments.keys() == {"city", "days"}


def test_forms_are_kept_behind_reasoning_that_is_free(thinking: Any) -> None:
    forms = {
        "yes|no": {"choice": ["yes", "no"]},
        r"\d{3}-[a-c]+": {"regex": r"\d{3}-[a-c]{1,4}"},
        "ab+c": {"grammar": 'start: "a" "b"{1,5} "c"'},
        r'\{"city"\s*:.*\}': {"json_schema": PARAMETERS},
    }
    asked = [ask(structured_output=form, reasoning_budget=4) for form in forms.values()]
    for pattern, response in zip(forms, thinking.answers(asked), strict=True):
        response.raise_for_error()
        assert re.fullmatch(pattern, response.generated_text.strip(), re.DOTALL), response
        assert response.reasoning is not None


@pytest.mark.parametrize("logprobs", [None, 20])
def test_reasoning_has_a_budget_and_may_be_switched_off(thinking: Any, logprobs: Any) -> None:
    limits = {"max_new_tokens": 16, "logprobs": logprobs}
    free, bound, none, off = thinking.answers(
        [
            ask(**limits),
            ask(**limits, reasoning_budget=4),
            ask(**limits, reasoning_budget=0),
            ask(**limits, reasoning=False),
        ]
    )
    for response in (free, bound, none, off):
        response.raise_for_error()
        assert response.generated_tokens == len(response.logprobs or range(16))
        for entry in response.logprobs or ():
            assert (
                len(entry.top) == 20 and bytes(entry.bytes).decode(errors="replace") == entry.token
            )
    assert free.reasoning and not free.generated_text
    assert bound.reasoning and free.reasoning.startswith(bound.reasoning) and bound.generated_text
    assert none.reasoning is None and none.generated_text
    assert off.reasoning is None and off.generated_text
    assert bound.prompt_tokens == free.prompt_tokens == none.prompt_tokens


def test_a_grammar_that_takes_ever_longer_ends_its_own_request(thinking: Any) -> None:
    ambiguous = {"grammar": "start: s\ns: s s | /[a-z ]/"}
    slow, other = thinking.answers(
        [
            {"structured_output": ambiguous, "max_new_tokens": 400, "temperature": 1.0},
            {"max_new_tokens": 24},
        ]
    )
    other.raise_for_error()
    assert slow.error_type == "ConfigurationError", slow
    assert "takes too long" in slow.error_message
    assert thinking.answer(max_new_tokens=4).error_type is None

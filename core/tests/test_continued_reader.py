"""Answers that go on with a message: told apart from where the message ends."""

from __future__ import annotations

from typing import Any

import pytest

from engineroom import ChatMessage, ConfigurationError, InferenceRequest
from engineroom.generation.output_events import OutputReader
from engineroom.generation.outputs import read_output
from engineroom.generation.tool_formats import REASONING_FORMATS, TOOL_FORMATS
from engineroom.generation.traits import ModelTraits

FORMATS = {form.name: form for form in TOOL_FORMATS}
REASONING = {form.name: form for form in REASONING_FORMATS}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ARGUMENTS = '{"city": "Paris"}'


def reader_of(
    form: str, content: str, reasoning: str | None = None, thinks: str | None = "think"
) -> OutputReader:
    last = ChatMessage(role="assistant", content=content, reasoning=reasoning)
    request = InferenceRequest(
        model_id="m", messages=[ChatMessage(role="user", content="q"), last], tools=[TOOL]
    )
    traits = ModelTraits(FORMATS[form], True, None if thinks is None else REASONING[thinks])
    reader = traits.reader(request)
    assert reader is not None
    return reader


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("form", "content", "text", "expected"),
    [
        ("hermes", "The capital is", " Paris.", (" Paris.", "", [])),
        ("hermes", "a <", " b", (" b", "", [])),
        ("hermes", "a <tool", "box", ("box", "", [])),
        ("hermes", "{", "x}", ("x}", "", [])),
        ("hermes", "Look: <tool_", 'call>\n{"name": "weather", "arguments": {}}\n</tool_call>',
         ("", "", [("weather", "{}")])),
        ("hermes", '<tool_call>\n{"name": "weather", "arg', f'uments": {ARGUMENTS}}}\n</tool_call>',
         ("", "", [("weather", ARGUMENTS)])),
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Pa',
         'ris"}}\n</tool_call>', ("", "", [("weather", ARGUMENTS)])),
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>\nand', " on",
         (" on", "", [])),
        ("hermes", "<think>\nSo", " it is.\n</think>\n\nParis", ("Paris", " it is.", [])),
        ("hermes", "<think>\nSo.\n</thi", "nk>\n\nParis", ("Paris", "", [])),
        ("hermes", "<think>\nSo.\n</think>\n\nThe", " end", (" end", "", [])),
        ("hermes", "", "<think>\nSo.\n</think>\n\nThe", ("The", "So.", [])),
        ("llama3-json", '{"name": "weather", "par', f'ameters": {ARGUMENTS}}}',
         ("", "", [("weather", ARGUMENTS)])),
        ("llama3-json", '{"na', "h}", ("h}", "", [])),
    ],
)  # fmt: skip
def test_the_answer_is_what_comes_behind_the_message(
    form: str, content: str, text: str, expected: Any, size: int
) -> None:
    reader = reader_of(form, content)
    reader.begin("")
    events = []
    for at in range(0, len(text), size):
        events += reader.feed(text[at : at + size])
    events += reader.finish()
    output = read_output(events)
    assert (output.content, output.reasoning, output.calls) == expected


@pytest.mark.parametrize(
    ("content", "reasoning", "text", "expected"),
    [
        ("The", None, " end", (" end", "", [])),
        ("", "So", " it is<|end|><|start|>assistant<|channel|>final<|message|>Paris",
         ("Paris", " it is", [])),
    ],
)  # fmt: skip
def test_a_message_of_a_channel_goes_on(
    content: str, reasoning: str | None, text: str, expected: Any
) -> None:
    reader = reader_of("harmony", content, reasoning, None)
    reader.begin("<|start|>assistant<|channel|>final<|message|>The")
    output = read_output(reader.feed(text) + reader.finish())
    assert (output.content, output.reasoning, output.calls) == expected


def test_reasoning_is_placed_in_the_answer_alone() -> None:
    reader = reader_of("hermes", "<think>\nSo")
    reader.begin("")
    reader.feed(" it is.</think>Paris")
    reader.finish()
    assert reader.reasoned is not None
    assert [(max(a, 0), b) for a, b in reader.reasoned] == [(0, 7)]


@pytest.mark.parametrize(
    ("content", "warned"), [("The", True), ("<think>\nSo", False), (" ", False)]
)
def test_reasoning_is_asked_for_in_vain_behind_an_answer_that_has_begun(
    content: str, warned: bool
) -> None:
    last = ChatMessage(role="assistant", content=content)
    messages = [ChatMessage(role="user", content="q"), last]
    request = InferenceRequest(model_id="m", messages=messages, reasoning=True)
    traits = ModelTraits(reasoning=REASONING["think"], told=True)
    assert any("has its answer begun" in text for text in traits.warnings(request)) is warned


@pytest.mark.parametrize(
    ("content", "begin", "end"), [("The", None, None), ("<think>\nSo", "", "</think>")]
)
def test_a_grammar_is_about_what_is_generated(
    content: str, begin: str | None, end: str | None
) -> None:
    last = ChatMessage(role="assistant", content=content)
    request = InferenceRequest(model_id="m", messages=[ChatMessage(role="user", content="q"), last])
    thoughts = ModelTraits(reasoning=REASONING["think"]).thoughts(request, "<think>\n")
    assert thoughts == (None if begin is None else (begin, end))


@pytest.mark.parametrize(
    ("content", "refused"), [("It is", False), ('<tool_call>\n{"name": "wea', True)]
)
def test_no_grammar_goes_on_with_a_call_that_has_begun(content: str, refused: bool) -> None:
    request = InferenceRequest(
        model_id="m",
        messages=[
            ChatMessage(role="user", content="q"),
            ChatMessage(role="assistant", content=content),
        ],
        tools=[TOOL],
        tool_choice="required",
    )
    traits = ModelTraits(FORMATS["hermes"], True)
    if refused:
        with pytest.raises(ConfigurationError, match="messages: the last message has begun a call"):
            traits.grammar(request, None)
    else:
        assert "<tool_call>" in traits.grammar(request, None)

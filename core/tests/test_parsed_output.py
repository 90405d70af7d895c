"""Reasoning and calls beside content: a step may have several chunks, however it is read."""

import asyncio
import copy
import pickle
import re

import pytest
from hypothesis import given, strategies as st

from engineroom import ChatMessage, InferenceRequest, Mailbox, TokenStep, deliver
from engineroom.generation.deltas import ReasoningDelta, ToolCallDelta
from engineroom.generation.generation import Generation
from engineroom.generation.output_events import (
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    Reasoning,
)
from engineroom.generation.reader import StepReader
from engineroom.generation.token_places import TokenPlaces
from engineroom.generation.tool_formats import REASONING_FORMATS, TOOL_FORMATS
from engineroom.generation.traits import ModelTraits

FORMATS = {item.name: item for item in TOOL_FORMATS}
THINK = next(form for form in REASONING_FORMATS if form.name == "think")


class MarkupReader:
    """A fake reader: ``{thought}``, ``[name:arguments]``, and content around them.

    Gives each character on its own, so that a step has several events.
    """

    def __init__(self):
        self.state, self.name, self.calls = "content", "", -1

    def begin(self, prompt_tail):
        if prompt_tail.endswith("{"):
            self.state = "thought"

    def feed(self, text):
        events = []
        for char in text:
            if self.state == "content":
                if char == "{":
                    self.state = "thought"
                elif char == "[":
                    self.state, self.name = "name", ""
                else:
                    events.append(Content(char))
            elif self.state == "thought":
                if char == "}":
                    self.state = "content"
                else:
                    events.append(Reasoning(char))
            elif self.state == "name":
                if char == ":":
                    self.calls += 1
                    self.state = "arguments"
                    events.append(CallBegin(self.calls, self.name))
                else:
                    self.name += char
            elif char == "]":
                self.state = "content"
                events.append(CallEnd(self.calls))
            else:
                events.append(CallArguments(self.calls, char))
        return events

    def finish(self, *, limited=False):
        return []

    reasoned = None

    @property
    def cut_call(self):
        return self.state in ("name", "arguments")


def request(**fields):
    return InferenceRequest(model_id="m", prompt="p", **fields)


def generation(**fields):
    return Generation(request(**fields), "fake", MarkupReader())


def pieces(text, size):
    data = text.encode()
    return [data[i : i + size] for i in range(0, len(data), size)]


def steps_of(text, size, finish="eos_token"):
    *parts, last = pieces(text, size) or [b""]
    return [*(TokenStep((1,), part) for part in parts), TokenStep((1,), last, finish=finish)]


async def by_steps(steps, generation):
    async def generate():
        for step in steps:
            yield step

    reader, chunks = StepReader(generate(), generation), []
    while not reader.ended:
        if chunk := await reader.next_chunk():
            chunks.append(chunk)
    return chunks, reader.response()


async def by_mailbox(steps, generation, every=1):
    mailbox = Mailbox()

    async def generate():
        yield mailbox

    reader, chunks = StepReader(generate(), generation), []
    taken = 0

    def put(chunk):
        nonlocal taken
        taken += 1
        chunks.append(chunk)
        return bool(taken % every)  # a slow reader has to be waited for now and then

    for step in steps:
        deliver([(mailbox, step)])
    while not reader.ended:
        if chunk := await reader.push_chunks(put):
            chunks.append(chunk)
    return chunks, reader.response()


async def whole(steps, generation):
    async def generate():
        for step in steps:
            yield step

    return await StepReader(generate(), generation).read_all()


def told(chunks):
    reasoning = "".join(c.text for c in chunks if isinstance(c, ReasoningDelta))
    calls = {}
    for chunk in chunks:
        if isinstance(chunk, ToolCallDelta):
            if chunk.name is not None:
                assert chunk.call not in calls and chunk.id
                calls[chunk.call] = [chunk.id, chunk.name, ""]
            calls[chunk.call][2] += chunk.arguments
    return "".join(chunks), reasoning, [tuple(call) for call in calls.values()]


TEXT = "{think é}Hi [f:ab]mid[g:]🌸end"


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("read", [by_steps, by_mailbox])
def test_content_reasoning_and_calls_come_apart(size, read):
    chunks, response = asyncio.run(read(steps_of(TEXT, size), generation()))
    text, reasoning, calls = told(chunks)
    assert (text, reasoning) == ("Hi mid🌸end", "think é")
    assert [(name, arguments) for _, name, arguments in calls] == [("f", "ab"), ("g", "")]
    assert (response.generated_text, response.reasoning) == (text, reasoning)
    assert [(c.id, c.name, c.arguments) for c in response.tool_calls] == calls
    assert response.finish_reason == "tool_calls"
    assert len({call.id for call in response.tool_calls}) == 2


@given(
    text=st.text(st.sampled_from("ab{}[]:x"), max_size=30),
    size=st.integers(1, 9),
    every=st.integers(1, 4),
    stops=st.lists(st.text(st.sampled_from("abx"), min_size=1, max_size=3), max_size=2),
)
def test_every_way_of_reading_gives_the_same(text, size, every, stops):
    def new():
        return generation(stop_sequences=stops or None)

    once = asyncio.run(whole(steps_of(text, 1000), new()))
    chunks, streamed = asyncio.run(by_steps(steps_of(text, size), new()))
    pushed, response = asyncio.run(by_mailbox(steps_of(text, size), new(), every))
    assert told(chunks)[:2] == told(pushed)[:2]
    for answer in (streamed, response):
        assert answer.generated_text == once.generated_text
        assert answer.reasoning == once.reasoning
        assert answer.finish_reason == once.finish_reason
        mine = [(c.name, c.arguments) for c in answer.tool_calls or ()]
        assert mine == [(c.name, c.arguments) for c in once.tool_calls or ()]


def test_stop_sequences_are_looked_for_in_content_alone():
    chunks, response = asyncio.run(
        by_steps(steps_of("{a STOP b}[f:STOP]one STOP two", 2), generation(stop_sequences=["STOP"]))
    )
    assert response.reasoning == "a STOP b"
    assert response.tool_calls[0].arguments == "STOP"
    assert (response.generated_text, response.finish_reason) == ("one ", "stop_sequence")
    assert told(chunks)[0] == "one "


def test_no_stop_sequence_goes_on_behind_a_call():
    chunks, response = asyncio.run(
        by_steps(steps_of("ab ST[f:1]OP cd", 1), generation(stop_sequences=["STOP"]))
    )
    assert response.generated_text == "ab STOP cd"
    assert response.finish_reason == "tool_calls"
    begin = next(i for i, c in enumerate(chunks) if isinstance(c, ToolCallDelta))
    assert "".join(chunks[:begin]) == "ab ST"


def test_what_is_cut_short_is_no_call():
    _, response = asyncio.run(by_steps(steps_of("[f:1][g:2", 1, "length"), generation()))
    assert [call.name for call in response.tool_calls] == ["f"]
    assert response.finish_reason == "length"
    _, response = asyncio.run(by_steps(steps_of("text[g", 1), generation()))
    assert (response.generated_text, response.tool_calls) == ("text", None)
    assert response.finish_reason == "eos_token"


def test_the_end_of_the_prompt_says_where_the_text_begins():
    steps = [TokenStep(prompt_tail="<|assistant|>{", prompt_tokens=3), *steps_of("a}b", 1)]
    _, response = asyncio.run(by_steps(steps, generation()))
    assert (response.reasoning, response.generated_text) == ("a", "b")


def test_without_a_reader_all_is_content():
    plain = Generation(request(), "fake")
    chunks, response = asyncio.run(by_steps(steps_of(TEXT, 1), plain))
    assert "".join(chunks) == response.generated_text == TEXT
    assert response.reasoning is None and response.tool_calls is None


SAY = {"type": "function", "function": {"name": "say"}}


def answered(text, size, limit=None, **fields):
    """The answer of a model that writes ``text``, so many characters a token."""
    params = {} if limit is None else {"max_new_tokens": limit}
    asked = InferenceRequest(
        model_id="m", messages=[ChatMessage(role="user", content="x")], params=params, **fields
    )
    traits = ModelTraits(FORMATS["llama3-json"], reasoning=THINK)
    new = Generation(asked, "fake", traits.reader(asked))
    return asyncio.run(by_steps(steps_of(text, size), new))[1]


@pytest.mark.parametrize("choice", ["required", {"name": "say"}])
def test_where_a_call_has_to_be_a_limit_leaves_no_content(choice):
    text = '{"name": "say", "parameters": {}}'
    for limit in range(1, len(text)):
        response = answered(text, 1, limit, tools=[SAY], tool_choice=choice)
        assert (response.generated_text, response.tool_calls) == ("", None), text[:limit]
        assert response.cut_call and response.finish_reason == "length"
    response = answered(text, 1, 4, tools=[SAY])
    assert (response.generated_text, response.cut_call) == ("", True)
    response = answered('{"city": 1}', 1, 4, tools=[SAY])
    assert (response.generated_text, response.cut_call) == ('{"ci', False)


@given(
    thought=st.text(st.sampled_from("ab é🌸\n"), max_size=9),
    content=st.text(st.sampled_from("ab é"), max_size=9),
    size=st.integers(1, 5),
)
def test_tokens_of_reasoning_are_those_with_characters_of_it(thought, content, size):
    text = f"<think>{thought}</think>{content}"
    start = len("<think>")
    end = start + len(thought.encode())
    if not thought.isascii():
        size = 1  # else half of a character is told with the other half
    expected = -(-end // size) - start // size if thought else 0
    assert answered(text, size).reasoning_tokens == expected
    assert answered(content, size).reasoning_tokens == 0


def test_tokens_are_counted_where_a_step_has_several():
    places = TokenPlaces()
    places.add(0, 0)
    places.add(4, 8)
    places.add(1, 0)  # half of a character
    places.add(1, 1)
    assert [places.between(0, end) for end in (0, 1, 2, 8, 9, 99)] == [0, 1, 1, 4, 6, 6]
    assert (places.between(7, 9), places.between(2, 6), places.total) == (3, 2, 6)


@pytest.mark.parametrize(
    "delta", [ReasoningDelta("why"), ToolCallDelta(1, "c", "f"), ToolCallDelta(0, arguments="{")]
)
def test_deltas_are_empty_text_that_is_true_and_can_be_copied(delta):
    assert delta == "" and bool(delta) and f"a{delta}b" == "ab"
    assert re.fullmatch(r"(Reasoning|ToolCall)Delta\(.*\)", repr(delta))
    for again in (copy.copy(delta), copy.deepcopy(delta), pickle.loads(pickle.dumps(delta))):
        assert type(again) is type(delta) and repr(again) == repr(delta)

"""Tools and thinking in Anthropic's messages, with Anthropic's own client."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("anthropic", reason="needs Anthropic's client")

import anthropic
import httpx
from tool_doubles import ARGUMENTS, CALL, PARAMETERS, SECOND, THOUGHT

from engineroom import ReasoningDelta

PICTURE = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "image"}]}
ASK = [{"role": "user", "content": "how is it?"}]
WEATHER = {"name": "weather", "description": "how it is", "input_schema": PARAMETERS}
TOOLS = [WEATHER, {"name": "time", "input_schema": {"type": "object"}}]


@pytest.fixture(scope="module")
def client(run):
    with anthropic.Anthropic(base_url=run.url, api_key="any", max_retries=0) as client:
        yield client


def ask(client, **body):
    body = {"model": "m", "max_tokens": 100, "messages": ASK, "tools": TOOLS, **body}
    return client.messages.create(**body)


def events(run, **body):
    """The events of a stream as they are on the wire."""
    body = {"model": "m", "max_tokens": 100, "messages": ASK, "tools": TOOLS, **body}
    answer = httpx.post(f"{run.url}/v1/messages", json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    return list(map(json.loads, lines))


def test_calls_are_blocks(run, client):
    run.handler.say(*THOUGHT, "I look.", *CALL, *SECOND)
    answer = ask(client)
    assert answer.stop_reason == "tool_use"
    thinking, text, first, second = answer.content
    assert (thinking.type, thinking.thinking) == ("thinking", "let me think")
    assert (text.type, text.text) == ("text", "I look.")
    assert (first.type, first.id, first.name, first.input) == (
        "tool_use", "call_1", "weather", {"city": "Zürich 🌸"},
    )  # fmt: skip
    assert (second.name, second.input) == ("time", {})


def test_thoughts_are_left_out_of_their_block_where_that_is_asked_for(run, client):
    run.handler.say(*THOUGHT, "42")
    thinking = {"type": "adaptive", "display": "omitted"}
    thought, text = ask(client, thinking=thinking).content
    assert (thought.type, thought.thinking, text.text) == ("thinking", "", "42")
    told = [event for event in events(run, thinking=thinking) if "content_block" in event["type"]]
    kinds = ["start", "stop", "start", "delta", "stop"]
    assert [event["type"].rpartition("_")[2] for event in told] == kinds
    assert told[0]["content_block"]["type"] == "thinking"


def test_an_empty_piece_does_not_end_a_stream(run, client):
    run.handler.say(ReasoningDelta("hm"), ReasoningDelta(""), "4", "", "2", *CALL[:1], *CALL[1:])
    with client.messages.stream(model="m", max_tokens=9, messages=ASK, tools=TOOLS) as stream:
        thought, text, call = stream.get_final_message().content
    assert (thought.thinking, text.text, call.input) == ("hm", "42", {"city": "Zürich 🌸"})


def test_there_is_no_empty_block_of_text(run, client):
    run.handler.say(*CALL)
    assert [block.type for block in ask(client).content] == ["tool_use"]
    kinds = [e["content_block"]["type"] for e in events(run) if e["type"] == "content_block_start"]
    assert kinds == ["tool_use"]
    run.handler.say()
    assert [block.type for block in ask(client).content] == ["text"]


def test_blocks_begin_and_end_one_after_another(run):
    run.handler.say(*THOUGHT, "I look.", *CALL, *SECOND, "Done.")
    found = events(run)
    assert [event["type"] for event in found[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in found[-2:]] == ["message_delta", "message_stop"]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"
    told = []
    for event in found[2:-2]:
        told.append(event["type"].removeprefix("content_block_"))
        if event["type"] == "content_block_delta":
            told[-1] = event["delta"]["type"]
    assert told == [
        "start", "thinking_delta", "thinking_delta", "stop",
        "start", "text_delta", "stop",
        "start", "input_json_delta", "input_json_delta", "stop",
        "start", "input_json_delta", "stop",
        "start", "text_delta", "stop",
    ]  # fmt: skip
    starts = [event for event in found if event["type"] == "content_block_start"]
    assert [event["index"] for event in starts] == [0, 1, 2, 3, 4]
    assert starts[2]["content_block"] == {
        "type": "tool_use", "id": "call_1", "name": "weather", "input": {},
    }  # fmt: skip
    assert "input" not in json.dumps([e for e in found if e["type"] == "content_block_stop"])


def test_the_client_puts_the_stream_together(run, client):
    run.handler.say(*THOUGHT, "I look.", *CALL, *SECOND)
    with client.messages.stream(model="m", max_tokens=100, messages=ASK, tools=TOOLS) as stream:
        assert "".join(stream.text_stream) == "I look."
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.content[2].input == {"city": "Zürich 🌸"}


def test_a_call_that_is_cut_is_no_call(run, client):
    run.handler.say("so: ", *CALL[:2], finish="length", cut=True)
    answer = ask(client)
    assert answer.stop_reason == "max_tokens"
    assert [block.type for block in answer.content] == ["text"]
    assert events(run)[-2]["delta"]["stop_reason"] == "max_tokens"


def test_tools_are_handed_on(run, client):
    run.handler.say("x")
    ask(client, tools=[{**WEATHER, "cache_control": {"type": "ephemeral"}}])
    (tool,) = run.handler.seen[-1].tools
    assert tool["function"] == {
        "name": "weather", "description": "how it is", "parameters": PARAMETERS,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "meant", "parallel"),
    [
        ({"type": "none"}, "none", None),
        ({"type": "auto"}, "auto", None),
        ({"type": "any"}, "required", None),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "tool", "name": "time"}, "time", None),
    ],
)
def test_whether_tools_are_called(run, client, choice, meant, parallel):
    run.handler.say("x")
    ask(client, tool_choice=choice)
    request = run.handler.seen[-1]
    assert getattr(request.tool_choice, "name", request.tool_choice) == meant
    assert request.parallel_tool_calls is parallel


def test_a_conversation_with_calls_and_results(run, client):
    run.handler.say("fine")
    ask(
        client,
        messages=[
            *ASK,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "c", "name": "weather", "input": {"city": "Zürich"}},
                    {"type": "tool_use", "id": "d", "name": "time", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c", "content": "sunny"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "d",
                        "is_error": True,
                        "content": [{"type": "text", "text": "no clock"}],
                    },
                    {"type": "text", "text": "thanks"},
                ],
            },
        ],
    )
    _, made, first, second, said = run.handler.seen[-1].messages
    assert (made.role, made.content, made.reasoning) == ("assistant", "I look.", "hm")
    calls = [(call["id"], call["function"]) for call in made.tool_calls]
    assert calls == [
        ("c", {"name": "weather", "arguments": '{"city":"Zürich"}'}),
        ("d", {"name": "time", "arguments": "{}"}),
    ]
    assert (first.role, first.tool_call_id, first.content) == ("tool", "c", "sunny")
    assert (second.tool_call_id, second.content) == ("d", "Error: no clock")
    assert (said.role, said.content) == ("user", "thanks")


@pytest.mark.parametrize(
    ("block", "result"),
    [
        ({"content": "no clock", "is_error": True}, "Error: no clock"),
        ({"content": "Error 7: no clock", "is_error": True}, "Error 7: no clock"),
        ({"content": [], "is_error": True}, "Error"),
        ({"is_error": True}, "Error"),
        ({"content": "no clock", "is_error": False}, "no clock"),
        ({}, ""),
    ],
)
def test_a_result_that_is_an_error_says_so(run, client, block, result):
    run.handler.say("x")
    use = {"type": "tool_use", "id": "c", "name": "time", "input": {}}
    given = {"type": "tool_result", "tool_use_id": "c", **block}
    talk = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [given]}]
    ask(client, messages=[*ASK, *talk])
    assert run.handler.seen[-1].messages[-1].content == result


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ({"tools": [{"name": "f"}]}, "tools"),
        ({"tools": [{"name": "x y", "input_schema": {}}]}, "tools"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "name"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "tool_use"),
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, "image"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking"),
        ({"output_config": {"effort": "lots"}}, "output_config"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}, "chat_template_kwargs":
          {"enable_thinking": False}}, "thinking and chat_template_kwargs.enable_thinking"),
        ({"thinking": {"type": "disabled"}, "chat_template_kwargs": {"thinking": True}},
         "thinking and chat_template_kwargs.thinking"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(run, client, change, param):
    run.handler.say("x")
    body = {"model": "m", "max_tokens": 9, "messages": ASK, "tools": TOOLS, **change}
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError, match=param):
            client.post("/v1/messages", body={**body, "stream": stream}, cast_to=object)


@pytest.mark.parametrize(
    ("body", "reasoning", "budget"),
    [
        ({}, None, None),
        ({"thinking": {"type": "disabled"}}, False, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, True, 1024),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "low", None),
        ({"output_config": {"effort": "max"}}, "high", None),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, False, None),
        ({"chat_template_kwargs": {"enable_thinking": False},
          "output_config": {"effort": "low"}}, None, None),
    ],
)  # fmt: skip
def test_whether_and_how_hard_to_think(run, body, reasoning, budget):
    run.handler.say("x")
    events(run, **body)
    request = run.handler.seen[-1]
    assert (request.reasoning, request.reasoning_budget) == (reasoning, budget)


def test_arguments_that_are_no_object_break_nothing(run, client):
    from engineroom.generation.deltas import ToolCallDelta

    run.handler.say(ToolCallDelta(0, "c", "weather"), ToolCallDelta(0, arguments="[1"))
    assert ask(client).content[0].input == {}
    assert json.loads(ARGUMENTS)

"""Anthropic's own client: tools, their results, streams and forms."""

from __future__ import annotations

import pytest

pytest.importorskip("anthropic", reason="needs Anthropic's client")

import anthropic
from client_tasks import ASK, FUNCTION, OTHER, RESULT, Weather, fits

SAY = [{"role": "user", "content": ASK}]
TOOLS = [
    {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]}
    for f in (FUNCTION, OTHER)
]
HOW = {"model": "default", "max_tokens": 600, "extra_body": {"temperature": 0}}
ANY = {"type": "any"}


@pytest.fixture(scope="module")
def client(url):
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_its_result_and_the_answer(client, stream):
    asked = {**HOW, "messages": SAY, "tools": TOOLS, "tool_choice": ANY}
    if stream:
        with client.messages.stream(**asked) as events:
            kinds = [event.type for event in events]
            message = events.get_final_message()
        assert "input_json" in kinds
    else:
        message = client.messages.create(**asked)
    assert message.stop_reason == "tool_use"
    results = []
    for block in message.content:
        assert block.type == "tool_use" and fits(block.name, block.input)
        results.append({"type": "tool_result", "tool_use_id": block.id, "content": RESULT})
    answer = client.messages.create(
        **HOW,
        messages=[
            *SAY,
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": results},
        ],
        tools=TOOLS,
        tool_choice={"type": "none"},
    )
    assert [block.type for block in answer.content] == ["text"]


def test_a_certain_tool_is_called_once(client):
    choice = {"type": "tool", "name": "time_in", "disable_parallel_tool_use": True}
    message = client.messages.create(**HOW, messages=SAY, tools=TOOLS, tool_choice=choice)
    (block,) = message.content
    assert block.name == "time_in" and fits("time_in", block.input)


def test_a_form_is_parsed(client):
    if not hasattr(client.messages, "parse"):
        pytest.skip("this version of the client parses no forms")
    message = client.messages.parse(**HOW, messages=SAY, output_format=Weather)
    assert isinstance(message.parsed_output, Weather)

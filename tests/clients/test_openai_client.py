"""OpenAI's own client: tools, forms and their helpers, in chat and in responses."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("openai", reason="needs OpenAI's client")

import openai
from client_tasks import ASK, FUNCTION, OTHER, RESULT, Weather, fits

SAY = [{"role": "user", "content": ASK}]
TOOLS = [{"type": "function", "function": function} for function in (FUNCTION, OTHER)]
FLAT = [{"type": "function", **function, "strict": True} for function in (FUNCTION, OTHER)]
HOW = {"model": "default", "temperature": 0, "max_tokens": 200}
RESPOND = {"model": "default", "temperature": 0, "max_output_tokens": 200}


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_its_result_and_the_answer(client, stream):
    asked = {**HOW, "messages": SAY, "tools": TOOLS, "tool_choice": "required"}
    if stream:
        with client.chat.completions.stream(**asked) as events:
            for _ in events:
                pass
            (choice,) = events.get_final_completion().choices
    else:
        (choice,) = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    results = []
    for call in choice.message.tool_calls:
        assert fits(call.function.name, json.loads(call.function.arguments))
        results.append({"role": "tool", "tool_call_id": call.id, "content": RESULT})
    said = choice.message.model_dump(exclude_none=True)
    said = {name: said[name] for name in ("role", "content", "tool_calls") if name in said}
    answer = client.chat.completions.create(
        **HOW, messages=[*SAY, said, *results], tools=TOOLS, tool_choice="none"
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None


def test_a_certain_tool_is_called_once(client):
    choice = {"type": "function", "function": {"name": "time_in"}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="default",
            messages=SAY,
            tools=TOOLS,
            tool_choice=choice,
            parallel_tool_calls=False,
            seed=seed,
            temperature=1.5,
            max_tokens=200,
        )
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "time_in"
        assert fits("time_in", json.loads(call.function.arguments))


def test_tools_are_left_alone_where_none_is_to_be_called(client):
    answer = client.chat.completions.create(**HOW, messages=SAY, tools=TOOLS, tool_choice="none")
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls


def test_the_model_may_call_or_not(client):
    (choice,) = client.chat.completions.create(**HOW, messages=SAY, tools=TOOLS).choices
    for call in choice.message.tool_calls or ():
        assert fits(call.function.name, json.loads(call.function.arguments))
    assert choice.message.tool_calls or choice.message.content


def test_a_form_is_parsed(client):
    answer = client.chat.completions.parse(**HOW, messages=SAY, response_format=Weather)
    assert isinstance(answer.choices[0].message.parsed, Weather)
    with client.chat.completions.stream(**HOW, messages=SAY, response_format=Weather) as events:
        for _ in events:
            pass
        assert isinstance(events.get_final_completion().choices[0].message.parsed, Weather)


def test_a_tools_arguments_are_parsed(client):
    tool = openai.pydantic_function_tool(Weather)
    answer = client.chat.completions.parse(
        **HOW, messages=SAY, tools=[tool], tool_choice="required"
    )
    for call in answer.choices[0].message.tool_calls:
        assert isinstance(call.function.parsed_arguments, Weather)


def test_responses_with_a_call_its_result_and_the_answer(client):
    first = client.responses.create(**RESPOND, input=ASK, tools=FLAT, tool_choice="required")
    calls = [item for item in first.output if item.type == "function_call"]
    assert calls
    results = []
    for call in calls:
        assert fits(call.name, json.loads(call.arguments))
        results.append({"type": "function_call_output", "call_id": call.call_id, "output": RESULT})
    answer = client.responses.create(
        **RESPOND, input=[*SAY, *first.output, *results], tools=FLAT, tool_choice="none"
    )
    assert answer.output_text


def test_responses_streamed(client):
    asked = {**RESPOND, "input": ASK, "tools": FLAT, "tool_choice": "required"}
    with client.responses.stream(**asked) as events:
        kinds = [event.type for event in events]
        final = events.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    for item in final.output:
        assert item.type == "function_call" and fits(item.name, json.loads(item.arguments))


def test_responses_with_a_form(client):
    answer = client.responses.parse(**RESPOND, input=ASK, text_format=Weather)
    assert isinstance(answer.output_parsed, Weather)
    with client.responses.stream(**RESPOND, input=ASK, text_format=Weather) as events:
        for _ in events:
            pass
        assert isinstance(events.get_final_response().output_parsed, Weather)


async def test_the_asynchronous_client(url):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        asked = {**HOW, "messages": SAY, "tools": TOOLS, "tool_choice": "required"}
        answer = await client.chat.completions.create(**asked)
    (call, *_) = answer.choices[0].message.tool_calls
    assert fits(call.function.name, json.loads(call.function.arguments))

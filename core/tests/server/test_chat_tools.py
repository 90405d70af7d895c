"""Tools and reasoning in OpenAI's chat, with OpenAI's own client."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("openai", reason="needs OpenAI's client")

import httpx
import openai
from tool_doubles import ARGUMENTS, CALL, FUNCTION, SECOND, THOUGHT, TOOLS

ASK = [{"role": "user", "content": "how is it?"}]
MADE = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


def say(run, *chunks, **how):
    run.handler.say(*chunks, **how)


def asked(run):
    return run.handler.seen[-1]


def deltas(run, **body):
    """The deltas of a stream as they are on the wire, and why it ended."""
    body = {"model": "m", "messages": ASK, "tools": TOOLS, "stream": True, **body}
    answer = httpx.post(f"{run.url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    choices = [json.loads(line)["choices"][0] for line in lines]
    return [choice["delta"] for choice in choices], choices[-1]["finish_reason"]


# ── calls ────────────────────────────────────────────────────────────────────────────────────


def test_a_call_is_told_whole(run, client):
    say(run, *CALL, *SECOND)
    answer = client.chat.completions.create(model="m", messages=ASK, tools=TOOLS)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    calls = [(c.id, c.type, c.function) for c in choice.message.tool_calls]
    assert [(id_, kind, made.name, made.arguments) for id_, kind, made in calls] == [
        ("call_1", "function", "weather", ARGUMENTS),
        ("call_2", "function", "time", "{}"),
    ]  # fmt: skip


def test_the_first_delta_of_a_call_has_its_name_and_later_ones_do_not(run):
    say(run, *CALL, *SECOND)
    first, *rest, last = deltas(run)[0]
    assert first == {"role": "assistant", "content": "", "refusal": None}
    assert last == {}
    assert [delta["tool_calls"][0] for delta in rest] == [
        {
            "index": 0,
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": ""},
        },
        {"index": 0, "function": {"arguments": '{"city":'}},
        {"index": 0, "function": {"arguments": ' "Zürich 🌸"}'}},
        {
            "index": 1,
            "id": "call_2",
            "type": "function",
            "function": {"name": "time", "arguments": ""},
        },
        {"index": 1, "function": {"arguments": "{}"}},
    ]
    assert deltas(run)[1] == "tool_calls"


def test_the_client_puts_the_stream_together(run, client):
    say(run, "I look. ", *CALL, *SECOND)
    with client.chat.completions.stream(model="m", messages=ASK, tools=TOOLS) as stream:
        done = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
        (choice,) = stream.get_final_completion().choices
    assert [(event.name, event.arguments) for event in done] == [
        ("weather", ARGUMENTS),
        ("time", "{}"),
    ]
    assert choice.message.content == "I look. "
    assert [c.function.arguments for c in choice.message.tool_calls] == [ARGUMENTS, "{}"]
    assert choice.finish_reason == "tool_calls"


def test_several_answers_have_calls_of_their_own(run):
    say(run, *CALL)
    found, _ = deltas(run, n=2)
    assert len([delta for delta in found if "tool_calls" in delta]) == 6


def test_a_call_that_is_cut_is_no_call(run, client):
    say(run, "so: ", *CALL[:2], finish="length", cut=True)
    answer = client.chat.completions.create(model="m", messages=ASK, tools=TOOLS)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content == "so: "
    found, finish = deltas(run)
    assert finish == "length"
    assert [d["tool_calls"][0]["function"]["arguments"] for d in found if "tool_calls" in d] == [
        "", '{"city":',
    ]  # fmt: skip


def test_an_answer_without_calls_has_no_such_field(run):
    say(run, "hello")
    body = {"model": "m", "messages": ASK, "tools": TOOLS}
    answer = httpx.post(f"{run.url}/v1/chat/completions", json=body).json()
    message = answer["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "hello", "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "stop"


# ── what the runtime is asked ────────────────────────────────────────────────────────────────


def test_tools_are_handed_on(run, client):
    say(run, "x")
    strict = {"type": "function", "function": {**FUNCTION, "strict": True}}
    client.chat.completions.create(
        model="m", messages=ASK, tools=[strict], parallel_tool_calls=False
    )
    request = asked(run)
    assert request.tools == [strict]
    assert (request.tool_choice, request.parallel_tool_calls) == (None, False)
    client.chat.completions.create(model="m", messages=ASK)
    assert asked(run).tools is None


@pytest.mark.parametrize(
    ("choice", "meant", "names"),
    [
        ("none", "none", ["weather", "time"]),
        ("auto", "auto", ["weather", "time"]),
        ("required", "required", ["weather", "time"]),
        ({"type": "function", "function": {"name": "time"}}, "time", ["weather", "time"]),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "time"}}],
                },
            },
            "required",
            ["time"],
        ),
    ],
)
def test_whether_tools_are_called(run, client, choice, meant, names):
    say(run, "x")
    client.chat.completions.create(model="m", messages=ASK, tools=TOOLS, tool_choice=choice)
    request = asked(run)
    assert getattr(request.tool_choice, "name", request.tool_choice) == meant
    assert [tool["function"]["name"] for tool in request.tools] == names


def test_a_conversation_with_calls_and_results(run, client):
    say(run, "fine")
    client.chat.completions.create(
        model="m",
        messages=[
            *ASK,
            {"role": "assistant", "content": None, "tool_calls": [MADE], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "sunny"}]},
            {"role": "assistant", "content": "well", "reasoning": "so"},
            {"role": "user", "content": "thanks"},
        ],
    )
    _, made, result, said, _ = asked(run).messages
    assert (made.content, made.tool_calls, made.reasoning) == (None, [MADE], "hm")
    assert (result.role, result.tool_call_id, result.content) == ("tool", "c", "sunny")
    assert (said.content, said.reasoning) == ("well", "so")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "x y"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{**TOOLS[0], "function": {"name": f"f{n}"}} for n in range(129)]}, "tools"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"functions": [FUNCTION]}, "functions"),
        ({"function_call": {"name": "weather"}}, "function_call"),
        ({"messages": [*ASK, {"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [*ASK, {"role": "function", "name": "f", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages"),
        ({"messages": [{"role": "user", "tool_calls": [MADE]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]}, "messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(run, client, change, param):
    say(run, "x")
    body = {"model": "m", "messages": ASK, "tools": TOOLS, **change}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/chat/completions", body={**body, "stream": stream}, cast_to=object)
        assert caught.value.param == param


# ── reasoning ────────────────────────────────────────────────────────────────────────────────


def test_reasoning_is_told_apart(run, client):
    say(run, *THOUGHT, "42")
    answer = client.chat.completions.create(model="m", messages=ASK)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == (
        "42", "let me think", "let me think",
    )  # fmt: skip
    found, finish = deltas(run)
    assert found[1:-1] == [
        {"reasoning_content": "let me", "reasoning": "let me"},
        {"reasoning_content": " think", "reasoning": " think"},
        {"content": "42"},
    ]
    assert finish == "stop"


@pytest.mark.parametrize(
    "body",
    [
        {"include_reasoning": False},
        {"reasoning": {"exclude": True}},
        {"thinking": {"type": "enabled", "display": "omitted"}},
    ],
)
def test_reasoning_is_left_out_where_that_is_asked_for(run, client, body):
    say(run, *THOUGHT, "42")
    answer = client.chat.completions.create(model="m", messages=ASK, extra_body=body)
    message = answer.choices[0].message.model_dump(exclude_unset=True)
    assert message["content"] == "42" and not [name for name in message if "reasoning" in name]
    told, finish = deltas(run, **body)
    assert [delta for delta in told[1:] if delta] == [{"content": "42"}] and finish == "stop"


@pytest.mark.parametrize(
    ("body", "reasoning", "budget"),
    [
        ({}, None, None),
        ({"reasoning_effort": "none"}, False, None),
        ({"reasoning_effort": "low"}, "low", None),
        ({"reasoning_effort": "xhigh"}, "high", None),
        ({"thinking": {"type": "disabled"}}, False, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 64}}, True, 64),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "high"}, "high", None),
        ({"reasoning": {"effort": "medium"}}, "medium", None),
        ({"reasoning": {"enabled": False}}, False, None),
        ({"reasoning": {"max_tokens": 9}}, None, 9),
        ({"reasoning_budget": 7}, None, 7),
    ],
)
def test_whether_and_how_hard_to_think(run, body, reasoning, budget):
    say(run, "x")
    deltas(run, **body)
    request = asked(run)
    assert (request.reasoning, request.reasoning_budget) == (reasoning, budget)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"reasoning_effort": "none", "thinking": {"type": "enabled"}}, "reasoning_effort"),
        ({"reasoning_effort": "low", "reasoning": {"effort": "high"}}, "reasoning_effort"),
        ({"reasoning_budget": 1, "reasoning": {"max_tokens": 2}}, "reasoning_budget"),
        ({"reasoning_budget": -1}, "reasoning_budget"),
        ({"reasoning_effort": "lots"}, "reasoning_effort"),
        ({"thinking": True}, "thinking"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ],
)
def test_contradictions_are_refused(run, client, body, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(
            "/chat/completions", body={"model": "m", "messages": ASK, **body}, cast_to=object
        )
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("body", "told", "name"),
    [
        ({"reasoning_effort": "high"}, {"enable_thinking": False}, "reasoning_effort"),
        ({"reasoning": {"effort": "high"}}, {"thinking": False}, "reasoning"),
        ({"reasoning": {"enabled": True}}, {"reasoning_effort": "none"}, "reasoning"),
        ({"thinking": {"type": "enabled"}}, {"enable_thinking": False}, "thinking"),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": True}, "thinking"),
        ({"reasoning_effort": "none"}, {"enable_thinking": True}, "reasoning_effort"),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_template_is_told_nothing_else_than_the_request_says(run, body, told, name, stream):
    body = {"model": "m", "messages": ASK, "stream": stream, "chat_template_kwargs": told, **body}
    answer = httpx.post(f"{run.url}/v1/chat/completions", json=body)
    error = answer.json()["error"]
    (inner,) = told
    assert (answer.status_code, error["param"], error["code"]) == (400, name, "invalid_value")
    assert f"{name} and chat_template_kwargs.{inner} contradict each other" in error["message"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"reasoning_effort": "high"}, {"enable_thinking": True, "thinking": None}),
        ({"reasoning_effort": "minimal"}, {"reasoning_effort": "low"}),
        ({"reasoning_effort": "max"}, {"reasoning_effort": "high"}),
        ({"reasoning_effort": "none"}, {"enable_thinking": False, "reasoning_effort": "none"}),
        ({"thinking": {"type": "adaptive"}}, {"enable_thinking": False}),
        ({}, {"enable_thinking": False}),
    ],
)
def test_the_template_may_be_told_the_same(run, body, told):
    say(run, "x")
    deltas(run, chat_template_kwargs=told, **body)
    assert asked(run).template_args == told


def test_the_own_api_names_contradictions_by_its_fields(run):
    body = {"model_id": "m", "messages": ASK, "template_args": {"enable_thinking": False}}
    answer = httpx.post(f"{run.url}/v1/inference", json={**body, "reasoning": "high"})
    assert answer.status_code == 400
    assert "reasoning and template_args.enable_thinking contradict" in answer.text


def test_the_template_is_told_more_names(run):
    say(run, "x")
    deltas(run, chat_template_kwargs={"enable_thinking": False})
    assert asked(run).template_args == {"enable_thinking": False}


@pytest.mark.parametrize(
    "name", ["tools", "tool_choice", "chat_template_kwargs", "reasoning_effort", "reasoning_budget"]
)
def test_a_prompt_as_it_stands_has_none_of_it(run, client, name):
    value = {
        "tools": TOOLS,
        "tool_choice": "required",
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
        "reasoning_budget": 3,
    }[name]
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="m", prompt="x", extra_body={name: value})
    assert caught.value.param == name


# ── the own API ──────────────────────────────────────────────────────────────────────────────


def test_the_own_api_tells_deltas(run):
    say(run, THOUGHT[0], "well", *CALL[:2], finish="tool_calls")
    body = {"model_id": "m", "stream": True, "messages": ASK, "tools": TOOLS}
    answer = httpx.post(f"{run.url}/v1/inference", json=body).text
    *events, last = [line[6:] for line in answer.splitlines() if line.startswith("data: ")]
    assert list(map(json.loads, events)) == [
        {"reasoning": "let me"},
        {"text": "well"},
        {"tool_call": {"call": 0, "id": "call_1", "name": "weather", "arguments": ""}},
        {"tool_call": {"call": 0, "arguments": '{"city":'}},
    ]
    whole = json.loads(last)
    assert whole["reasoning"] == "let me"
    assert whole["tool_calls"] == [{"id": "call_1", "name": "weather", "arguments": '{"city":'}]


def test_strict_is_not_taken_lightly(shared):
    """A runtime that keeps to no schema refuses what asks it to."""
    strict = {"type": "function", "function": {**FUNCTION, "strict": True}}
    body = {"model": "m", "messages": ASK, "tools": [strict]}
    answer = httpx.post(f"{shared.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "strict" in answer.json()["error"]["message"]

"""Tools and reasoning in OpenAI's responses, with OpenAI's own client."""

from __future__ import annotations

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("openai", reason="needs OpenAI's client")

import openai
from tool_doubles import ARGUMENTS, CALL, FUNCTION, SECOND, THOUGHT

TOOLS = [{"type": "function", **FUNCTION}, {"type": "function", "name": "time"}]


def ask(client, **body):
    return client.responses.create(**{"model": "m", "input": "x", "tools": TOOLS, **body})


def test_calls_are_items(run, client):
    run.handler.say(*THOUGHT, "I look.", *CALL, *SECOND)
    answer = ask(client, parallel_tool_calls=True)
    assert answer.status == "completed"
    reasoning, message, first, second = answer.output
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", "let me think")
    assert answer.output_text == "I look." and message.status == "completed"
    assert (first.type, first.call_id, first.name, first.arguments, first.status) == (
        "function_call", "call_1", "weather", ARGUMENTS, "completed",
    )  # fmt: skip
    assert first.id != first.call_id
    assert (second.name, second.arguments) == ("time", "{}")
    assert len({item.id for item in answer.output}) == 4
    assert [tool.name for tool in answer.tools] == ["weather", "time"]
    assert answer.tool_choice == "auto"


def test_only_calls_have_no_message(run, client):
    run.handler.say(*CALL)
    assert [item.type for item in ask(client).output] == ["function_call"]
    run.handler.say()
    assert [item.type for item in ask(client).output] == ["message"]


def test_items_come_to_be_one_after_another(run, client):
    run.handler.say(*THOUGHT, "I look.", *CALL, *SECOND)
    events = list(ask(client, stream=True))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created", "in_progress",
        "output_item.added", "content_part.added",
        "reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    done = [event for event in events if event.type == "response.output_item.done"]
    assert [event.output_index for event in done] == [0, 1, 2, 3]
    final = events[-1].response
    assert [event.item for event in done] == final.output
    begun = [event for event in events if event.type == "response.output_item.added"]
    assert [event.item.id for event in begun] == [item.id for item in final.output]
    assert len({item.id for item in final.output}) == 4
    (made, _) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert (made.name, made.arguments, made.item_id) == ("weather", ARGUMENTS, final.output[2].id)
    assert final.output_text == "I look."


def test_the_client_puts_the_stream_together(run, client):
    run.handler.say(*CALL)
    strict = [{**tool, "strict": True, "parameters": FUNCTION["parameters"]} for tool in TOOLS]
    with client.responses.stream(model="m", input="x", tools=strict) as stream:
        final = stream.get_final_response()
    (made,) = final.output
    assert (made.name, made.arguments) == ("weather", ARGUMENTS)
    assert made.parsed_arguments == {"city": "Zürich 🌸"}


def test_a_call_that_is_cut_is_no_call(run, client):
    run.handler.say("so: ", *CALL[:2], finish="length", cut=True)
    assert [item.type for item in ask(client).output] == ["message"]
    *events, last = ask(client, stream=True)
    assert last.type == "response.incomplete"
    assert [item.type for item in last.response.output] == ["message"]
    assert events[-1].item.status == "incomplete"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_the_text(run, client, stream):
    run.handler.say("I ", "look.")
    answer = ask(client, include=["message.output_text.logprobs"], stream=stream)
    if stream:
        *_, last = answer
        answer = last.response
    assert answer.output_text == "I look."
    assert answer.output[0].content[0].logprobs == []


@pytest.mark.parametrize(
    ("choice", "meant", "names"),
    [
        ("none", "none", ["weather", "time"]),
        ("required", "required", ["weather", "time"]),
        ({"type": "function", "name": "time"}, "time", ["weather", "time"]),
        (
            {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "time"}],
            },
            "auto",
            ["time"],
        ),
    ],
)
def test_whether_tools_are_called(run, client, choice, meant, names):
    run.handler.say("x")
    answer = ask(client, tool_choice=choice)
    request = run.handler.seen[-1]
    assert getattr(request.tool_choice, "name", request.tool_choice) == meant
    assert [tool["function"]["name"] for tool in request.tools] == names
    said = answer.tool_choice
    assert (said if isinstance(said, str) else said.model_dump(exclude_unset=True)) == choice


def test_a_conversation_with_calls_and_results(run, client):
    run.handler.say("fine")
    call = {"type": "function_call", "name": "weather", "arguments": "{}"}
    ask(
        client,
        input=[
            {"role": "user", "content": "how is it?"},
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "hm"}],
            },
            {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
            {**call, "call_id": "c"},
            {**call, "call_id": "d", "id": "fc_1", "status": "completed"},
            {"type": "function_call_output", "call_id": "c", "output": "sunny"},
            {
                "type": "function_call_output",
                "call_id": "d",
                "output": [{"type": "input_text", "text": "rain"}],
            },
            {**call, "call_id": "e"},
            {"type": "function_call_output", "call_id": "e", "output": "snow"},
            {"role": "assistant", "content": "it snows"},
            {"role": "assistant", "content": "really"},
        ],
    )
    _, made, first, second, again, third, said, more = run.handler.seen[-1].messages
    assert (made.content, made.reasoning) == ("I look.", "hm")
    assert [c["id"] for c in made.tool_calls] == ["c", "d"]
    assert (first.role, first.tool_call_id, first.content) == ("tool", "c", "sunny")
    assert (second.tool_call_id, second.content) == ("d", "rain")
    assert (again.content, [c["id"] for c in again.tool_calls]) == (None, ["e"])
    assert third.content == "snow"
    assert (said.content, more.content) == ("it snows", "really")


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_goes_back_in(run, client, stream):
    """What was answered may be the input's next items as it is."""
    run.handler.say(*THOUGHT, "I look.", *CALL)
    answer = ask(client, stream=stream)
    if stream:
        *_, last = answer
        answer = last.response
    items = [item.model_dump(exclude_none=True) for item in answer.output]
    result = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
    run.handler.say("fine")
    ask(client, input=[{"role": "user", "content": "x"}, *items, result])
    _, made, given = run.handler.seen[-1].messages
    assert (made.content, made.reasoning) == ("I look.", "let me think")
    assert made.tool_calls[0]["id"] == given.tool_call_id == "call_1"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"reasoning": {"effort": "lots"}}, "reasoning"),
        ({"reasoning": {"exclude": True}}, "reasoning"),
        ({"reasoning": {"effort": "high"}, "chat_template_kwargs": {"enable_thinking": False}},
         "reasoning"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(run, client, change, param):
    run.handler.say("x")
    body = {"model": "m", "input": "x", "tools": TOOLS, **change}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/responses", body={**body, "stream": stream}, cast_to=object)
        assert caught.value.param == param


def test_whether_and_how_hard_to_think(run, client):
    run.handler.say("x")
    answer = ask(client, reasoning={"effort": "low", "summary": "auto"})
    assert run.handler.seen[-1].reasoning == "low"
    assert answer.reasoning.effort == "low"
    ask(client, reasoning={"effort": "none"}, extra_body={"reasoning_budget": 3})
    request = run.handler.seen[-1]
    assert (request.reasoning, request.reasoning_budget) == (False, 3)

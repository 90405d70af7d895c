"""A history with calls and their results reaches the runtime, whether or not tools are offered."""

from __future__ import annotations

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
QUESTION = {"role": "user", "content": "a"}


TOOL = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOL_OF = {
    CHAT: {"type": "function", "function": TOOL},
    RESPONSES: {"type": "function", **TOOL},
    MESSAGES: {"name": "weather", "description": "d", "input_schema": TOOL["parameters"]},
}
HISTORY = {
    CHAT: {"messages": [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]},
    RESPONSES: {"input": [
        QUESTION,
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]},
    MESSAGES: {"messages": [
        QUESTION,
        {"role": "assistant", "content": [
            {"type": "tool_use", "id": "c1", "name": "weather", "input": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": "rain"}]},
    ]},
}  # fmt: skip
NONE = {CHAT: "none", RESPONSES: "none", MESSAGES: {"type": "none"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", HISTORY)
@pytest.mark.parametrize("choice", ["absent", "none"])
def test_a_history_with_calls_and_their_results_reaches_the_runtime(run, route, choice, stream):
    tools = {} if choice == "absent" else {"tools": [TOOL_OF[route]], "tool_choice": NONE[route]}
    least = {"max_tokens": 9} if route == MESSAGES else {}
    body = {"model": "m", "stream": stream, **least, **HISTORY[route], **tools}
    answer = httpx.post(run.url + route, json=body)
    assert answer.status_code == 200, answer.text
    request = run.handler.seen[-1]
    question, call, result = request.messages
    assert (question.role, call.role, result.role) == ("user", "assistant", "tool")
    (made,) = call.tool_calls
    assert made["id"] == result.tool_call_id == "c1"
    assert made["function"] == {"name": "weather", "arguments": "{}"}
    assert result.content == "rain" and request.offered_tools is None

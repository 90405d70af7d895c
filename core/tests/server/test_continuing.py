"""A last message of the assistant's, over HTTP: continued, by whatever word an API has for it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from server_doubles import TalkHandler
from tool_doubles import TOOLS, ScriptHandler

CHAT, MESSAGES, RESPONSES, OWN = (
    "/v1/chat/completions",
    "/v1/messages",
    "/v1/responses",
    "/v1/inference",
)
ASK = {"role": "user", "content": "What is it?"}
BEGUN = {"role": "assistant", "content": "It is"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


class GoesOn(TalkHandler):
    def capabilities(self) -> Any:
        return replace(super().capabilities(), continue_final_message=True, tools=True)


class ThinksOn(ScriptHandler):
    def capabilities(self) -> Any:
        return replace(super().capabilities(), continue_final_message=True, template_args=True)


@pytest.fixture(scope="module")
def run(start):
    with start(handler=GoesOn()) as run:
        yield run


def post(run: Any, path: str, **body: Any) -> httpx.Response:
    common = {"model_id": "m"} if path == OWN else {"model": "m"}
    common |= {"max_tokens": 9} if path == MESSAGES else {}
    return httpx.post(run.url + path, json={**common, **body})


def with_prefix(value: bool) -> list[dict[str, Any]]:
    return [ASK, {**BEGUN, "prefix": value}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "continues"),
    [
        (CHAT, {"messages": [ASK, BEGUN]}, True),
        (CHAT, {"messages": [ASK, BEGUN], "continue_final_message": True}, True),
        (CHAT, {"messages": [ASK, BEGUN], "add_generation_prompt": False}, True),
        (
            CHAT,
            {
                "messages": [ASK, BEGUN],
                "continue_final_message": True,
                "add_generation_prompt": False,
            },
            True,
        ),
        (CHAT, {"messages": with_prefix(True)}, True),
        (CHAT, {"messages": with_prefix(False)}, True),
        (CHAT, {"messages": [ASK, BEGUN], "add_generation_prompt": True}, False),
        (CHAT, {"messages": [ASK, BEGUN], "continue_final_message": False}, False),
        (CHAT, {"messages": [ASK], "continue_final_message": False}, False),
        (CHAT, {"messages": [ASK], "add_generation_prompt": True}, False),
        (MESSAGES, {"messages": [ASK, BEGUN]}, True),
        (
            MESSAGES,
            {
                "messages": [
                    ASK,
                    {"role": "assistant", "content": [{"type": "text", "text": "It is"}]},
                ]
            },
            True,
        ),
        (MESSAGES, {"messages": [ASK]}, False),
        (RESPONSES, {"input": [ASK, BEGUN]}, True),
        (RESPONSES, {"input": [ASK, {**BEGUN, "status": "incomplete"}]}, True),
        (RESPONSES, {"input": [ASK, {**BEGUN, "status": "completed"}]}, False),
        (CHAT, {"messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}]}, False),
        (OWN, {"messages": [ASK, BEGUN]}, True),
        (OWN, {"messages": [ASK, BEGUN], "continue_final_message": False}, False),
    ],
)
def test_the_last_message_is_continued_where_the_api_says_so(run, path, body, continues, stream):
    answer = post(run, path, stream=stream, **body)
    assert answer.status_code == 200, answer.text
    assert run.handler.seen[-1].continues is continues
    assert "x-engineroom-warning" not in answer.headers


@pytest.mark.parametrize(
    ("path", "body", "param", "why"),
    [
        (
            CHAT,
            {
                "messages": [ASK, BEGUN],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
            "continue_final_message",
            "contradict",
        ),
        (
            CHAT,
            {"messages": with_prefix(True), "continue_final_message": False},
            "continue_final_message",
            "messages.1.prefix contradict",
        ),
        (
            CHAT,
            {"messages": [ASK], "continue_final_message": True},
            "continue_final_message",
            "only the assistant's",
        ),
        (
            CHAT,
            {"messages": [ASK], "add_generation_prompt": False},
            "add_generation_prompt",
            "add_generation_prompt: false",
        ),
        (
            CHAT,
            {"messages": [{**ASK, "prefix": True}]},
            "messages",
            "messages.0.prefix: true",
        ),
        (
            CHAT,
            {"messages": [{**BEGUN, "prefix": True}, ASK]},
            "messages",
            "messages.0.prefix: true",
        ),
        (
            CHAT,
            {
                "messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}],
                "continue_final_message": True,
            },
            "continue_final_message",
            "has tool calls",
        ),
        (
            OWN,
            {"messages": [ASK], "continue_final_message": True},
            None,
            "of the role user",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused_by_name(run, path, body, param, why):
    answer = post(run, path, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert why in error["message"]
    if param is not None:
        assert error["param"] == param


def test_a_runtime_that_cannot_continue_says_so(shared):
    answer = post(shared, CHAT, messages=[ASK, BEGUN])
    assert answer.status_code == 200
    assert "the last message was not continued" in answer.headers["x-engineroom-warning"]
    assert not shared.handler.seen[-1].continues
    refused = post(shared, CHAT, messages=[ASK, BEGUN], continue_final_message=True)
    assert refused.status_code == 400
    assert "continue_final_message" in refused.json()["error"]["message"]


def chunks(answer: httpx.Response) -> list[Any]:
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_what_the_message_has_begun_is_known_in_whole_answers_and_in_streams(start):
    with start(handler=ThinksOn()) as run:
        run.handler.text = " it is.\n</think>\n\nParis"
        thought = [ASK, {"role": "assistant", "content": "<think>\nSo"}]
        message = post(run, CHAT, messages=thought).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == (" it is.", "Paris")
        streamed = chunks(post(run, CHAT, messages=thought, stream=True))
        deltas = [choice["delta"] for chunk in streamed for choice in chunk["choices"]]
        for name, text in (("reasoning_content", " it is."), ("content", "Paris")):
            assert "".join(delta.get(name) or "" for delta in deltas) == text
        blocks = post(run, MESSAGES, messages=thought).json()["content"]
        assert [block.get("thinking") or block.get("text") for block in blocks] == [
            " it is.",
            "Paris",
        ]

        run.handler.text = 'ther", "arguments": {"city": "Rome"}}\n</tool_call>'
        begun = [ASK, {"role": "assistant", "content": '<tool_call>\n{"name": "wea'}]
        choice = post(run, CHAT, messages=begun, tools=TOOLS).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        (made,) = choice["message"]["tool_calls"]
        assert made["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
        assert choice["message"]["content"] is None

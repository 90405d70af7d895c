"""What was asked for in vain, told beside an answer in every API: ``x-engineroom-warning``."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from tool_doubles import ScriptHandler, call

IGNORED = "reasoning was ignored: the model's chat template cannot be told of it"
ASK = [{"role": "user", "content": "my secret"}]
CHAT = "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": ASK, "reasoning_effort": "high"},
    "/v1/responses": {"model": "m", "input": "my secret", "reasoning": {"effort": "high"}},
    "/v1/messages": {
        "model": "m",
        "messages": ASK,
        "max_tokens": 99,
        "thinking": {"type": "enabled", "budget_tokens": 9},
    },
    "/v1/inference": {"model_id": "m", "messages": ASK, "reasoning": "high"},
}


class ToldHandler(ScriptHandler):
    """Its template is told whether to reason, and has no word for it."""

    def capabilities(self) -> Any:
        return replace(super().capabilities(), template_args=True, reasoning_budget=True)


@pytest.fixture(scope="module")
def run(start):
    with start(handler=ToldHandler()) as run:
        run.handler.text = "so"
        yield run


def told(run: Any, path: str, **body: Any) -> tuple[str, httpx.Response]:
    answer = httpx.post(run.url + path, json={**BODIES[path], **body})
    assert answer.status_code == 200, answer.text
    return answer.headers.get("x-engineroom-warning", ""), answer


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_known_before_the_answer_is_told_with_it(run, path, stream):
    run.handler.text = "so"
    header, answer = told(run, path, stream=stream)
    assert header == IGNORED
    if path == "/v1/inference":
        data = answer.text.rpartition("data: ")[2] if stream else answer.text
        assert json.loads(data)["warnings"] == [IGNORED]


@pytest.mark.parametrize("stream", [False, True])
def test_what_several_answers_have_in_common_is_told_once(run, stream):
    run.handler.text = "so"
    for more in ({"n": 3}, {"logprobs": True}):
        assert told(run, CHAT, stream=stream, **more)[0] == IGNORED


def test_who_asks_for_nothing_in_vain_is_told_nothing(run):
    run.handler.text = "so"
    for stream in (False, True):
        answer = httpx.post(run.url + CHAT, json={"model": "m", "messages": ASK, "stream": stream})
        assert answer.status_code == 200 and "x-engineroom-warning" not in answer.headers


def test_what_is_known_at_the_end_is_told_where_nothing_was_sent_before(run):
    tools = [{"type": "function", "function": {"name": "say"}}]
    run.handler.text = "".join(call(f"fly{n}{'y' * 50}", "{}") for n in range(40))
    header, answer = told(run, CHAT, tools=tools)
    assert IGNORED in header and "'fly0y" in header and len(header) <= 1000
    assert len(answer.json()["choices"][0]["message"]["tool_calls"]) == 40


def test_what_a_client_named_cannot_write_headers(run):
    from engineroom.server.http.call import _header_of

    written = _header_of(["a\r\nx-evil: 1", "b\u2028ü🌸\0", "c" * 2000])
    assert b"\r" not in written and b"\n" not in written and len(written) == 1000
    assert written.startswith(rb"a\r\nx-evil: 1; b\u2028\xfc\U0001f338\x00; cc")
    assert written.endswith(b"c...")

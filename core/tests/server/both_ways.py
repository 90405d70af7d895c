"""A request of OpenAI's chat, sent twice: for the whole answer, and for a streamed one."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx


class Said:
    """What came of a request: content, reasoning, calls, and why it ended."""

    def __init__(self) -> None:
        self.content = self.reasoning = self.finish = ""
        self.calls: list[tuple[str, str]] = []
        self.entries = self.tokens = self.thought = 0


def ask_both(url: str, **body: Any) -> tuple[Said, Said]:
    """The whole answer and the streamed one, which say the same but for calls that were cut."""
    whole, streamed = _ask_whole(url, body), _ask_streamed(url, body)
    assert whole.content.strip() == streamed.content.strip()
    assert (whole.reasoning, whole.finish) == (streamed.reasoning, streamed.finish)
    assert whole.calls == streamed.calls[: len(whole.calls)]
    assert (whole.tokens, whole.thought) == (streamed.tokens, streamed.thought)
    return whole, streamed


def refused_both(url: str, **body: Any) -> str:
    """The same of a request that is refused with 400; gives its message."""
    messages: set[str] = set()
    for stream in (False, True):
        answer = _post(url, body | {"stream": stream})
        assert answer.status_code == 400, answer.text
        messages.add(re.sub(r", request '\w+'", "", answer.json()["error"]["message"]))
    (message,) = messages
    return message


def _post(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(
        f"{url}/v1/chat/completions", json={"model": "m", **body}, timeout=60, verify=False
    )


def _ask_whole(url: str, body: dict[str, Any]) -> Said:
    said = Said()
    answer = _post(url, body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    message = choice["message"]
    said.content, said.finish = message["content"] or "", choice["finish_reason"]
    said.reasoning = message.get("reasoning_content", "")
    made = [each["function"] for each in message.get("tool_calls", ())]
    said.calls = [(each["name"], each["arguments"]) for each in made]
    said.entries = len((choice["logprobs"] or {"content": ()})["content"])
    _count(said, answer.json()["usage"])
    return said


def _ask_streamed(url: str, body: dict[str, Any]) -> Said:
    said = Said()
    answer = _post(url, body | {"stream": True, "stream_options": {"include_usage": True}})
    assert answer.status_code == 200, answer.text
    lines = answer.text.splitlines()
    calls: dict[int, list[str]] = {}
    for chunk in (json.loads(line[6:]) for line in lines if line.startswith("data: {")):
        assert "error" not in chunk, chunk
        if chunk["usage"] is not None:
            _count(said, chunk["usage"])
        for choice in chunk["choices"]:
            delta = choice["delta"]
            said.content += delta.get("content") or ""
            said.reasoning += delta.get("reasoning_content", "")
            said.finish = choice["finish_reason"] or said.finish
            said.entries += len((choice["logprobs"] or {"content": ()})["content"])
            for piece in delta.get("tool_calls", ()):
                _add(calls, piece)
    said.calls = [(name, arguments) for name, arguments in calls.values()]
    return said


def _count(said: Said, usage: dict[str, Any]) -> None:
    said.tokens = usage["completion_tokens"]
    said.thought = usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0)


def _add(calls: dict[int, list[str]], piece: dict[str, Any]) -> None:
    function = piece["function"]
    if piece["index"] not in calls:
        assert set(piece) == {"index", "id", "type", "function"}
        calls[piece["index"]] = [function["name"], ""]
    else:
        assert set(piece) == {"index", "function"} and set(function) == {"arguments"}
    calls[piece["index"]][1] += function["arguments"]

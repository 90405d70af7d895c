"""An answer that is cut anywhere: its stream, put together, is the whole answer, in each API."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from both_ways import ask_both
from tool_doubles import ScriptHandler, call

SAY = [{"role": "user", "content": "x"}]
THOUGHT, CONTENT = "I see\nthis.", "Well, é."
CALLS = "\n".join([call("say", '{"t": "🌸"}'), call("run", "{}")])
TEXT = f"<think>\n{THOUGHT}\n</think>\n\n{CONTENT}\n{CALLS}"
TEXTS = {
    "all": TEXT,
    "thought and calls": f"<think>{THOUGHT}</think>{CALLS}",
    "calls": CALLS,
    "text behind calls": f"One. {call('run', '{}')}\nTwo. {CALLS}\nThree.",
    "text behind a call that is none": f"One. {call('say', '{]')} Two. {call('run', '{}')} é.",
    "no call after all": call("say", '{"t": 1]}') + " so",
    "no call behind its arguments": call("say", '{"t": 1}').replace("}}", "}]") + " so",
}
SIZE = 2
PARAMETERS = {"type": "object"}


@pytest.fixture(scope="module")
def run(start):
    with start(handler=ScriptHandler()) as run:
        run.handler.size = SIZE
        yield run


@pytest.fixture(scope="module")
def http(run):
    with httpx.Client(base_url=run.url, timeout=60) as http:
        yield http


def cuts(run: Any, name: str) -> range:
    """Every place at which a limit may cut a text, and its end."""
    run.handler.text = TEXTS[name]
    return range(1, -(-len(TEXTS[name].encode()) // SIZE) + 1)


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = http.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    return list(map(json.loads, lines))


def whole(http: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def is_prefix(text: str, of: str) -> bool:
    return of.startswith(text.replace("\ufffd", "").strip())


# ── responses ────────────────────────────────────────────────────────────────────────────────


def told_items(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that a stream's deltas make; each is what its end says."""
    items: dict[int, dict[str, Any]] = {}
    for event in found:
        kind, place = event["type"].removeprefix("response."), event.get("output_index")
        if kind == "output_item.added":
            assert place not in items
            items[place] = {**event["item"], "text": ""}
        elif kind.endswith(".delta"):
            items[place]["text"] += event["delta"]
        elif kind == "output_item.done":
            item, text = event["item"], items[place].pop("text")
            is_call = item["type"] == "function_call"
            assert text == (item["arguments"] if is_call else item["content"][0]["text"])
            items[place] = item
    return [items[place] for place in sorted(items)]


def nameless(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items without their ids, and without calls that were cut."""
    kept = [i for i in items if i["type"] != "function_call" or i["status"] == "completed"]
    return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in kept]


@pytest.mark.parametrize("name", TEXTS)
def test_responses(run, http, name):
    tools = [
        {"type": "function", "name": name, "parameters": PARAMETERS} for name in ("say", "run")
    ]
    for limit in cuts(run, name):
        body = {"model": "m", "input": "x", "tools": tools, "max_output_tokens": limit}
        once, found = whole(http, "/v1/responses", body), events(http, "/v1/responses", body)
        final = found[-1]["response"]
        assert nameless(final["output"]) == nameless(once["output"]), limit
        assert nameless(told_items(found)) == nameless(once["output"]), limit
        assert (final["status"], final["usage"]) == (once["status"], once["usage"]), limit
        assert all(item["status"] == "completed" for item in once["output"][:-1])
        for item in once["output"][:-1]:
            assert item["type"] == "function_call" or item["content"][0]["text"], limit


def test_where_reasoning_is_cut_nothing_else_is_there(run, http):
    run.handler.text = TEXT
    body = {"model": "m", "input": "x", "max_output_tokens": 8}
    (item,) = whole(http, "/v1/responses", body)["output"]
    assert (item["type"], item["status"]) == ("reasoning", "incomplete")


# ── messages ─────────────────────────────────────────────────────────────────────────────────


def told_blocks(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks that a stream's deltas make, without the ids; a call that is cut is none."""
    blocks: list[dict[str, Any]] = []
    for event in found:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append({**event["content_block"], "told": ""})
        elif event["type"] == "content_block_delta":
            ((_, value),) = [(k, v) for k, v in event["delta"].items() if k != "type"]
            blocks[event["index"]]["told"] += value
    made = []
    for block in blocks:
        told = block.pop("told")
        if block["type"] != "tool_use":
            made.append({**block, block["type"]: told})
            continue
        try:
            made.append({**block, "input": json.loads(told), "id": None})
        except ValueError:
            pass
    return made


@pytest.mark.parametrize("name", TEXTS)
def test_messages(run, http, name):
    tools = [{"name": name, "input_schema": PARAMETERS} for name in ("say", "run")]
    for limit in cuts(run, name):
        body = {"model": "m", "messages": SAY, "tools": tools, "max_tokens": limit}
        once, found = whole(http, "/v1/messages", body), events(http, "/v1/messages", body)
        blocks = [{**b, "id": None} if "id" in b else b for b in once["content"]]
        assert told_blocks(found) == blocks, limit
        delta = found[-2]
        assert delta["delta"]["stop_reason"] == once["stop_reason"]
        assert delta["usage"] == once["usage"]
        for block in blocks[len(blocks) == 1 :]:
            assert block["type"] == "tool_use" or block[block["type"]], limit


# ── chat, and the own API ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["all", "calls"])
def test_chat(run, name):
    tools = [
        {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}
        for name in ("say", "run")
    ]
    counted = 0
    for limit in cuts(run, name):
        said, streamed = ask_both(run.url, messages=SAY, tools=tools, max_tokens=limit)
        assert said.content == streamed.content
        assert "<" not in said.content + said.reasoning, limit
        assert is_prefix(said.content, CONTENT) and is_prefix(said.reasoning, THOUGHT), limit
        assert counted <= said.thought <= limit
        counted = said.thought
    start, end = (TEXT.index(part) for part in (f"\n{THOUGHT}", "</think>"))
    assert counted == (-(-end // SIZE) - start // SIZE if name == "all" else 0)


def test_the_own_api(run, http):
    tools = [
        {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}
        for name in ("say", "run")
    ]
    timed = (
        "inference_time_ms",
        "queue_time_ms",
        "time_to_first_token_ms",
        "request_id",
        "tool_calls",
    )
    for limit in cuts(run, "all"):
        params = {"max_new_tokens": limit}
        body = {"model_id": "m", "messages": SAY, "tools": tools, "params": params}
        once = whole(http, "/v1/inference", body)
        *deltas, final = events(http, "/v1/inference", body)
        for response in (once, final):
            assert is_prefix(response["generated_text"], CONTENT), limit
        assert {k: v for k, v in once.items() if k not in timed} == {
            k: v for k, v in final.items() if k not in timed
        }
        assert "".join(d.get("text", "") for d in deltas) == once["generated_text"]
        assert "".join(d.get("reasoning", "") for d in deltas) == (once["reasoning"] or "")
        written = TEXT.encode()[: limit * SIZE].decode(errors="ignore")
        inside = any(written.endswith(part) for part in ('"name"', '"arguments": ', "<tool"))
        assert once["cut_call"] or not inside
        assert not once["cut_call"] or "<" in written.partition("</think>")[2] or written == "<t"

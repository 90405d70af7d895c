"""What has broken other servers, on the wire: whole and streamed, cut anywhere.

The runtime is a fake that writes what a test has written down, some characters a token. What of it
is content, reasoning or a call, is the core's doing, and how that is told is the server's.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from both_ways import Said, ask_both
from tool_doubles import ScriptHandler, call

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("say", "run")
]


@pytest.fixture(scope="module")
def run(start):
    with start(handler=ScriptHandler()) as run:
        yield run


def both(run: Any, text: str, size: int = 3, **body: Any) -> tuple[Said, Said]:
    """What comes of a text, told whole and streamed."""
    run.handler.text, run.handler.size = text, size
    asked = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, **body}
    return ask_both(run.url, **asked)


INSIDE = [
    '{"t": "a </tool_call> b"}',
    '{"code": "if (x) { return y }"}',
    '{"note": "a]b"}',
    '{"city": "Zürich 🌸"}',
    '{"drink": "\\ud83c\\udf78"}',
    "{}",
]


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize("arguments", INSIDE)
def test_what_looks_like_markup_inside_of_a_call(run, arguments, size):
    whole, streamed = both(run, call("say", arguments), size)
    assert not whole.content
    ((name, written),) = whole.calls
    assert name == "say" and json.loads(written) == json.loads(arguments)
    assert streamed.calls == whole.calls
    assert whole.finish == "tool_calls"


def test_half_of_a_character_is_never_sent(run):
    for arguments in ('{"t": "\\ud83c"}', '{"t": "\\ud83c', '{"t": "a\\udf78b"}'):
        whole, streamed = both(run, call("say", arguments))
        for _, written in [*whole.calls, *streamed.calls]:
            written.encode()


HALVES = '{"t": "\\ud83c", "\\udf78": ["a\\ud83cb", {"\\\\ud83c": 1}]}'


@pytest.mark.parametrize("written", [HALVES, json.dumps(HALVES)])
def test_what_a_model_writes_of_half_a_character_can_be_sent_back(run, written):
    run.handler.text = call("say", written)
    said, functions = {"role": "user", "content": "x"}, [tool["function"] for tool in TOOLS]

    def post(path, **body):
        answer = httpx.post(run.url + path, json={"model": "m", **body}, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    body = {"messages": [said], "tools": TOOLS}
    message = post("/v1/chat/completions", **body)["choices"][0]["message"]
    (made,) = message["tool_calls"]
    assert "\\ud83c" not in made["function"]["arguments"].replace("\\\\", "")
    result = {"role": "tool", "tool_call_id": made["id"], "content": "ok"}
    post("/v1/chat/completions", **{**body, "messages": [said, message, result]})
    body = {"max_tokens": 99, "tools": [{"name": f["name"], "input_schema": {}} for f in functions]}
    content = post("/v1/messages", messages=[said], **body)["content"]
    post("/v1/messages", messages=[said, {"role": "assistant", "content": content}, said], **body)
    body = {"tools": [{"type": "function", **f} for f in functions]}
    items = post("/v1/responses", input="x", **body)["output"]
    assert [item["type"] for item in items] == ["function_call"]
    post("/v1/responses", input=[said, *items], **body)


@pytest.mark.parametrize("limit", [10, 12, 16, 24, 32, 48])
def test_a_limit_inside_of_a_call(run, limit):
    text = "Yes. " + call("say", '{"t": "' + "a long story " * 9 + '"}')
    whole, streamed = both(run, text, max_tokens=limit)
    assert whole.finish == "length" and not whole.calls
    assert whole.content.strip() == streamed.content.strip() == "Yes."
    assert whole.tokens == limit


@pytest.mark.parametrize("end", ["<tool_call>", '<tool_call>\n{"name": "say", "argu', "<tool_c"])
def test_a_call_that_the_end_cuts_is_no_call_and_no_content(run, end):
    whole, _ = both(run, f"Well. {end}")
    assert (whole.content.strip(), whole.calls, whole.finish) == ("Well.", [], "stop")


@pytest.mark.parametrize("what", ["{ is a brace", '{"a": 1}', "[1, 2]", "a < b and <b>"])
def test_what_is_no_call_is_content(run, what):
    whole, _ = both(run, what)
    assert (whole.content, whole.calls) == (what, [])


@pytest.mark.parametrize("stop", ["\n", "}", "a"])
def test_stops_are_looked_for_in_content_alone(run, stop):
    whole, _ = both(run, call("say", '{"t": "a}\\n"}'), stop=[stop])
    assert len(whole.calls) == 1 and whole.finish == "tool_calls"
    whole, _ = both(run, f"well{stop}then {call('say', '{}')}", stop=[stop])
    assert (whole.content, whole.calls, whole.finish) == ("well", [], "stop")


@pytest.mark.parametrize(
    "text",
    ["<think>so</think>yes", call("say", '{"t": 1}'), f"<think>so</think>ok {call('run', '{}')}"],
)
@pytest.mark.parametrize("size", [1, 4])
def test_there_are_as_many_log_probabilities_as_tokens(run, text, size):
    for said in both(run, text, size, logprobs=True):
        assert said.entries == said.tokens == -(-len(text) // size)


TWO_TEXTS = f"one. {call('say', '{}')}\ntwo. {call('run', '{}')}\nthree."


@pytest.mark.parametrize(
    "text",
    [
        TWO_TEXTS,
        f"<think>so</think>{TWO_TEXTS}",
        f"{TWO_TEXTS}{call('say', '{}')}",
        f"{call('say', '{}')}one.{call('say', '{}')}",
        f"one.{call('say', '{oh')}two.",
        "just text",
    ],
)
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_log_probabilities_are_divided_alike_in_whole_and_in_streams(run, text, size):
    run.handler.text, run.handler.size = text, size
    body = {
        "model": "m",
        "input": "x",
        "tools": [{"type": "function", **tool["function"]} for tool in TOOLS],
        "include": ["message.output_text.logprobs"],
    }

    def post(**more):
        answer = httpx.post(f"{run.url}/v1/responses", json={**body, **more}, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer

    def of_texts(response):
        parts = [part for item in response["output"] for part in item.get("content", ())]
        texts = [part for part in parts if part["type"] == "output_text"]
        return [(part["text"], [e["token"] for e in part["logprobs"]]) for part in texts]

    whole = post().json()
    lines = post(stream=True).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert of_texts(whole) == of_texts(events[-1]["response"])
    written = "".join(token for _, tokens in of_texts(whole) for token in tokens)
    assert written == text
    told = [e for e in events if e["type"] == "response.output_text.delta"]
    streamed = "".join(entry["token"] for event in told for entry in event["logprobs"])
    assert text.startswith(streamed)
    chat = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": TOOLS}
    answer = httpx.post(f"{run.url}/v1/chat/completions", json={**chat, "logprobs": True}).json()
    assert "".join(e["token"] for e in answer["choices"][0]["logprobs"]["content"]) == text


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_reasoning_is_no_content(run, size):
    text = f"<think>\nI </thi {{ see\n</think>\n\nYes. {call('run', '{}')}"
    whole, _ = both(run, text, size)
    assert (whole.reasoning.strip(), whole.content.strip()) == ("I </thi { see", "Yes.")
    assert whole.calls == [("run", "{}")]


def test_a_tool_that_nobody_offered_is_passed_on_with_a_warning(run):
    whole, streamed = both(run, call("fly", '{"to": "the moon"}'))
    assert whole.finish == "tool_calls"
    assert whole.calls == streamed.calls == [("fly", '{"to": "the moon"}')]
    asked = {"model_id": "m", "messages": [{"role": "user", "content": "x"}], "tools": TOOLS}
    (warning,) = httpx.post(f"{run.url}/v1/inference", json=asked).json()["warnings"]
    assert "'fly'" in warning


def test_several_calls(run):
    whole, streamed = both(run, f"{call('say', '{}')}\n{call('run', '{}')}")
    assert whole.calls == streamed.calls == [("say", "{}"), ("run", "{}")]


def test_the_other_apis_tell_the_same(run):
    flower = call("say", '{"t": "🌸"}')
    run.handler.text = f"<think>so</think>ok {flower}"
    asked = {"model": "m", "tools": [{"name": "say", "input_schema": {"type": "object"}}]}
    say = [{"role": "user", "content": "x"}]
    answer = httpx.post(
        f"{run.url}/v1/messages", json={**asked, "messages": say, "max_tokens": 99}
    ).json()
    assert [block["type"] for block in answer["content"]] == ["thinking", "text", "tool_use"]
    assert answer["content"][2]["input"] == {"t": "🌸"} and answer["stop_reason"] == "tool_use"
    flat = [{"type": "function", "name": "say", "parameters": {"type": "object"}}]
    answer = httpx.post(
        f"{run.url}/v1/responses", json={"model": "m", "tools": flat, "input": "x"}
    ).json()
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message", "function_call"]
    assert json.loads(answer["output"][2]["arguments"]) == {"t": "🌸"}

"""`run` and `chat` with tools, schemas and models that think, on a fake that says so."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}}


@pytest.fixture
def agent(site, command):
    """The command, beside a fake that knows tools; ``agent.seen()``: what it was asked."""
    site.agent()
    for name, value in (("tools", [WEATHER]), ("schema", SCHEMA)):
        Path(f"{name}.json").write_text(json.dumps(value))

    def run(*args: str, **more: Any) -> Any:
        return command(*args, **more)

    run.seen = lambda: sys.modules["command_test_agent"].seen  # type: ignore[attr-defined]
    return run


TOOLS = ("--tools", "tools.json")


# ── run ──────────────────────────────────────────────────────────────────────────────────────────


def test_calls_follow_the_text_as_json(agent):
    result = agent("run", "agent:", "twice", *TOOLS, "--tool-choice", "required")
    text, *calls = result.out.splitlines()
    assert (result.status, result.err, text) == (0, "", "I look")
    assert [json.loads(call) for call in calls] == [
        {"id": f"call_{place}", "name": "weather", "arguments": {"city": f"Zürich {place}"}}
        for place in range(2)
    ]
    assert agent.seen()[-1].tools == [WEATHER] and agent.seen()[-1].tool_choice == "required"


def test_json_has_calls_and_reasoning(agent):
    result = agent("run", "agent:", "a", *TOOLS, "--tool-choice", "weather", "--json")
    response = json.loads(result.out)
    assert response["reasoning"] == "let me think\x1b[5m"
    assert response["tool_calls"][0]["name"] == "weather"
    assert agent.seen()[-1].tool_choice.name == "weather"


@pytest.mark.parametrize(
    ("word", "field"), [("on", True), ("off", False), ("low", "low"), (None, None)]
)
def test_how_hard_to_think(agent, word, field):
    assert agent("run", "agent:", "a", *(("--reasoning", word) if word else ())).status == 0
    assert agent.seen()[-1].reasoning == field


def test_the_answer_is_held_to_a_schema(agent):
    assert agent("run", "agent:", "a", "--schema", "schema.json").status == 0
    assert agent.seen()[-1].params.structured_output.json_schema == SCHEMA


@pytest.mark.parametrize("form", [{"tools": [WEATHER]}, WEATHER, [WEATHER["function"]]])
def test_tools_are_read_in_several_forms(agent, form):
    Path("tools.json").write_text(json.dumps(form))
    assert agent("run", "agent:", "a", *TOOLS).status == 0
    assert agent.seen()[-1].tools == [WEATHER]


@pytest.mark.parametrize("command_name", ["run", "chat"])
@pytest.mark.parametrize(
    ("content", "args", "said"),
    [
        (None, TOOLS, "--tools 'tools.json' cannot be read: No such file or directory"),
        (b"{", TOOLS, "--tools 'tools.json' is not JSON: "),
        (b"\xff\xfe\xfd", TOOLS, "--tools 'tools.json' is not JSON: "),
        (b"[" * 200_000, TOOLS, "--tools 'tools.json' is nested too deeply"),
        (b"[]", TOOLS, "has no list of tools; write [{"),
        (b"[{}]", TOOLS, "--tools: 'None' is no name of a tool"),
        (b'{"a": 1}', TOOLS, 'has no list of tools; write [{"type": "function"'),
        (b'[{"a": 1}]', TOOLS, "is no name of a tool; write {"),
        (b'{"a": 1}', ("--schema", "tools.json"), 'as {"type": "object", "properties": {"city"'),
        (b"[1]", TOOLS, "--tools: a tool must be a mapping"),
        (b"3", ("--schema", "tools.json"), "is no JSON schema: it must be a JSON object"),
        (b"[]", ("--tool-choice", "auto"), "--tool-choice needs tools; add --tools FILE"),
        (json.dumps([WEATHER]).encode(), (*TOOLS, "--tool-choice", "x"), "the tools are weather"),
    ],
)
def test_mistakes_name_the_flag_and_the_file(agent, command_name, content, args, said):
    Path("tools.json").unlink()
    if content is not None:
        Path("tools.json").write_bytes(content)
    line = ["agent:", "a"] if command_name == "run" else ["agent:"]
    result = agent(command_name, *line, *args, stdin=b"")
    assert result.status in (1, 2) and said in result.error


@pytest.mark.parametrize("flags", [TOOLS, ("--reasoning", "high")])
def test_tools_and_reasoning_need_the_chat_template(agent, flags):
    assert "--raw leaves it out" in agent("run", "agent:", "a", "--raw", *flags).error


def test_a_cut_call_is_told_of(agent):
    result = agent("run", "agent:", "twice, cut", *TOOLS)
    assert (result.status, len(result.out.splitlines())) == (0, 2)  # the text, and a whole call
    assert "warning: the answer ends within a call" in result.err
    assert "--max-new-tokens allows more" in result.err


# ── chat ─────────────────────────────────────────────────────────────────────────────────────────


def test_who_is_at_the_keyboard_is_the_tools(agent):
    lines = ["twice", "rain", '"""', "snow", "and ice", '"""', "thanks", "/home"]
    result = agent("chat", "agent:", *TOOLS, stdin="".join(f"{s}\n" for s in lines).encode())
    assert result.out.startswith("I look\nit returned snow\nand ice\nI look\n")
    assert 'weather({"city": "Zürich 0"})\nweather({"city": "Zürich 1"})\n' in result.err
    asked = agent.seen()[1].messages
    assert [m.role for m in asked] == ["user", "assistant", "tool", "tool"]
    assert [m.tool_call_id for m in asked[2:]] == ["call_0", "call_1"]
    assert [call["id"] for call in asked[1].tool_calls] == ["call_0", "call_1"]
    assert agent.seen()[-1].messages[-1].content == "/home"  # no command: what the call returned


def test_commands_stay_commands_where_a_result_is_awaited(agent):
    lines = ["one", "/save talk.json", "sun", "two", "/new", "three", "/quit", "four"]
    result = agent("chat", "agent:", *TOOLS, stdin="".join(f"{s}\n" for s in lines).encode())
    assert (result.status, result.out) == (0, "I look\nit returned sun\nI look\nI look\n")
    assert json.loads(Path("talk.json").read_text())["messages"] == []  # a turn that has not ended
    said = [
        [m.content for m in request.messages if m.role != "assistant"] for request in agent.seen()
    ]
    assert said == [["one"], ["one", "sun"], ["one", "sun", "two"], ["three"]]


@pytest.mark.parametrize(
    ("choice", "then"), [("required", None), ("weather", None), ("none", "none")]
)
def test_a_call_has_to_be_in_the_first_answer_of_a_turn_only(agent, choice, then):
    agent("chat", "agent:", *TOOLS, "--tool-choice", choice, stdin=b"one\nsun\ntwo\nrain\n")
    first, second, third, fourth = (request.tool_choice for request in agent.seen())
    assert (second, fourth) == (then, then)
    assert first == third and getattr(first, "name", first) == choice


def test_no_result_is_asked_for_of_a_cut_call(agent):
    result = agent("chat", "agent:", *TOOLS, stdin=b"cut\ntwo, twice cut\nsun\n")
    assert result.out.startswith("I look\nI look\n")
    assert result.err.count("warning: the answer ends within a call") == 2
    assert result.err.count("weather(") == 1  # the one in front of it
    _, second, third = agent.seen()
    assert second.messages[1].tool_calls is None
    assert [len(m.tool_calls or ()) for m in third.messages] == [0, 0, 0, 1, 0]


def test_a_call_without_its_result_is_forgotten(agent):
    result = agent("chat", "agent:", *TOOLS, stdin=b"one\n")
    assert result.status == 0 and len(agent.seen()) == 1


def test_a_conversation_with_a_schema_is_saved(agent):
    lines = "one\n/params\n/save talk.json\n/params structured_output=none\n"
    result = agent("chat", "agent:", "--schema", "schema.json", stdin=lines.encode())
    assert "structured_output=json_schema" in result.err
    saved = json.loads(Path("talk.json").read_text())
    assert saved["params"]["structured_output"] == {"json_schema": SCHEMA}


def test_a_server_is_asked_in_its_own_words(agent, start_server):
    agent("run", "agent:", "a")  # its module is there
    handler = sys.modules["command_test_agent"].Agent()
    url = start_server(handler=handler, models=[{"model_id": "default", "source": "agent:"}])
    result = agent(
        "chat", "--url", url, *TOOLS, "--schema", "schema.json", "--reasoning", "high",
        "--tool-choice", "weather", "--key", "ann-key-0123456789", stdin=b"one\nsun\n",
    )  # fmt: skip
    assert result.out == "I look\nit returned sun\n" and result.status == 0
    first, second = agent.seen()[-2:]
    assert (first.tools, first.tool_choice.name) == ([WEATHER], "weather")
    assert first.reasoning == "high"
    assert first.params.structured_output.json_schema == SCHEMA
    assert [m.role for m in second.messages] == ["user", "assistant", "tool"]


class ForeignServer(BaseHTTPRequestHandler):
    """A fake of other people's servers: one call that has no arguments, and its answer."""

    reason = ""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        name = {"index": 0, "id": "c", "function": {"name": "weather", "arguments": ""}}
        delta = {"tool_calls": [name]} if len(body["messages"]) == 1 else {"content": "fine"}
        event = {"choices": [{"index": 0, "delta": delta, "finish_reason": self.reason}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("reason", "whole"), [("tool_calls", True), ("stop", True), ("length", False)]
)
def test_a_server_may_write_no_arguments_of_a_call_that_is_whole(agent, monkeypatch, reason, whole):
    pytest.importorskip("httpx", reason="needs the extra engineroom[chat]")
    monkeypatch.setattr(ForeignServer, "reason", reason)
    with HTTPServer(("127.0.0.1", 0), ForeignServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        result = agent("chat", "--url", url, *TOOLS, stdin=b"one\nsun\n")
        server.shutdown()
    assert ("weather({})" in result.err) is whole
    assert ("the answer ends within a call" in result.err) is not whole
    assert ("fine" in result.out) is whole

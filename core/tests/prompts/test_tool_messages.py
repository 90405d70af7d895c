"""Tools, calls and results as text of messages."""

import json

import pytest

from engineroom import ChatMessage
from engineroom.prompts import tool_messages
from engineroom.prompts.tool_messages import tools_as_messages
from engineroom.prompts.work import Reading, ReadingStoppedError

TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Größe", "parameters": {}}},
    {"type": "function", "function": {"name": "search"}},
]
CALLS = [
    {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"c": "Bern"}'}},
    {"id": "2", "type": "function", "function": {"name": "search", "arguments": {"q": "é"}}},
]


def user(text):
    return ChatMessage(role="user", content=text)


def result(text):
    return ChatMessage(role="tool", content=text, tool_call_id="1")


def roles(messages):
    return [message.role for message in messages]


def test_definitions_stand_in_the_system_message():
    (system, question) = tools_as_messages([user("hi")], TOOLS)
    assert (system.role, question) == ("system", user("hi"))
    lines = system.content.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    assert [json.loads(line) for line in lines] == TOOLS and "Größe" in system.content
    mine = ChatMessage(role="developer", content="Be brief.")
    (system, _) = tools_as_messages([mine, user("hi")], TOOLS)
    assert system.role == "developer" and system.content.startswith("Be brief.\n\nYou can call")


def test_or_in_the_first_message_of_the_user():
    (question,) = tools_as_messages([user("hi")], TOOLS, system=False)
    assert question.role == "user" and question.content.endswith("\n\nhi")
    assert roles(tools_as_messages([ChatMessage(role="assistant", content="a")], TOOLS)) == [
        "system", "assistant",
    ]  # fmt: skip


def test_calls_and_results_of_a_history_are_text():
    history = [
        user("q"),
        ChatMessage(role="assistant", content="Let me see.", tool_calls=CALLS),
        result("20 °C"),
        result("none"),
        user("thanks"),
    ]
    (_, called, results, last) = tools_as_messages(history, None)
    assert called.role == "assistant" and called.tool_calls is None
    text, *written = called.content.split("<tool_call>\n")
    assert text == "Let me see.\n"
    assert [json.loads(w.split("\n</tool_call>")[0]) for w in written] == [
        {"name": "weather", "arguments": {"c": "Bern"}},
        {"name": "search", "arguments": {"q": "é"}},
    ]
    assert results == user(
        "<tool_response>\n20 °C\n</tool_response>\n<tool_response>\nnone\n</tool_response>"
    )
    assert last == user("thanks")


def test_a_call_without_content_is_the_call_alone():
    message = ChatMessage(role="assistant", tool_calls=CALLS[:1])
    (told,) = tools_as_messages([message], None)
    assert told.content.startswith("<tool_call>\n") and told.content.endswith("\n</tool_call>")


def test_a_history_without_tools_stays_as_it_is():
    history = [user("a"), ChatMessage(role="assistant", content="b"), user("c")]
    assert tools_as_messages(history, None) == history
    assert tools_as_messages(history, []) == history


def test_many_results_one_after_another_are_written_once(monkeypatch):
    """Each behind all before it: seconds for two thousand of them."""
    written, write = [], tool_messages._said
    monkeypatch.setattr(tool_messages, "_said", lambda *said: written.append(said) or write(*said))
    history = [user("q"), *(result(str(i)) for i in range(200)), user("a"), result("last")]
    (_, results, _, last) = tools_as_messages(history, None)
    assert results.content.count("<tool_response>\n") == 200
    assert results.content.endswith("\n<tool_response>\n199\n</tool_response>")
    assert last == user("<tool_response>\nlast\n</tool_response>")
    assert len(written) == 2


def test_they_are_written_for_somebody_who_waits():
    with pytest.raises(ReadingStoppedError), Reading(lambda: True):
        tools_as_messages([user("q"), result("a")], TOOLS)

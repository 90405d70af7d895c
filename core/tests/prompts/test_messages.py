"""Messages as templates walk them, and templates that walk them in another shape."""

from __future__ import annotations

from typing import Any

import pytest

from engineroom import ChatMessage, ConfigurationError
from engineroom.prompts import ChatTemplate, ModelTemplates, for_template

CALL: dict[str, Any] = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Zürich", "days": [1, 2]}'},
}
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}[image]{% endif %}"
    "{% endfor %}</{{ m.role }}>{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}s:{{ m.content }}"
    "{% else %}{% for part in m.content %}p:{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)

SELECTING = (
    "{% for m in messages %}{% for p in m.content | selectattr('type', 'eq', 'text') %}"
    "{{ p['text'] }}{% endfor %}{% endfor %}"
)
WITH_A_SYSTEM_MESSAGE = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('system') }}{% endif %}"
    "{% for p in messages[1].content %}{{ p.text }}{% endfor %}"
)


def user(text: str) -> ChatMessage:
    return ChatMessage(role="user", content=text)


def calling(arguments: Any) -> ChatMessage:
    function = {"name": "f", "arguments": arguments}
    return ChatMessage(role="assistant", tool_calls=[{"id": "1", "function": function}])


def test_what_a_message_lacks_has_no_key() -> None:
    assert for_template([user("a")]) == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("parts", "content"), [(False, ""), (True, [{"type": "text", "text": ""}])]
)
def test_calls_have_content_beside_them_which_templates_look_into(parts, content) -> None:
    calls = [ChatMessage(role="assistant", tool_calls=[CALL])]
    assert "content" not in for_template(calls, parts=parts)[0]  # but where a template needs it
    (message,) = for_template(calls, parts=parts, empty_content=True)
    assert message.keys() == {"role", "tool_calls", "content"}
    assert message["content"] == ([{"type": "text", "text": ""}] if parts else "")


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ('{"a": {"b": [1, "x"]}}', {"a": {"b": [1, "x"]}}),
        ("{}", {}),
        ({"a": 1}, {"a": 1}),
        ("[1]", "[1]"),
        ('"text"', '"text"'),
        ("{broken", "{broken"),
        ("", ""),
        ("[" * 60_000, "[" * 60_000),
        (None, None),
    ],
)
def test_arguments_of_a_call_are_a_mapping_or_as_they_were(arguments: Any, seen: Any) -> None:
    (message,) = for_template([calling(arguments)])
    assert message["tool_calls"][0]["function"]["arguments"] == seen


def test_the_callers_messages_stay_as_they_are() -> None:
    message = ChatMessage(role="assistant", content="a", tool_calls=[CALL])
    for_template([message], parts=True)[0]["tool_calls"][0]["function"]["name"] = "other"
    assert message.content == "a"
    assert message.tool_calls == [CALL]


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{{ m.content | upper | trim }}{% endfor %}", False),
        (PARTS, True),
        (EITHER, False),
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", True),
        ("{% for m in messages %}{{ m.content[0]['text'].strip() }}{% endfor %}", True),
        (SELECTING, True),
        (WITH_A_SYSTEM_MESSAGE, True),
        ("nothing of the conversation", False),
        ("{{ 1 / 0 }}", False),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", False),
    ],
)  # fmt: skip
def test_the_shape_of_content_is_tried_when_a_template_is_loaded(source: str, parts: bool) -> None:
    assert ChatTemplate(source, {}).parts is parts


def test_a_template_that_walks_parts_gets_the_users_text() -> None:
    turns = [user("two words"), ChatMessage(role="assistant", content="x"), user("fifty")]
    assert ChatTemplate(PARTS, {}).render(turns) == (
        "<user>two words</user><assistant>x</assistant><user>fifty</user>"
    )
    assert ChatTemplate(EITHER, {}).render([user("a")]) == "s:a"


def test_arguments_reach_templates_as_a_mapping() -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{{ c.function.arguments | tojson }}/{{ c.function.arguments.city }}"
        "{% endfor %}{% endfor %}"
    )
    messages = [user("a"), ChatMessage(role="assistant", tool_calls=[CALL])]
    rendered = ChatTemplate(source, {}).render(messages)
    assert rendered == '{"city": "Zürich", "days": [1, 2]}/Zürich'


def test_a_template_that_can_only_join_arguments_to_text_gets_text() -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    messages = [user("a"), ChatMessage(role="assistant", tool_calls=[CALL]), calling({"a": "é"})]
    expected = f"weather {CALL['function']['arguments']}" + 'f {"a": "é"}'
    assert ChatTemplate(source, {}).render(messages) == expected


def test_names_beside_the_messages_reach_the_template_and_do_not_replace_them() -> None:
    source = (
        "{{ messages[0].content }}{{ thinking }}{{ add_generation_prompt }}{{ tools | length }}"
    )
    rendered = ChatTemplate(source, {}).render([user("a")], [{"name": "f"}], thinking=True)
    assert rendered == "aTrueTrue1"
    named = {"messages": [], "tools": [], "add_generation_prompt": False}
    turns = [{"role": "user", "content": "a"}]
    assert ChatTemplate(source, {}).write(turns, [{}], named) == "aFalse1"


# ── which template ───────────────────────────────────────────────────────────────────────────


def chosen(option: str | None, own: Any, tools: Any = None) -> str:
    warned: list[ConfigurationError] = []
    templates = ModelTemplates(option, own, {}, warned.append)
    text = templates.choose(tools).render([user("a")])
    assert not warned
    return text


def test_the_option_goes_before_the_models_own_template() -> None:
    named = {"default": "plain", "tool_use": "tools", "rag": "documents"}
    assert chosen(None, "own") == "own"
    assert chosen("option", "own") == "option"
    assert chosen(None, named) == "plain"
    assert chosen(None, named, [{"name": "f"}]) == "tools"
    assert chosen("rag", named, [{"name": "f"}]) == "documents"
    assert chosen("option", named, [{"name": "f"}]) == "option"


def test_without_a_template_there_is_a_hint_what_to_do() -> None:
    for own in (None, "", {}, {"rag": "x"}):
        with pytest.raises(ConfigurationError, match="no chat template; send prompt= instead of"):
            ModelTemplates(None, own, {}, lambda _: None).choose()


def test_a_damaged_template_of_the_model_is_told_and_one_of_the_option_refused() -> None:
    warned: list[ConfigurationError] = []
    templates = ModelTemplates(None, "{% if %}", {}, warned.append)
    assert "the chat template is not valid" in str(warned[0])
    with pytest.raises(ConfigurationError, match=r"no chat template that can be used: .*not valid"):
        templates.choose()
    with pytest.raises(ConfigurationError, match="the chat template is not valid"):
        ModelTemplates("{% if %}", "own", {}, warned.append)


# ── calls, as templates have them ────────────────────────────────────────────────────────────────

TOLD = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.id }}:{{ c.function.name }}{% endfor %}"
    "{{ m.tool_call_id }}{% endfor %}"
)
SHORT_IDS = (
    "{% for m in messages %}{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('nine characters') }}{% endif %}{% endfor %}"
    "{% if m.role == 'tool' and m.tool_call_id | length != 9 %}"
    "{{ raise_exception('nine characters') }}{% endif %}{% endfor %}"
) + TOLD
ONE_CALL = (
    "{% for m in messages %}{% if m.tool_calls | length > 1 %}"
    "{{ raise_exception('one call at once') }}{% endif %}{% endfor %}"
) + TOLD
FIRST_CALL = TOLD.replace("in m.tool_calls", "in (m.tool_calls or [])[:1]")
LOOKS_INTO_OLD_CONTENT = (
    "{% for m in messages %}{% if not loop.last and m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}"
) + TOLD
NO_CALLS = "{% for m in messages %}<{{ m.role }}>{{ m.content | tojson }}{% endfor %}"


def calls(*names: str) -> ChatMessage:
    several = [{"id": f"call_{n}", "function": {"name": n, "arguments": "{}"}} for n in names]
    return ChatMessage(role="assistant", tool_calls=several)


def result(name: str) -> ChatMessage:
    return ChatMessage(role="tool", tool_call_id=f"call_{name}", content=f"({name})")


def test_ids_of_calls_and_results_fit_where_a_template_wants_short_ones() -> None:
    told = ChatTemplate(SHORT_IDS, {}).conversation([user("a"), calls("f", "g"), result("f")])
    ids = [call["id"] for call in told[1]["tool_calls"]]
    assert told[2]["tool_call_id"] == ids[0] != ids[1]
    assert all(len(one) == 9 and one.isalnum() and one.isascii() for one in ids)
    kept = for_template([ChatMessage(role="assistant", tool_calls=[CALL])], short_ids=True)
    assert kept[0]["tool_calls"][0]["id"] == CALL["id"]
    assert "call_f:f" in ChatTemplate(TOLD, {}).render([user("a"), calls("f"), result("f")])


@pytest.mark.parametrize("source", [ONE_CALL, FIRST_CALL])
def test_each_call_is_a_message_with_its_result_where_a_template_has_one_at_once(source) -> None:
    turns = [user("a"), calls("f", "g", "h"), result("x"), result("h"), result("f"), user("b")]
    assert ChatTemplate(source, {}).render(turns) == (
        "<user>a<assistant>call_f:f<tool>(f)call_f<assistant>call_g:g"
        "<assistant>call_h:h<tool>(h)call_h<tool>(x)call_x<user>b"
    )
    together = "<user>a<assistant>call_f:fcall_g:g<tool>(g)call_g"
    assert ChatTemplate(TOLD, {}).render([user("a"), calls("f", "g"), result("g")]) == together


@pytest.mark.parametrize("source", [LOOKS_INTO_OLD_CONTENT, NO_CALLS])
def test_calls_have_content_where_only_later_messages_show_that_a_template_needs_it(source) -> None:
    rendered = ChatTemplate(source, {}).render([user("a"), calls("f"), result("f"), user("b")])
    assert "(f)" in rendered

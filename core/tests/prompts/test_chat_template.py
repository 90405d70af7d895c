"""Chat templates: what they may use, what they may not, and how their failures are told."""

from __future__ import annotations

import gc
import traceback
import weakref
from datetime import datetime
from typing import Any

import pytest

from engineroom import ChatMessage, ConfigurationError
from engineroom.prompts import ChatTemplate

# As in the files of many models: whitespace control, special tokens, an optional system message.
CHATML = """\
{%- if messages[0].role != 'system' %}
    {{- bos_token + '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Only system, user and assistant are known.') }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def chat(*turns: tuple[str, str]) -> list[ChatMessage]:
    return [ChatMessage.model_validate({"role": role, "content": text}) for role, text in turns]


HELLO = chat(("user", "hello"))


def render(source: str, messages: list[ChatMessage] | None = None, **tokens: str) -> str:
    return ChatTemplate(source, tokens).render(HELLO if messages is None else messages)


def refusal(source: str, messages: list[ChatMessage] | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        render(source, messages)
    return str(caught.value)


# ── what templates may use ──────────────────────────────────────────────────────────────────────


def test_a_conversation_becomes_the_prompt_that_its_model_knows() -> None:
    turns = chat(("user", " Hi! "), ("assistant", "Hello."), ("user", "Bye <b> & é"))
    assert render(CHATML, turns, bos_token="<s>") == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi!<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye <b> & é<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_template_renders_again_and_again_the_same() -> None:
    template = ChatTemplate(CHATML, {"bos_token": ""})
    first = template.render(HELLO)
    template.render(chat(("system", "x"), ("user", "y")))
    assert template.render(HELLO) == first


def test_blocks_leave_no_whitespace_behind() -> None:
    # trim_blocks and lstrip_blocks, without which the prompts of most models would be others.
    assert render("{% if true %}\n  a\n  {% endif %}\nb") == "  a\nb"


def test_what_a_message_does_not_have_is_undefined() -> None:
    source = (
        "{% for m in messages %}{{ m.name is defined }} {{ m.tool_calls is defined }};{% endfor %}"
    )
    messages = [ChatMessage(role="user", content="a", name="b"), *HELLO]
    assert render(source, messages) == "True False;False False;"


def test_tools_and_documents_are_none_rather_than_undefined() -> None:
    # `tools is not none` is what templates ask, and it is true of what is undefined.
    source = "{% if tools is not none %}TOOLS{% endif %}{% if documents is not none %}D{% endif %}"
    assert render(source) == ""


def test_json_is_not_escaped() -> None:
    messages = chat(("user", "<é> & \"'"))
    assert render("{{ messages[0].content | tojson }}", messages) == '"<é> & \\"\'"'


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", '{"b": 1, "a": "é"}'),
        ("indent=1", '{\n "b": 1,\n "a": "é"\n}'),
        ("sort_keys=true", '{"a": "é", "b": 1}'),
        ("separators=(',', ':')", '{"b":1,"a":"é"}'),
        ("ensure_ascii=true", '{"b": 1, "a": "\\u00e9"}'),
        ("true", '{"b": 1, "a": "\\u00e9"}'),  # first by position, as in transformers
    ],
)
def test_json_takes_the_arguments_that_it_takes_in_transformers(
    arguments: str, expected: str
) -> None:
    assert render("{{ {'b': 1, 'a': 'é'} | tojson(" + arguments + ") }}") == expected


def test_strftime_now_is_the_local_time() -> None:
    before = datetime.now().astimezone()
    found = datetime.fromisoformat(render("{{ strftime_now('%Y-%m-%dT%H:%M:%S.%f%z') }}"))
    assert before <= found <= datetime.now().astimezone()


def test_loops_may_be_left_and_continued() -> None:
    source = (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
        "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    )
    assert render(source) == "023"


# Models that were trained with transformers' mask of the assistant's tokens have these tags.
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("a\n{%- generation -%}\n b \n{%- endgeneration -%}\nc", "abc"),
        ("a\n  {% generation %}\n  b\n  {% endgeneration %}\nc", "a\n  b\nc"),
        (
            "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
            "user",
        ),
        ("{% generation %}{% if true %}x{% endif %}{% endgeneration %}", "x"),
        # What is set inside stays inside, as in transformers; a namespace does not.
        ("{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}", "21"),
        (
            "{% set n = namespace() %}{% generation %}{% set n.a = 2 %}{% endgeneration %}{{ n.a}}",
            "2",
        ),
    ],
)
def test_the_body_of_generation_tags_is_written_as_it_is(source: str, expected: str) -> None:
    assert render(source) == expected


# ── how failures are told ───────────────────────────────────────────────────────────────────────


def test_a_refusal_says_what_the_template_says_and_which_roles_there_were() -> None:
    messages = chat(("user", "a"), ("tool", "b"))
    message = refusal("{% set bos_token = '' %}" + CHATML, messages)
    assert "Only system, user and assistant are known." in message
    assert "user → tool" in message
    assert "refuses" in message


def test_a_refusal_does_not_say_all_of_a_conversation_back() -> None:
    template = ChatTemplate("{{ raise_exception(messages[0].content) }}", {})
    with pytest.raises(ConfigurationError) as caught:
        template.render(chat(("user", "secret" * 1000)))
    told = "".join(traceback.format_exception(caught.value))
    assert told.count("secret") < 200


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ 'open }}",
        "{% nothing %}",
        "{% for m in messages %}",
        "{% generation %}a",
        "{% break %}",  # Jinja takes it; the Python that it makes of it is not valid
        "{{ " + "9" * 5000 + " }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ 1 | unknown }}",
    ],
)
def test_a_template_that_is_not_valid_is_told_when_it_is_read(source: str) -> None:
    with pytest.raises(ConfigurationError, match="chat template is not valid"):
        ChatTemplate(source, {})


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ strftime_now(3) }}", "TypeError"),
        ("{{ 'a' | xmlattr }}", "AttributeError"),
        ("{{ messages | tojson(indent=messages) }}", "TypeError"),
        ("{% include 'x' %}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ range(999999) }}", "OverflowError"),
        ("{{ '\\ud800' }}", "UnicodeEncodeError"),  # which no tokenizer could read
    ],
)
def test_a_template_that_fails_is_told_with_its_kind_of_error(source: str, kind: str) -> None:
    message = refusal(source)
    assert f"{kind}: " in message
    assert "(roles: user)" in message
    assert "prompt=" in message


# ── the sandbox ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ (messages | attr('__class__')).__subclasses__() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) | length > 0 and ''.__class__.mro() }}",
        "{{ cycler.__init__.__globals__.os.popen('true') }}",
        "{{ self._TemplateReference__context }}{{ self.__init__.__globals__ }}",
    ],
)
def test_a_template_does_not_get_out_of_the_sandbox(source: str) -> None:
    assert "SecurityError" in refusal(source) or "UndefinedError" in refusal(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ messages[0].pop('role') }}",
        "{% set messages[0].role = 'system' %}",
    ],
)
def test_a_template_does_not_change_the_messages(source: str) -> None:
    with pytest.raises(ConfigurationError):
        render(source)
    # Nor would the caller's own have been changed: the template has copies.
    assert [message.model_dump(exclude_none=True) for message in HELLO] == [
        {"role": "user", "content": "hello"}
    ]


def test_a_template_does_not_change_what_another_one_sees() -> None:
    changing: Any = "{% set raise_exception = 1 %}{% set bos_token = 'x' %}{{ bos_token }}"
    template = ChatTemplate(changing, {"bos_token": "<s>"})
    assert template.render(HELLO) == "x"
    assert render("{{ bos_token }}{{ raise_exception is callable }}", bos_token="<s>") == "<s>True"


def test_a_template_that_fails_keeps_nothing_of_its_callers() -> None:
    class Weights: ...

    def load() -> weakref.ref[Weights]:
        weights = Weights()
        ChatTemplate("{{ messages[0].content + none }}", {})  # it is tried out, and fails
        with pytest.raises(ConfigurationError, match="TypeError"):
            render("{{ messages[0].content + none }}")
        return weakref.ref(weights)

    gc.collect()
    gc.disable()
    try:
        assert load()() is None
    finally:
        gc.enable()


def test_a_refusal_of_a_long_conversation_names_the_first_roles() -> None:
    template = ChatTemplate("{{ raise_exception('no') }}", {})
    many = [ChatMessage(role="user", content="x")] * 100_000
    with pytest.raises(ConfigurationError) as caught:
        template.render(many)
    assert "user → … 99980 more" in str(caught.value)
    assert len(str(caught.value)) < 1000

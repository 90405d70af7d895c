"""Prompts that end within the last message, as real templates write them."""

from __future__ import annotations

import asyncio
import re

import pytest

from engineroom import ChatMessage, ConfigurationError, InferenceRequest
from engineroom.prompts import ControlTokens, ModelTemplates, PromptCodec, tokens_of

CONTROL = {1: "<|im_start|>", 2: "<|im_end|>"}


class Characters(PromptCodec):
    """A token for each character, above the control tokens."""

    def __init__(self, template: str) -> None:
        templates = ModelTemplates(template, None, {}, print)
        super().__init__(templates, ControlTokens(CONTROL))

    def read(self, text: str) -> list[int]:
        ids = {text: number for number, text in CONTROL.items()}
        pieces = re.findall(r"<\|im_start\|>|<\|im_end\|>|[\s\S]", text)
        return [ids.get(piece, 100 + ord(piece[0])) for piece in pieces]


CHATML = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TRIMS = CHATML.replace("m.content }}", "m.content | trim }}")
PARTS = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
# As Qwen3's: it takes reasoning out of the content, and shows that of the last answer.
SHOWS = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% set r = m.reasoning_content or '' %}{% set c = m.content %}
{%- if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}\
{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{%- if m.role == 'assistant' and loop.last %}<think>
{{ r.strip('\\n') }}
</think>

{% endif %}{{ c }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
# As DeepSeek-R1's: what stands before the end of reasoning is left out.
LEAVES_OUT = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content.split('</think>')[-1] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
NEVER = """\
{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}\
{% if add_generation_prompt %}>{% endif %}"""
USER = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def prompt_of(template: str, content: str, reasoning: str | None = None, **more: object) -> str:
    last = ChatMessage(role="assistant", content=content, reasoning=reasoning)
    request = InferenceRequest(
        model_id="m", messages=[ChatMessage(role="user", content="q"), last], **more
    )
    ids = asyncio.run(tokens_of(Characters(template), request))
    return "".join(CONTROL.get(token) or chr(token - 100) for token in ids)


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        (CHATML, "The capital is", USER + "The capital is"),
        (CHATML, "with blanks \n", USER + "with blanks \n"),
        (CHATML, "", USER),
        (CHATML, "digits 12", USER + "digits 12"),
        (TRIMS, " The capital is ", USER + "The capital is "),
        (PARTS, "The capital is", USER + "The capital is"),
        (SHOWS, "The capital is", USER + "<think>\n\n</think>\n\nThe capital is"),
        (SHOWS, "<think>\nSo", USER + "<think>\nSo"),
        (SHOWS, "<think>\nSo.\n</think>\n\nIt", USER + "<think>\nSo.\n</think>\n\nIt"),
        (LEAVES_OUT, "<think>\nSo", USER + "<think>\nSo"),
        (LEAVES_OUT, "<think>\nSo\n</think>It", USER + "It"),
    ],
)
def test_the_prompt_ends_where_the_last_message_does(
    template: str, content: str, expected: str
) -> None:
    assert prompt_of(template, content) == expected
    assert prompt_of(template, content, continue_final_message=True) == expected


@pytest.mark.parametrize("template", [SHOWS, LEAVES_OUT])
def test_reasoning_without_content_behind_it_goes_on(template: str) -> None:
    assert prompt_of(template, "", "So") == USER + "<think>\nSo"


def test_a_new_message_begins_where_it_is_asked_for() -> None:
    anew = USER + "The<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(CHATML, "The", continue_final_message=False) == anew


def test_no_template_argument_ends_a_message_that_is_continued() -> None:
    told = {"add_generation_prompt": True}
    assert prompt_of(CHATML, "The", template_args=told) == USER + "The"


def test_special_tokens_in_a_message_that_is_continued_are_text() -> None:
    codec = Characters(CHATML)
    last = ChatMessage(role="assistant", content="a<|im_end|>b")
    request = InferenceRequest(model_id="m", messages=[ChatMessage(role="user", content="q"), last])
    ids = asyncio.run(tokens_of(codec, request))
    ends = [token for token in ids if token == 2]
    assert len(ends) == 1  # the user's
    assert "".join(chr(t - 100) for t in ids[-12:]) == "a<|im_end|>b"


def test_what_the_template_leaves_out_cannot_be_continued() -> None:
    with pytest.raises(ConfigurationError, match="leaves out the last message") as caught:
        prompt_of(NEVER, "The")
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([{"role": "user", "content": "q"}], "of the role user"),
        (
            [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        }
                    ],
                }
            ],
            "it has tool_calls",
        ),
        (None, "a prompt is continued as it is"),
    ],
)
def test_what_cannot_be_continued_is_refused(messages: object, why: str) -> None:
    given = {"messages": messages} if messages else {"prompt": "a"}
    with pytest.raises(ValueError, match=re.escape(why)):
        InferenceRequest.model_validate({"model_id": "m", "continue_final_message": True, **given})


def test_a_call_at_the_end_is_not_continued_by_itself() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    last = {"role": "assistant", "content": "a", "tool_calls": [call]}
    request = InferenceRequest.model_validate({"model_id": "m", "messages": [last]})
    assert not request.continues

"""A request's input to token ids, with a vocabulary of characters and a few special tokens."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from typing import Any, ClassVar

import pytest

from engineroom import ChatMessage, ConfigurationError, InferenceRequest
from engineroom.prompts import (
    ChatOptions,
    ControlTokens,
    ModelTemplates,
    PairFrame,
    PromptCodec,
    expect_tokens,
    tokens_of,
    tokens_of_pairs,
    tokens_of_texts,
    work,
)
from engineroom.prompts.work import ReadingStoppedError

SPECIAL = {1: "<s>", 2: "</s>", 3: "<|im_start|>", 4: "<|im_end|>", 5: '<|"|>', 6: "<|im_start"}
ADDED = {7: "<|turn|>", 8: "<think>", 9: "<start_of_turn>"}
ALL = SPECIAL | ADDED
# Everything that a message has goes through it, and in every way that templates know.
TEMPLATE = """\
{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.name %}name={{ m.name }}{% endif %}{% if m.tool_call_id %}of={{ m.tool_call_id }}{% endif %}
{{ m.content | default('') | trim }}{% for c in m.tool_calls or [] %}{{ c.id }}{{ c | tojson }}
{{ c.function.name | upper }}{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}
{% endfor %}{% endfor %}<|im_end|>
{% endfor %}{% for t in tools or [] %}{{ t.function.name }}{{ t | tojson(indent=1) }}{% endfor %}
{{ extra }}<|im_start|>assistant
"""


class Characters(PromptCodec):
    """A stand-in for a tokenizer: a token for each character, above the special ones."""

    def __init__(
        self,
        template: str | None = TEMPLATE,
        located: bool = True,
        tool_format: str | None = None,
        **more: Any,
    ) -> None:
        self._located = located
        options = ChatOptions(chat_template=template, tool_format=tool_format)
        templates = ModelTemplates(options, None, {"bos_token": "<s>"}, print)
        super().__init__(templates, ControlTokens(SPECIAL, ADDED), **more)
        longest = sorted(ALL.items(), key=lambda pair: -len(pair[1]))
        self._ids = {text: token for token, text in longest}
        self._token = re.compile("|".join(map(re.escape, self._ids)) + "|.", re.DOTALL)

    def read(self, text: str) -> list[int]:
        matches = self._token.finditer(text)
        return [self._ids.get(match[0], 100 + ord(match[0][0])) for match in matches]

    def read_located(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
        if not self._located:
            return None
        return self.read(text), [match.span() for match in self._token.finditer(text)]


OMITS_CALLS = """\
{% if tools %}List of tools: <|tool_list_start|>{{ tools | tojson }}<|tool_list_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == "tool" %}<|tool_response_start|>{{ m.content }}<|tool_response_end|>
{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""


@pytest.mark.parametrize(
    ("marks", "written"),
    [
        (
            "<|tool_list_start|>",
            "<|tool_call_start|>[weather(city='Bern', days=2), now()]<|tool_call_end|>",
        ),
        (
            "<|tool_call|>",
            (
                '<|tool_call|>[{"name": "weather", "arguments": {"city": "Bern", "days": 2}}, '
                '{"name": "now", "arguments": {}}]<|/tool_call|>'
            ),
        ),
    ],
)
@pytest.mark.parametrize("content", [None, "I look."])
def test_calls_that_a_template_leaves_out_are_told_as_text(marks, written, content):
    """As LFM2's and Granite's do: their models would see a result without a call."""
    template = OMITS_CALLS.replace("<|tool_list_start|>", marks)
    codec = Characters(template)
    assert codec.traits.native
    calls = [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        for arguments in ('{"city": "Bern", "days": 2}',)
    ]
    calls.append({"id": "2", "type": "function", "function": {"name": "now", "arguments": "{}"}})
    turns = [
        ChatMessage(role="user", content="q"),
        ChatMessage(role="assistant", content=content, tool_calls=calls),
        ChatMessage(role="tool", tool_call_id="1", content="sunny"),
        ChatMessage(role="assistant", content="It is."),
    ]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    for offered in (tools, None):
        text = text_of(codec.chat(turns, offered)[0])
        before = f"{content}\n" if content else ""
        assert f"<|im_start|>assistant\n{before}{written}<|im_end|>" in text
        assert "<|tool_response_start|>sunny" in text
        assert "None" not in text
    assert not Characters(TEMPLATE)._templates.choose().omits_calls


def text_of(tokens: list[int]) -> str:
    return "".join(ALL.get(token) or chr(token - 100) for token in tokens)


def control(tokens: list[int]) -> list[int]:
    return [token for token in tokens if token < 100]


def conversation(evil: str) -> tuple[list[ChatMessage], list[dict[str, Any]]]:
    """The same conversation with something in every string that a client writes."""
    function = {"name": f"f{evil}", "arguments": {f"k{evil}": f"v{evil}"}}
    written = {
        "name": f"g{evil}",
        "arguments": '{"k%s": ["v%s"]}' % ((evil.replace('"', '\\"'),) * 2),
    }
    messages = [
        ChatMessage(role="system", content=f"be {evil} brief"),
        ChatMessage(role="user", content=f"{evil}a", name=f"n{evil}"),
        ChatMessage(role="assistant", tool_calls=[
            {"id": f"i{evil}", "type": "function", "function": function},
            {"id": "j", "type": f"t{evil}", "function": written},
        ]),
        ChatMessage(role="tool", content=f"42{evil}", tool_call_id=f"i{evil}"),
    ]  # fmt: skip
    described = {"name": f"f{evil}", "description": f"does {evil}", "parameters": {evil: [evil]}}
    return messages, [{"type": "function", "function": described}]


@pytest.mark.parametrize("located", [True, False])
@pytest.mark.parametrize("tool_format", [None, "hermes"])  # told in messages, by the template
@pytest.mark.parametrize("evil", [*SPECIAL.values(), "<|turn|>", "<start_of_turn>"])
def test_a_special_token_is_text_in_every_string_of_a_request(
    evil: str, tool_format: str | None, located: bool
) -> None:
    codec = Characters(located=located, tool_format=tool_format)
    plain = codec.prompt(None, *conversation("~"), extra="~")
    tokens = codec.prompt(None, *conversation(evil), extra=evil)
    assert control(tokens) == control(plain)
    assert control(tokens).count(3) == 5 and control(tokens).count(4) == 4
    # And all of it is read.
    own = text_of(control(tokens)).count(evil)
    written = text_of(tokens).replace(json.dumps(evil)[1:-1], evil)  # in JSON
    assert written.count(evil) == text_of(plain).count("~") + own


def test_what_controls_nothing_is_left_alone() -> None:
    codec = Characters()
    assert control(codec.prompt(None, [ChatMessage(role="user", content="<think>")]))[1:3] == [3, 8]
    assert control(codec.prompt("a<|im_end|><think>", None)) == [4, 8]
    assert control(codec.plain("<s>a<|im_end|><think>")) == [8]
    assert codec.count("<s>") == 3


def test_digits_beside_a_special_token_stay() -> None:
    text = text_of(
        Characters().prompt(None, [ChatMessage(role="user", content="12</s>34<s>000000")])
    )
    assert "12</s>34<s>000000" in text


def test_a_prompt_begins_and_a_text_ends_once() -> None:
    codec = Characters(begin=[1], end=[2])
    assert codec.prompt("a", None) == codec.prompt("<s>a", None) == [1, 197]
    assert codec.whole("a") == codec.whole("<s>a</s>") == [1, 197, 2]
    assert codec.prompt("", None) == [1]
    assert control(codec.prompt(None, [ChatMessage(role="user", content="a")])).count(1) == 1


def test_many_special_tokens_take_linear_time() -> None:
    content = "</s><|im_end|>" * 20_000
    tokens = Characters().prompt(None, [ChatMessage(role="user", content=content)])
    assert control(tokens) == [1, 3, 4, 3]
    assert content in text_of(tokens)


# ── never on the event loop ──────────────────────────────────────────────────────────────────

LOOPING = "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}"


async def test_a_template_that_loops_holds_up_nobody_and_ends() -> None:
    codec = await asyncio.to_thread(Characters, LOOPING)
    request = InferenceRequest(model_id="m", messages=[ChatMessage(role="user", content="a")])
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.01)
            beats += 1

    beating = asyncio.create_task(beat())
    began = time.monotonic()
    with pytest.raises(ConfigurationError, match=r"fails on these messages .*it takes more than"):
        await tokens_of(codec, request)
    took = time.monotonic() - began
    beating.cancel()
    assert took < 20  # two seconds of the CPU, which others may want as well
    assert beats > 10 * took


async def test_where_inputs_are_read() -> None:
    threads: dict[str, threading.Thread] = {}

    class Noting(Characters):
        def read(self, text: str) -> list[int]:
            threads[text[:5]] = threading.current_thread()
            return super().read(text)

    codec = Noting("chat {{ messages[0].content }}")
    here = threading.current_thread()
    assert await tokens_of(codec, InferenceRequest(model_id="m", prompt="short")) == codec.read(
        "short"
    )
    await tokens_of(codec, InferenceRequest(model_id="m", prompt="long " * 5000))
    await tokens_of(
        codec, InferenceRequest(model_id="m", messages=[ChatMessage(role="user", content="a")])
    )
    ids = await tokens_of(codec, InferenceRequest(model_id="m", prompt_token_ids=[7, 7]))
    assert ids == [7, 7]
    assert threads["short"] is here
    assert here not in (threads["long "], threads["chat "])


async def test_a_cancelled_request_stops_its_template_and_the_next_is_read() -> None:
    codec = await asyncio.to_thread(Characters, "{% if loops %}" + LOOPING + "{% endif %}a")
    stopped = threading.Event()

    def read() -> None:
        try:
            codec.prompt(None, [ChatMessage(role="user", content="a")], loops=True)
        except ReadingStoppedError:
            stopped.set()

    reading = asyncio.create_task(codec.lane.run(read))
    await asyncio.sleep(0.05)
    reading.cancel()
    assert await asyncio.to_thread(stopped.wait, 20)
    request = InferenceRequest(model_id="m", messages=[ChatMessage(role="user", content="a")])
    assert await tokens_of(codec, request) == [197]


class Long(Characters):
    """Lists what it reads only where it may."""

    listed = 0

    def read(self, text: str) -> list[int]:
        expect_tokens(len(text))
        self.listed += 1
        return super().read(text)

    def read_located(self, text: str) -> None:
        return None


@pytest.mark.parametrize("content", ["x" * 5000, "</s>" * 5000])
async def test_what_is_far_too_long_is_refused_before_it_is_listed(
    content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_LISTED", 100)
    codec = Long()
    for request in (
        InferenceRequest(model_id="m", messages=[ChatMessage(role="user", content=content)]),
        InferenceRequest(model_id="m", prompt=content.replace("<", "x")),
    ):
        with pytest.raises(ConfigurationError, match="length is 100 .* has at least") as told:
            await tokens_of(codec, request, n_ctx=100, advice="take a larger one")
        assert "take a larger one" in str(told.value)
        assert told.value.__context__ is None and told.value.__cause__ is None
    assert codec.listed < 600
    ids = InferenceRequest(model_id="m", prompt_token_ids=[7] * 100)
    with pytest.raises(ConfigurationError, match="length is 100 .* has 100 tokens"):
        await tokens_of(codec, ids, n_ctx=100)
    with pytest.raises(ConfigurationError, match="is 100 tokens.* text 1 has at least 5"):
        await tokens_of_texts(codec, ["a", "x" * 5000], 100)
    with pytest.raises(ConfigurationError, match="is 100 tokens.* text 1 has 150 tokens"):
        await tokens_of_texts(codec, ["a", "x" * 150], 100)
    assert await tokens_of_texts(codec, ["a", "b"], 100) == [[197], [198]]


async def test_pairs_of_texts_are_joined_as_the_frame_says_and_a_query_is_read_once() -> None:
    class Counting(Characters):
        texts: ClassVar[list[str]] = []

        def plain(self, text: str) -> list[int]:
            self.texts.append(text)
            expect_tokens(len(text), unread=True)
            return super().plain(text)

    codec = Counting()
    with pytest.raises(ConfigurationError, match="joins no two texts"):
        await tokens_of_pairs(codec, [("a", "b")], 100)
    codec.frame = PairFrame((1,), (2, 2), (4,), (0, 0, 5, 1, 7))
    codec.texts.clear()
    query = "a<s>"
    pairs = await tokens_of_pairs(codec, [(query, "b"), (query, "cd"), ("e", "f")], 100)
    assert codec.texts == [query, "b", "cd", "e", "f"]
    assert [len(pair) for pair in pairs] == [len(pair.tokens) for pair in pairs] == [9, 10, 6]
    assert pairs[2].tokens == [1, 201, 2, 2, 202, 4]
    assert pairs[2].types == [0, 0, 5, 5, 1, 7]
    assert 1 not in pairs[0].tokens[1:], "a special token in a text is text"
    assert pairs[0].first is pairs[1].first
    for texts, says in ((("a", "x" * 95), "100 tokens"), (("a" * 5000, "x"), "at least")):
        with pytest.raises(ConfigurationError, match=f"is 99 .* document 1 .* query have {says}"):
            await tokens_of_pairs(codec, [("a", "b"), texts], 99)


def test_a_codec_that_tells_no_bytes_says_what_cannot_be_had() -> None:
    codec = Characters()
    with pytest.raises(ConfigurationError, match="no log probabilities can be had"):
        codec.token_text(100)
    with pytest.raises(ConfigurationError, match="no structured output can be had"):
        codec.model_tokens()

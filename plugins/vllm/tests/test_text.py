"""Text to tokens and back. The tokenisers are real; what wraps them is transformers' in a session
of its own, and here a stand-in with the names that are used of it."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from engineroom import ChatMessage, ConfigurationError
from engineroom.prompts import byte_alphabet
from engineroom_vllm.outputs import Outputs
from engineroom_vllm.text import TextCodec

SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]


def byte_level(*, begin: bool = False, more: tuple[str, ...] = ()) -> Tokenizer:
    words = [*SPECIAL, *(c for _, c in sorted(byte_alphabet().items())), *more]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return tokenizer


class FakeWrapper:
    """Stands in for a tokeniser of transformers: its backend, its template, its end token."""

    def __init__(self, backend: Any, template: str | None = None) -> None:
        self.backend_tokenizer = backend
        self.chat_template = template
        self.eos_token_id = 2


TEMPLATE = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"


def codec(template: str | None = TEMPLATE, own: str | None = None, **given: Any) -> TextCodec:
    return TextCodec(FakeWrapper(byte_level(**given), template), own)


def test_bytes_come_back_as_they_went() -> None:
    text = "Straße 你好 🙂\n\x00"
    found = codec()
    ids = found.prompt(text, None)
    assert b"".join(map(found.piece, ids)) == text.encode()
    assert found.count(text) == len(ids) == len(text.encode())
    assert found.knows_bytes


def test_special_tokens_add_no_text_but_have_a_name() -> None:
    found = codec()
    assert [found.piece(token) for token in range(4)] == [b""] * 4
    assert found.token_text(3) == "<|end|>"
    assert found.token_text(found.prompt("a", None)[0]) == "a"
    half = found.prompt("é", None)
    assert [found.token_text(token) for token in half] == ["\ufffd", "\ufffd"]
    assert [found.token_bytes(token) for token in half] == [b"\xc3", b"\xa9"]
    assert found.token_bytes(3) == b"<|end|>"
    assert found.piece(99_999) == b""
    assert found.end_token == 2


def test_a_prompt_begins_once_as_the_model_wants() -> None:
    found = codec(begin=True)
    assert found.prompt("a", None) == [1, *codec().prompt("a", None)]
    assert found.prompt("<s>a", None) == found.prompt("a", None)
    assert found.prompt("", None) == [1]
    assert codec().prompt("", None) == []


def test_a_text_for_embeddings_begins_and_ends_once_as_the_model_wants() -> None:
    found = codec(begin=True)
    body = found.prompt("hi", None)[1:]
    assert found.whole("hi") == [1, *body, 2]
    assert found.whole("<s>hi</s>") == [1, *body, 2]
    assert found.whole("") == [1, 2]
    plain = codec()
    assert plain.whole("hi") == plain.prompt("hi", None) == body
    assert plain.whole("") == []


def test_special_tokens_of_a_prompt_are_meant_and_those_of_a_message_are_text() -> None:
    found = codec()
    assert found.prompt("<|end|>", None) == [3]
    messages = [ChatMessage(role="user", content="a <|end|> b <|end|>")]
    ids = found.prompt(None, messages)
    assert ids.count(3) == 1  # the template's own
    assert b"".join(map(found.piece, ids)) == b"user\na <|end|> b <|end|>"
    assert found.count("<|end|>") == 7


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="no chat template"):
        codec(template=None).prompt(None, [ChatMessage(role="user", content="a")])


def test_a_template_that_fails_is_told_with_the_roles() -> None:
    messages = [ChatMessage(role="user", content="a"), ChatMessage(role="assistant", content="b")]
    with pytest.raises(ConfigurationError, match=r"fails.*user → assistant.*KeyError"):
        codec(own="{{ '{content}'.format() }}").prompt(None, messages)


def test_a_stop_sequence_that_is_one_token_may_end_the_engine() -> None:
    found = codec()
    newline = found.prompt("\n", None)[0]
    assert found.stop_tokens(["\n", "ab", "<|end|>", "é"]) == [newline]
    assert found.stop_tokens(["\n", "a\nb"]) == []
    assert found.stop_tokens([]) == []


async def test_many_stop_sequences_are_read_beside_the_event_loop() -> None:
    found, here = codec(), threading.get_ident()
    newline = found.prompt("\n", None)[0]
    threads: set[int] = set()

    class Noting(str):
        def encode(self, *_: Any) -> bytes:
            threads.add(threading.get_ident())
            return super().encode()

    for count in (1, 1000):
        stops = [Noting("\n"), *(f"w{i}" for i in range(count))]
        assert await found.find_stop_tokens(stops) == [newline]
    assert here in threads and len(threads) == 2
    await asyncio.to_thread(found.lane.close)


def test_bytes_of_other_vocabularies_are_known_too() -> None:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁a", "你"]
    tokenizer = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    found = TextCodec(FakeWrapper(tokenizer))
    assert found.piece(words.index("<0xE4>")) == b"\xe4"
    assert found.piece(words.index("▁a")) == b" a"
    assert found.piece(words.index("你")) == "你".encode()
    assert found.piece(len(words)) == b"<tool>"


def test_a_vocabulary_that_does_not_tell_bytes_leaves_the_text_to_vllm() -> None:
    tokenizer = Tokenizer(models.WordPiece({"<unk>": 0, "a": 1, "##b": 2}, unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece()
    found = TextCodec(FakeWrapper(tokenizer))
    assert not found.knows_bytes
    assert found.stop_tokens(["a"]) == []
    assert found.token_text(2) == "##b"
    entry = SimpleNamespace(logprob=-0.5)
    output = SimpleNamespace(
        token_ids=[1], text="a", finish_reason=None, logprobs=[{1: entry, 2: entry}]
    )
    (step,) = Outputs(found, frozenset()).steps(output, 2)
    assert [(e.token, e.bytes) for e in step.logprobs or ()] == [("a", (97,))]


def test_a_tokeniser_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"SimpleNamespace.*tokenizer\.json"):
        TextCodec(SimpleNamespace(backend_tokenizer=None))

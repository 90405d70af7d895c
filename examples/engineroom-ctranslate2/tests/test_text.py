"""Text to tokens and back, for both kinds of vocabularies that there are."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engineroom import ChatMessage, ConfigurationError
from engineroom.prompts import byte_alphabet
from engineroom_ctranslate2.folder import ModelFiles
from engineroom_ctranslate2.text import TextCodec

SPECIAL = ["<unk>", "<s>", "</s>"]


def codec_of(folder, tokenizer, vocabulary, *, template=None) -> TextCodec:
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextCodec(ModelFiles(folder, vocabulary, "</s>", template, None))


def byte_level(folder, **more) -> TextCodec:
    vocabulary = [*SPECIAL, *byte_alphabet().values(), "Ġthe", "<think>"]
    merges = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e")]
    vocabulary += ["Ġt", "Ġth"]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["<think>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return codec_of(folder, tokenizer, vocabulary, **more)


def byte_fallback(folder, **more) -> TextCodec:
    vocabulary = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "你"]
    tokenizer = Tokenizer(
        models.BPE(
            {t: i for i, t in enumerate(vocabulary)},
            [("▁", "a")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return codec_of(folder, tokenizer, vocabulary, **more)


KINDS = pytest.mark.parametrize("kind", [byte_level, byte_fallback])


@KINDS
@pytest.mark.parametrize("text", ["the a", " the 你好 🙂\n\t\0", "a</s>b <0x41> <think> é"])
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(tmp_path, kind, text):
    codec = kind(tmp_path)
    plain = codec.plain(text)
    assert b"".join(map(codec.piece, plain)) == text.encode()
    assert codec.count(text) == len(plain)


def test_the_byte_alphabet_is_that_of_the_tokenizers_library():
    assert sorted(byte_alphabet().values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    alphabet = byte_alphabet()
    for byte in range(128):
        assert encode(chr(byte))[0][0] == alphabet[byte]
    assert encode("é")[0][0] == "".join(alphabet[byte] for byte in "é".encode())


@KINDS
def test_special_tokens_add_nothing_to_the_text(tmp_path, kind):
    codec = kind(tmp_path)
    assert [codec.piece(number) for number in range(3)] == [b"", b"", b""]
    assert codec.token_text(2) == "</s>"


def test_added_tokens_that_are_not_special_are_text(tmp_path):
    codec = byte_level(tmp_path)
    assert codec.piece(codec.vocabulary.index("<think>")) == b"<think>"
    assert codec.token_text(codec.vocabulary.index(byte_alphabet()[0xE4])) == "\ufffd"


def test_special_tokens_count_in_a_prompt_and_the_beginning_is_added_once(tmp_path):
    codec = byte_fallback(tmp_path)
    a = codec.vocabulary.index("a")
    assert codec.prompt("a</s>", None) == [1, a, 2]
    assert codec.prompt("<s>a", None) == [1, a]
    assert codec.prompt("", None) == [1]
    assert byte_level(tmp_path).prompt("", None) == []


@KINDS
def test_special_tokens_in_messages_are_text(tmp_path, kind):
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    codec = kind(tmp_path, template=template)
    message = ChatMessage(role="user", content="a</s><s>a")
    ids = codec.prompt(None, [message])
    assert [number for number in ids if number < 3] == [1, 2]
    assert b"".join(map(codec.piece, ids)) == b"a</s><s>a"


def test_what_a_template_may_use(tmp_path):
    template = "{{ bos_token }}{{ messages | tojson }}{{ eos_token }}"
    codec = byte_fallback(tmp_path, template=template)
    message = ChatMessage(role="user", content="<é>")
    assert codec.render([message]) == '<s>[{"role": "user", "content": "<é>"}]</s>'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('not so') }}", "refuses these messages: not so (roles: user)"),
        ("{{ 1 / 0 }}", "fails on these messages (roles: user): ZeroDivisionError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{% for %}", "the chat template is not valid"),
    ],
)
def test_templates_that_fail_say_so(tmp_path, template, message):
    with pytest.raises(ConfigurationError) as caught:
        byte_level(tmp_path, template=template).render([ChatMessage(role="user", content="x")])
    assert message in caught.value.message


def test_a_decoder_that_is_not_known_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ConfigurationError, match=r"not known here \(WordPiece\)"):
        codec_of(tmp_path, tokenizer, ["a"])


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path):
    codec = byte_level(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    again = codec_of(tmp_path, tokenizer, codec.vocabulary)
    assert again.count("abcdefgh") == 8
    assert again.count("ab") == 2

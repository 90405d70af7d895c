"""How many tokens a text has at least: never more than it has, and not told where nothing says."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from engineroom.prompts import byte_alphabet
from engineroom.prompts.least_tokens import LeastTokens, least_tokens_of

SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck))
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ALPHABET = [*byte_alphabet().values()]
TEXTS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]), st.sampled_from(" \x04\U000c0000abé각ᾂ🙂<|")
    )
).map(lambda text: text * 5)


def byte_level(**parts: Any) -> Tokenizer:
    return over_letters(ALPHABET, **parts)


def over_letters(letters: list[str], **parts: Any) -> Tokenizer:
    words = [*letters, "Ġ" * 7, "ĠĠ"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("Ġ", "Ġ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|im_start|>"])
    return changed(tokenizer, **parts)


def with_fallback(**parts: Any) -> Tokenizer:
    words = {w: i for i, w in enumerate(["<unk>", *BYTES, "▁", "a", "b", "é"])}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return changed(tokenizer, **parts)


def changed(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


BOUNDED = {
    "byte level": byte_level(),
    "byte level, composed": byte_level(normalizer=normalizers.NFC()),
    "byte level, without some": over_letters(
        [letter for byte, letter in byte_alphabet().items() if byte not in (0x04, 0xF3)]
    ),
    "byte level, split": byte_level(
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\s+|\w+"), "isolated"),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "falls back": with_fallback(),
    "metaspace": with_fallback(normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace()),
}


@pytest.mark.parametrize("name", BOUNDED)
@SLOW
@given(TEXTS)
def test_a_text_has_no_fewer_tokens(name: str, text: str) -> None:
    tokenizer = BOUNDED[name]
    least = least_tokens_of(tokenizer)
    assert least is not None
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) >= least(text)


def test_the_longest_token_bounds_them() -> None:
    assert least_tokens_of(byte_level()) == LeastTokens(len("<|im_start|>"))
    assert least_tokens_of(BOUNDED["byte level, composed"]) == LeastTokens(4 * len("<|im_start|>"))
    assert least_tokens_of(with_fallback()) == LeastTokens(len("<0x00>"))


def test_bytes_that_no_token_stands_for_do_not_count() -> None:
    least = least_tokens_of(BOUNDED["byte level, without some"])
    assert least == LeastTokens(len("<|im_start|>"), b"\x04\xf3")
    assert least("\x04" * 1200) == 0 and least("a\x04" * 1200) == 100


def test_composing_makes_at_most_four_bytes_one() -> None:
    """Each character, spelt in the longest of the ways that come to it."""
    longest: dict[str, int] = {}
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    for character in characters:
        canonical = unicodedata.normalize("NFD", character)
        if len(canonical) == 1:
            size = len(character.encode())
            longest[canonical] = max(longest.get(canonical, 0), size)
    for character in characters:
        if unicodedata.normalize("NFC", character) == character:
            parts = unicodedata.normalize("NFD", character)
            assert sum(longest[part] for part in parts) <= 4 * len(character.encode())


def python_normaliser() -> Any:
    class Own:
        def normalize(self, text: Any) -> None:
            pass

    return normalizers.Normalizer.custom(Own())


def without(token: str) -> Tokenizer:
    state = json.loads(with_fallback().to_str())
    del state["model"]["vocab"][token]
    return Tokenizer.from_str(json.dumps(state))


def with_added(**more: bool) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<mask>", **more)])
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    return changed(tokenizer, pre_tokenizer=pre_tokenizers.BertPreTokenizer())


UNBOUNDED = {
    "one word is one token": wordpiece(),
    "its bytes are not known": Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
    "spaces are stripped": byte_level(normalizer=normalizers.Strip()),
    "compatibility": byte_level(normalizer=normalizers.NFKC()),
    "an expression is replaced": byte_level(normalizer=normalizers.Replace(Regex(" +"), " ")),
    "shortened": byte_level(normalizer=normalizers.Replace("ab", "c")),
    "written in Python": byte_level(normalizer=python_normaliser()),
    "spaces are removed": byte_level(pre_tokenizer=pre_tokenizers.Whitespace()),
    "a split removes": with_fallback(pre_tokenizer=pre_tokenizers.Split(" ", "removed")),
    "a byte has no token": without("<0x41>"),
    "what is unknown is one": Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>")),
    "a token takes spaces along": with_added(rstrip=True),
    "and on its other side": with_added(lstrip=True),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_where_text_is_left_out_nothing_is_told(name: str) -> None:
    assert least_tokens_of(UNBOUNDED[name]) is None

"""Looking for special tokens in texts that clients write: as a plain expression would, in parts."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings, strategies as st

from engineroom.prompts import ControlTokens, special_tokens
from engineroom.prompts.work import Reading, ReadingStoppedError, TooManyTokensError

LETTERS = "<|>a/"
NAMES = st.lists(st.text(LETTERS, min_size=1, max_size=6), min_size=1, max_size=12, unique=True)


@given(NAMES, st.text(LETTERS + "b", max_size=60), st.integers(1, 9))
@settings(deadline=None)
def test_a_text_is_cut_as_an_expression_of_all_tokens_cuts_it(
    names: list[str], text: str, window: int
) -> None:
    longest_first = sorted(names, key=len, reverse=True)
    expected = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(special_tokens, "_WINDOW", window)
        assert ControlTokens(dict(enumerate(names))).split(text) == expected


@given(NAMES, st.lists(st.text(LETTERS + "b", max_size=20), max_size=4), st.integers(1, 40))
@settings(deadline=None)
def test_what_is_cut_off_what_a_template_writes_comes_from_the_messages_alone(
    names: list[str], texts: list[str], window: int
) -> None:
    tokens = ControlTokens(dict(enumerate(names)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(special_tokens, "_WINDOW", window)
        segments = tokens.segments(lambda value: "[" + "][".join(value) + "]", texts)
    assert "".join(segments) == "[" + "][".join(texts) + "]"
    split = [tokens.split(text) for text in texts]
    assert segments[1::2] == [name for pieces in split for name in pieces[1::2]]


def test_no_control_tokens_cut_nothing() -> None:
    assert ControlTokens({}).split("<s>") == ["<s>"]
    assert ControlTokens({1: ""}).segments(str, "<s>") == ["<s>"]


def test_what_nobody_waits_for_is_looked_through_no_further() -> None:
    tokens, asked = ControlTokens({1: "<s>"}), 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    with Reading(stopped), pytest.raises(ReadingStoppedError):
        tokens.split("<" * 10_000_000)
    assert asked == 3


def test_control_tokens_that_stand_in_texts_are_told() -> None:
    tokens = ControlTokens({1: "<s>", 2: "<|open|>", 3: "<|sep|>", 4: "", 5: "[ARGS]"})
    assert tokens.ids_in(["<|open|>tools<|sep|>", "[ARGS]"]) == {2, 3, 5}
    assert tokens.ids_in([]) == frozenset()


def test_more_literals_than_a_prompt_may_have_tokens_are_refused_before_they_are_listed() -> None:
    control = ControlTokens({1: "<|end|>"})
    with Reading(lambda: False, 1000):
        assert len(control.segments(str, "<|end|>" * 1000)) == 2001
        with pytest.raises(TooManyTokensError):
            control.segments(str, "<|end|>" * 1001)


def test_a_text_with_many_literals_comes_back_whole() -> None:
    control, text = ControlTokens({1: "<|end|>"}), "a<|end|>b" * 30_000
    assert "".join(control.segments(str, text)) == text

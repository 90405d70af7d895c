"""Reading texts with the library ``tokenizers``, so that other threads go on meanwhile."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Final, TypeAlias

from engineroom.prompts.least_tokens import LeastTokens, least_tokens_of
from engineroom.prompts.work import check_stopped, expect_tokens, taking_turns

__all__ = ["TokenizerReader", "encoding_of", "surroundings"]

_Span: TypeAlias = Callable[[int], tuple[int, int]]

_SHORT: Final = 1024
"""Characters that are read with the interpreter kept: it would be given away and waited for."""
_LONG: Final = 2**16
"""Characters for which it is worth to look first whether they can fit."""
_PIECES: Final = 4
"""A character has at most four bytes, and at most as many tokens."""


def encoding_of(tokenizer: Any, text: str) -> Any:
    """The ``tokenizers.Encoding`` of a text, with nothing added; its offsets may be missing.

    A longer text is read without the interpreter, which the library lets go of for batches alone,
    and without offsets, which would take as long again.
    """
    if len(text) > _SHORT:
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
    return tokenizer.encode(text, add_special_tokens=False)


def surroundings(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a ``tokenizers.Tokenizer`` writes before a text, and after it."""
    encoding = tokenizer.encode("x")
    added = list(map(bool, encoding.special_tokens_mask))
    if all(added):
        return encoding.ids, []
    first, last = added.index(False), len(added) - added[::-1].index(False)
    return encoding.ids[:first], encoding.ids[last:]


class TokenizerReader:
    """Reads texts as token ids, for a codec. May be called from any thread.

    :param tokenizer: a ``tokenizers.Tokenizer`` whose settings nobody changes: it cannot be read
        with meanwhile.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def read(self, text: str) -> list[int]:
        """Token ids of a text, special tokens read as such, and nothing added."""
        self._expect(text)
        encoding = encoding_of(self._tokenizer, text)
        expect_tokens(len(encoding))
        ids: list[int] = encoding.ids
        return ids

    def count(self, text: str) -> int:
        """How many they are."""
        return len(encoding_of(self._tokenizer, text))

    def read_without(self, text: str, places: Sequence[int]) -> list[int] | None:
        """Token ids of a text but for single characters; see ``PromptCodec.read_without``.

        Offsets are asked for where they are needed: nobody else runs while millions are listed.
        """
        if len(text) > _LONG:
            self._expect(text)
            expect_tokens(self.count(text) - _PIECES * len(places))
        encoding = self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        with taking_turns():
            kept = _between(places, encoding.token_to_chars, len(encoding))
        if kept is None:
            return None
        ids: list[int] = encoding.ids
        return [token for first, last in kept for token in ids[first:last]]

    def _expect(self, text: str) -> None:
        if len(text) > _LONG and (least := self._least_tokens) is not None:
            expect_tokens(least(text), unread=True)

    @cached_property
    def _least_tokens(self) -> LeastTokens | None:
        return least_tokens_of(self._tokenizer)


def _between(places: Sequence[int], span: _Span, count: int) -> list[tuple[int, int]] | None:
    """Ranges of the tokens between those that are of single characters, and of these alone.

    :param span: from where to where in the text a token stands.
    :param count: how many tokens there are.
    """
    kept: list[tuple[int, int]] = []
    begin = 0
    for place in places:
        check_stopped()
        first = last = _first_beyond(span, begin, count, place)
        while last < count and span(last) == (place, place + 1):
            last += 1
        if first == last or (last < count and span(last)[0] <= place):
            return None
        kept.append((begin, first))
        begin = last
    kept.append((begin, count))
    return kept


def _first_beyond(span: _Span, begin: int, count: int, place: int) -> int:
    """The first token from ``begin`` on that ends behind a place: near ones are found soon."""
    step = 1
    low, high = begin, begin
    while high < count and span(high)[1] <= place:
        low, high, step = high + 1, high + step, 2 * step
    return bisect_right(range(min(high, count)), place, low, key=lambda token: span(token)[1])

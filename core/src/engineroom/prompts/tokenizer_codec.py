"""Text to tokens and back with a ``tokenizer.json``, by the library ``tokenizers``."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

from engineroom.prompts.chat_template import ModelTemplates
from engineroom.prompts.codec import PromptCodec
from engineroom.prompts.special_tokens import ControlTokens
from engineroom.prompts.token_bytes import bytes_of_token, decoder_kinds
from engineroom.prompts.work import expect_tokens

__all__ = ["TokenizerCodec", "encoding_of", "ids_of", "ids_without", "surroundings"]

_SHORT: Final = 1024
"""Characters that are read with the interpreter kept: it would be given away and waited for."""
_LONG: Final = 2**17
"""Characters whose tokens are counted before their places are told, at half the cost."""
_PIECES_OF_BREAK: Final = 4
"""A character has at most four bytes, and at most as many tokens."""


def encoding_of(tokenizer: Any, text: str) -> Any:
    """The ``tokenizers.Encoding`` of a text, with nothing added; its offsets may be missing.

    A longer text is read without the interpreter, which the library lets go of for batches alone,
    and without offsets, which would take as long again.
    """
    if len(text) > _SHORT:
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
    return tokenizer.encode(text, add_special_tokens=False)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with nothing added."""
    encoding = encoding_of(tokenizer, text)
    expect_tokens(len(encoding))
    ids: list[int] = encoding.ids
    return ids


def ids_without(tokenizer: Any, text: str, places: Sequence[int]) -> list[int] | None:
    """Token ids of a text but for those of single characters; see ``PromptCodec.read_without``.

    Offsets are asked for where they are needed: nobody else runs while millions are listed.
    """
    if len(text) > _LONG:
        least = len(encoding_of(tokenizer, text)) - _PIECES_OF_BREAK * len(places)
        expect_tokens(least)
    encoding = tokenizer.encode_batch([text], add_special_tokens=False)[0]
    span, count = encoding.token_to_chars, len(encoding)
    kept: list[tuple[int, int]] = []
    begin = 0
    for place in places:
        first = _first_beyond(span, begin, count, place)
        last = first
        while last < count and span(last) == (place, place + 1):
            last += 1
        if first == last or (last < count and span(last)[0] <= place):
            return None
        kept.append((begin, first))
        begin = last
    kept.append((begin, count))
    ids: list[int] = encoding.ids
    return [token for first, last in kept for token in ids[first:last]]


def _first_beyond(
    span: Callable[[int], tuple[int, int]], begin: int, count: int, place: int
) -> int:
    """The first token from ``begin`` on that ends behind a place: near ones are found soon."""
    step = 1
    low, high = begin, begin
    while high < count and span(high)[1] <= place:
        low, high, step = high + 1, high + step, 2 * step
    return bisect_right(range(min(high, count)), place, low, key=lambda token: span(token)[1])


def surroundings(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a ``tokenizers.Tokenizer`` writes before a text, and after it."""
    encoding = tokenizer.encode("x")
    added = list(map(bool, encoding.special_tokens_mask))
    if all(added):
        return encoding.ids, []
    first, last = added.index(False), len(added) - added[::-1].index(False)
    return encoding.ids[:first], encoding.ids[last:]


class TokenizerCodec(PromptCodec):
    """The vocabulary of one model: encodes prompts and says which bytes a token stands for.

    Bytes, not text: a token may end inside a character, and putting characters together is done
    by engineroom, alike for all runtimes.

    :param tokenizer: a ``tokenizers.Tokenizer`` that nobody else uses; truncation and padding are
        switched off.
    :param end_ids: tokens that end a generation, whether they are marked as special or not.
    """

    def __init__(
        self, tokenizer: Any, templates: ModelTemplates, end_ids: Collection[int] = ()
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.kinds = decoder_kinds(tokenizer)
        tokens = tokenizer.get_added_tokens_decoder()
        added = {number: str(token.content) for number, token in tokens.items()}
        special = {n: added[n] for n, token in tokens.items() if token.special}
        ends = {n: added[n] for n in end_ids if n in added}
        begin, end = surroundings(tokenizer)
        super().__init__(templates, ControlTokens(special | ends, added), begin=begin, end=end)
        self._pieces = {n: b"" if n in special else text.encode() for n, text in added.items()}

    @property
    def knows_bytes(self) -> bool:
        """Whether :meth:`piece` can be asked; of some kinds only the decoder tells the text."""
        return not self.kinds.isdisjoint({"ByteLevel", "ByteFallback"})

    def read(self, text: str) -> list[int]:
        """Token ids of a text, special tokens read as such, and nothing added."""
        return ids_of(self._tokenizer, text)

    def read_located(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same, and from where to where in the text each token stands."""
        encoding = self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        return encoding.ids, encoding.offsets

    def read_without(self, text: str, places: Sequence[int]) -> list[int] | None:
        """Token ids of a text but for those of single characters."""
        return ids_without(self._tokenizer, text, places)

    def count_read(self, text: str) -> int:
        """How many tokens a text has, special tokens read as such."""
        return len(encoding_of(self._tokenizer, text))

    def piece(self, token: int) -> bytes:
        """The bytes that a token adds to the text; special tokens add none.

        Looked up once a token, then remembered.
        """
        try:
            return self._pieces[token]
        except KeyError:
            text = self._tokenizer.id_to_token(token) or ""
            known = bytes_of_token(text, self.kinds)
            piece = text.replace("▁", " ").encode() if known is None else known
            self._pieces[token] = piece
            return piece

    def token_text(self, token: int) -> str:
        """A token's own text, special ones included, for log probabilities."""
        if self.knows_bytes and (piece := self.piece(token)):
            return piece.decode("utf-8", "replace")
        return self._tokenizer.id_to_token(token) or ""

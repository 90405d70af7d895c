"""Text to tokens and back with a ``tokenizer.json``, by the library ``tokenizers``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from engineroom.prompts.chat_template import ModelTemplates
from engineroom.prompts.codec import PromptCodec
from engineroom.prompts.model_tokens import ModelTokens
from engineroom.prompts.special_tokens import ControlTokens
from engineroom.prompts.token_bytes import bytes_of_token, decoder_kinds
from engineroom.prompts.tokenizer_reader import TokenizerReader, surroundings

__all__ = ["TokenizerCodec"]


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
        self._reader = TokenizerReader(tokenizer)
        self._ends = frozenset(end_ids)
        self.kinds = decoder_kinds(tokenizer)
        tokens = tokenizer.get_added_tokens_decoder()
        added = {number: str(token.content) for number, token in tokens.items()}
        special = {n: added[n] for n, token in tokens.items() if token.special}
        ends = {n: added[n] for n in end_ids if n in added}
        begin, end = surroundings(tokenizer)
        super().__init__(templates, ControlTokens(special | ends, added), begin=begin, end=end)
        silent = special.keys() - self.shown
        self._pieces = {n: b"" if n in silent else text.encode() for n, text in added.items()}

    @property
    def knows_bytes(self) -> bool:
        """Whether :meth:`piece` can be asked; of some kinds only the decoder tells the text."""
        return not self.kinds.isdisjoint({"ByteLevel", "ByteFallback"})

    def read(self, text: str) -> list[int]:
        """Token ids of a text, special tokens read as such, and nothing added."""
        return self._reader.read(text)

    def read_located(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same, and from where to where in the text each token stands."""
        encoding = self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        return encoding.ids, encoding.offsets

    def read_without(self, text: str, places: Sequence[int]) -> list[int] | None:
        """Token ids of a text but for those of single characters."""
        return self._reader.read_without(text, places)

    def count_read(self, text: str) -> int:
        """How many tokens a text has, special tokens read as such."""
        return self._reader.count(text)

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

    def model_tokens(self) -> ModelTokens:
        """See :meth:`.PromptCodec.model_tokens`."""
        if not self.knows_bytes:
            return super().model_tokens()
        texts = self._tokenizer.get_added_tokens_decoder()
        special = {
            n: str(token.content).encode()
            for n, token in texts.items()
            if token.special and n not in self.shown
        }
        count = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        pieces = [special.get(n) or self.piece(n) for n in range(count)]
        return ModelTokens(pieces, frozenset(special), sorted(self._ends), self.plain)

    def token_bytes(self, token: int) -> bytes:
        """A token's own bytes, the text of special ones, for log probabilities."""
        if self.knows_bytes and (piece := self.piece(token)):
            return piece
        return (self._tokenizer.id_to_token(token) or "").encode()

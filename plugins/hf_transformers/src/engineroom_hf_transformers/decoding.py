"""Tokens to text, one at a time.

Decoding does not use ``tokenizers.DecodeStream``: with byte fallback it raises where half a
character follows a whole one that was spelt in bytes, it gives out nothing for as long as bytes
come that are no characters, and it decodes each token twice. Most decoders treat each token by
itself, so the bytes that a token stands for are looked up once and remembered; whether a
tokenizer's decoder is of that kind is tried when it is opened. For the others, a window of the
last tokens is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, Protocol

from engineroom import Utf8Decoder
from engineroom.prompts import bytes_of_token, decoder_kinds

__all__ = ["WINDOW", "Decoder", "PieceDecoder", "Pieces", "WindowDecoder"]

_SAMPLE: Final = 256
WINDOW: Final = 8
"""How many tokens the window decoder looks back on, at least."""
_HELD: Final = 8
"""Most tokens that the window decoder holds back; no character has more than four bytes."""


class Decoder(Protocol):
    """Makes text of the tokens of one generation, in order."""

    def feed(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""

    def finish(self) -> str:
        """What was held: one U+FFFD for a character that stayed incomplete."""


class Pieces(dict[int, bytes]):
    """The bytes that each token stands for after another one, looked up once.

    :param anchor: a token of plain letters, after which others are decoded.
    """

    def __init__(self, backend: Any, special: Collection[int], anchor: int) -> None:
        super().__init__()
        self._backend = backend
        self._special = special
        self._kinds = decoder_kinds(backend)
        self._shown: frozenset[int] = frozenset()
        self._anchor = anchor
        self._before: str = backend.decode([anchor, anchor])

    @classmethod
    def of(
        cls, backend: Any, special: Collection[int], shown: Mapping[int, bytes]
    ) -> Pieces | None:
        """The pieces of a tokenizer; ``None``: it does not decode each token by itself.

        :param special: tokens that stand for nothing.
        :param shown: those that do so all the same, and for what.
        """
        if backend is None:
            return None
        size = backend.get_vocab_size(with_added_tokens=True)
        tokens = (t for t in range(size) if t not in special)
        anchor = next((t for t in tokens if (backend.id_to_token(t) or "").isalpha()), None)
        if anchor is None:
            return None
        pieces = cls(backend, special, anchor)
        pieces.update(shown)
        pieces._shown = frozenset(shown)
        return pieces if pieces._are_local(size) else None

    def __missing__(self, token: int) -> bytes:
        piece = self[token] = self._look_up(token)
        return piece

    def first(self, token: int) -> bytes:
        """The bytes of a token with none before it: some decoders leave a space out there."""
        if token in self._shown:
            return self[token]
        text: str = self._backend.decode([token], skip_special_tokens=True)
        return self[token] if "\ufffd" in text else text.encode()

    def _look_up(self, token: int) -> bytes:
        if token in self._special or token < 0:
            return b""
        text: str | None = self._backend.id_to_token(token)
        if text is None:
            return b""
        if (known := bytes_of_token(text, self._kinds)) is not None:
            return known
        whole: str = self._backend.decode([self._anchor, self._anchor, token])
        return whole.removeprefix(self._before).encode()

    def _are_local(self, size: int) -> bool:
        """Whether joined pieces are what the tokenizer makes of a whole."""
        tokens = [
            token for token in range(0, size, max(1, size // _SAMPLE)) if not self._is_byte(token)
        ]
        for ids in (tokens, tokens[::-1], [*tokens, self._anchor], [self._anchor] * 3):
            decoder = PieceDecoder(self, first=True)
            joined = "".join(map(decoder.feed, ids)) + decoder.finish()
            if joined != self._backend.decode(ids, skip_special_tokens=True):
                return False
        return True

    def _is_byte(self, token: int) -> bool:
        byte_tokens = self._kinds & {"ByteFallback"}
        return bytes_of_token(self._backend.id_to_token(token) or "", byte_tokens) is not None


class PieceDecoder:
    """Decodes by the bytes of each token.

    :param first: no token that shows comes before.
    """

    __slots__ = ("_first", "_pieces", "_utf8")

    def __init__(self, pieces: Pieces, *, first: bool) -> None:
        self._pieces = pieces
        self._first = first
        self._utf8 = Utf8Decoder()

    def feed(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if self._first and piece:
            self._first = False
            piece = self._pieces.first(token_id)
        return self._utf8.feed(piece)

    def finish(self) -> str:
        return self._utf8.finish()


class WindowDecoder:
    """Decodes the last tokens anew with each one, and gives what was added to their text.

    :param seed: the last tokens that came before.
    :param shows: whether a token has a text. Others would push those out of the window on which
        the text of the next one depends.
    """

    __slots__ = ("_decode", "_held", "_ids", "_shown", "_shows")

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        seed: Sequence[int],
        shows: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self._decode = decode
        self._shows = shows
        self._ids = list(seed)
        self._shown = decode(self._ids)
        self._held = 0

    def feed(self, token_id: int) -> str:
        if not self._shows(token_id):
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith("\ufffd") and self._held < _HELD:
            self._held += 1
            return ""
        return self._show(text)

    def finish(self) -> str:
        return self._show(self._decode(self._ids)) if self._held else ""

    def _show(self, text: str) -> str:
        self._held = 0
        same = 0  # a decoder may change what it gave; that cannot be taken back
        if text.startswith(self._shown):
            same = len(self._shown)
        else:
            while text[same : same + 1] == self._shown[same : same + 1] != "":
                same += 1
        added = text[same:]
        if len(self._ids) > 2 * WINDOW:
            del self._ids[:-WINDOW]
            text = self._decode(self._ids)
        self._shown = text
        return added

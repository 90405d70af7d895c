"""Tokens that structure a conversation: meant where the template writes them, text in a message.

Nobody may end a message, or begin one of another role, by writing a special token into a name, a
call's arguments or a tool's description. So the template is given stand-ins, and what it makes of
them tells which control tokens are its own.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any, Final

from engineroom.prompts.messages import map_strings, strings
from engineroom.prompts.work import check_stopped, expect_tokens

__all__ = ["ControlTokens"]

_CONTROL_LIKE: Final = re.compile(r"<\|[^|<>]+\|>|<(?:start|end)_of_turn>|</?s>|\[/?INST\]")
"""Tokens that structure a conversation in known templates. Some conversions forget to mark them
as special, and a tokenizer reads them all the same."""

_WINDOW: Final = 2**16
"""Characters that are searched at a time: a millisecond where each nearly begins a token."""
_PIECES: Final = 10_000
"""Of a text that are kept apart at one time."""


class ControlTokens:
    """The control tokens of one vocabulary.

    :param special: id → text of those that are marked as special, and of those that end a text.
    :param added: id → text of others that the tokenizer reads in whole; those that structure
        conversations in known templates are control tokens as well.
    """

    def __init__(self, special: Mapping[int, str], added: Mapping[int, str] | None = None) -> None:
        alike = {i: text for i, text in (added or {}).items() if _CONTROL_LIKE.fullmatch(text)}
        self._texts = {**alike, **special}
        # The longest first: one may begin with another.
        self._names = sorted({*self._texts.values()} - {""}, key=len, reverse=True)
        self._numbers = {text: number for number, text in enumerate(self._names)}
        self._pattern = re.compile(_any_of(self._names)) if self._names else None
        self._longest = len(self._names[0]) if self._names else 0

    def __contains__(self, token: int) -> bool:
        return token in self._texts

    def ids_in(self, texts: Collection[str]) -> frozenset[int]:
        """Ids of the control tokens that stand in one of these texts."""
        return frozenset(
            number
            for number, token in self._texts.items()
            if token and any(token in text for text in texts)
        )

    def occur(self, tokens: Iterable[int]) -> bool:
        """Whether there is a control token among these."""
        return not self._texts.keys().isdisjoint(tokens)

    def segments(self, write: Callable[[Any], str], value: Any) -> list[str]:
        """What ``write`` makes of ``value``, cut up.

        :param write: renders the chat template.
        :param value: what it is rendered with: dictionaries, lists and strings.
        :returns: texts in which control tokens are meant and, at odd places between them, texts of
            control tokens that stood in the value.
        :raises TooManyTokensError: there are more of those than the text may have tokens.
        """
        pattern, longest = self._pattern, self._longest
        if pattern is None or not any(_occurs(pattern, text, longest) for text in strings(value)):
            return [write(value)]
        # Digits of one length: filters of templates leave them alone, and neighbours do not matter.
        nonce, numbers = f"{secrets.randbits(64):020d}", self._numbers

        def stand_in_of(name: str) -> str:
            return f"{nonce}{numbers[name]:06d}"

        def shield(text: str) -> str:
            check_stopped()
            if len(text) < _WINDOW:
                return pattern.sub(lambda match: stand_in_of(match[0]), text)
            return _replaced(pattern, text, longest, stand_in_of)

        stand_in, written = re.compile(rf"{nonce}\d{{6}}"), write(map_strings(value, shield))
        expect_tokens(written.count(nonce), unread=True)
        segments = _split(stand_in, written, len(nonce) + 6)
        segments[1::2] = [self._names[int(number[-6:])] for number in segments[1::2]]
        return segments

    def split(self, text: str) -> list[str]:
        """A plain text, cut up in the same way."""
        return [text] if self._pattern is None else _split(self._pattern, text, self._longest)


def _any_of(texts: Collection[str]) -> str:
    """An expression for the longest of the texts that there is at a place.

    Beginnings that they share are looked for once: of models with hundreds of reserved tokens else
    each is compared at every place that begins like one.
    """
    tails: dict[str, list[str]] = {}
    for text in texts:
        tails.setdefault(text[0], []).append(text[1:])
    branches = []
    for first, rest in tails.items():
        # As far as the first and the last in order go, all the others do.
        ends = zip(min(rest), max(rest), strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
        longer = [text[shared:] for text in rest if len(text) > shared]
        branch = re.escape(first + rest[0][:shared])
        if longer:
            branch += f"(?:{_any_of(longer)})" + ("?" if len(longer) < len(rest) else "")
        branches.append(branch)
    return "|".join(branches)


def _matches(pattern: re.Pattern[str], text: str, longest: int) -> Iterator[tuple[int, int]]:
    """Where the pattern matches, as :meth:`re.Pattern.finditer` has it.

    Looked for in a window at a time: a search keeps the interpreter until it has found something.

    :param longest: characters of a match, at most.
    """
    at, window = 0, 0
    while at < len(text):
        window = max(window, at)
        end = window + _WINDOW
        # Beyond the window's end only as far as a match that begins in it may go.
        match = pattern.search(text, at, end + longest)
        if match is not None and match.start() < end:
            at = match.end()
            yield match.span()
        else:
            at = window = end
            check_stopped()


def _occurs(pattern: re.Pattern[str], text: str, longest: int) -> bool:
    check_stopped()
    if len(text) < _WINDOW:
        return pattern.search(text) is not None
    return next(_matches(pattern, text, longest), None) is not None


def _replaced(pattern: re.Pattern[str], text: str, longest: int, by: Callable[[str], str]) -> str:
    """The text with matches replaced.

    A part at a time: the collector keeps the interpreter while it goes through a list of a million.
    """
    parts: list[str] = []
    pieces: list[str] = []
    at = 0
    for start, end in _matches(pattern, text, longest):
        pieces += text[at:start], by(text[start:end])
        at = end
        if len(pieces) >= _PIECES:
            parts.append("".join(pieces))
            pieces.clear()
    return "".join([*parts, *pieces, text[at:]])


def _split(pattern: re.Pattern[str], text: str, longest: int) -> list[str]:
    """The text cut up at matches, which stand at odd places."""
    pieces: list[str] = []
    at = 0
    for start, end in _matches(pattern, text, longest):
        pieces += text[at:start], text[start:end]
        at = end
    pieces.append(text[at:])
    return pieces

"""Tokens that structure a conversation: meant where the template writes them, text in a message.

Nobody may end a message, or begin one of another role, by writing a special token into a name, a
call's arguments or a tool's description. So the template is given stand-ins, and what it makes of
them tells which control tokens are its own.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from engineroom.prompts.messages import map_strings, strings

__all__ = ["ControlTokens"]

_CONTROL_LIKE: Final = re.compile(r"<\|[^|<>]+\|>|<(?:start|end)_of_turn>|</?s>|\[/?INST\]")
"""Tokens that structure a conversation in known templates. Some conversions forget to mark them
as special, and a tokenizer reads them all the same."""


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
        pattern = "|".join(map(re.escape, self._names))
        self._pattern = re.compile(f"({pattern})") if pattern else None

    def __contains__(self, token: int) -> bool:
        return token in self._texts

    def occur(self, tokens: Iterable[int]) -> bool:
        """Whether there is a control token among these."""
        return not self._texts.keys().isdisjoint(tokens)

    def segments(self, write: Callable[[Any], str], value: Any) -> list[str]:
        """What ``write`` makes of ``value``, cut up.

        :param write: renders the chat template.
        :param value: what it is rendered with: dictionaries, lists and strings.
        :returns: texts in which control tokens are meant and, at odd places between them, texts of
            control tokens that stood in the value.
        """
        if self._pattern is None or not any(map(self._pattern.search, strings(value))):
            return [write(value)]
        # Digits of one length: filters of templates leave them alone, and neighbours do not matter.
        nonce, numbers = f"{secrets.randbits(64):020d}", self._numbers

        def shield(text: str) -> str:
            assert self._pattern is not None
            return self._pattern.sub(lambda match: f"{nonce}{numbers[match[0]]:06d}", text)

        segments = re.split(rf"{nonce}(\d{{6}})", write(map_strings(value, shield)))
        segments[1::2] = [self._names[int(number)] for number in segments[1::2]]
        return segments

    def split(self, text: str) -> list[str]:
        """A plain text, cut up in the same way."""
        return [text] if self._pattern is None else self._pattern.split(text)

"""How much work JSON makes, counted before it is read or written.

A few megabytes can hold a million empty lists. To read or write them takes a second for which the
event loop stands still, whichever thread does it: Python's own JSON keeps the interpreter, and does
not stop halfway. What is counted here are the characters that make values, which takes about a
millisecond for each megabyte; those inside of texts are told apart only where it matters.
"""

from __future__ import annotations

from typing import Final

__all__ = ["MAX_DIGITS", "MAX_VALUES", "SMALL_BODY", "excess"]

SMALL_BODY: Final = 64 << 10
"""Bytes of a body that is decoded as it is, whatever it holds."""
MAX_DIGITS: Final = 100
"""Digits of a number: to read longer ones takes time that grows with their square."""
MAX_VALUES: Final = 131_072
"""Values of what a request brings for a chat template, which reads and writes it in one go: some 20
milliseconds each way."""
CONTAINER: Final = 8
"""A list or object counts as so many values."""
VALUES_A_TEXT: Final = 8
"""Where so many values are taken, one text is."""


def _all_but(kept: bytes) -> bytes:
    return bytes(set(range(256)) - set(kept))


_NO_MARK: Final = _all_but(b'",[{')
_NO_QUOTE: Final = _all_but(b'"')
_NO_VALUE: Final = _all_but(b",")
_NO_CONTAINER: Final = _all_but(b"[{")
_DIGITS_ALIKE: Final = bytes(ord("0") if ord("0") <= c <= ord("9") else c for c in range(256))
_LONG_NUMBER: Final = b"0" * (MAX_DIGITS + 1)


def excess(data: bytes, most: int) -> str | None:
    """What of some JSON is too much; ``None``: nothing.

    :param most: how many values there may be, and eight times as many as texts.
    """
    if len(data) <= SMALL_BODY:
        return None
    light = len(data.translate(None, _NO_MARK)) <= min(most // CONTAINER, most // VALUES_A_TEXT * 2)
    long_number = _LONG_NUMBER in data.translate(_DIGITS_ALIKE)
    if light and not long_number:
        return None
    # Escapes go first, so that every quote left is the edge of a text.
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in data else data
    marks = plain.translate(None, _NO_MARK)
    if (texts := len(marks.translate(None, _NO_QUOTE)) // 2) > most // VALUES_A_TEXT:
        return (
            f"it has {texts} texts and names, and at most {most // VALUES_A_TEXT} are taken; send "
            "less at a time"
        )
    outside = _outside(marks)
    values = len(outside.translate(None, _NO_VALUE))
    values += len(outside.translate(None, _NO_CONTAINER)) * CONTAINER
    if values > most:
        return (
            f"it has {values} values (a list or object counts as {CONTAINER}), and at most {most} "
            "are taken; send less at a time"
        )
    if long_number and _LONG_NUMBER in _outside(plain).translate(_DIGITS_ALIKE):
        return f"it has a number of more than {MAX_DIGITS} digits; send shorter ones"
    return None


def _outside(plain: bytes) -> bytes:
    """What is outside of texts."""
    return b"".join(plain.split(b'"')[::2])

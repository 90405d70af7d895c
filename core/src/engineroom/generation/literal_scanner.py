"""Values as models write them, read piece by piece and written on as JSON.

JSON comes out as it went in, but for what no reader of JSON takes: control characters in strings,
wrong escapes, halves of characters, ``True`` for ``true``, single quotes, a comma behind the last
value. Python's literals and Gemma's objects
come out as JSON. No value is too deep for the stack: this one is a list.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from engineroom.generation.text_source import CutError, MalformedError, Markers, Reading, TextSource

__all__ = [
    "GEMMA",
    "JSON",
    "PYTHON",
    "Dialect",
    "clean_json",
    "json_text",
    "scan_string",
    "scan_value",
]

MAX_DEPTH: Final = 128
"""Levels of a value; deeper ones no reader of JSON takes for sure."""
MAX_SCALAR: Final = 500
"""Characters of a number."""
MAX_KEY: Final = 512
"""Characters of a key, or of a text, without quotes."""

Write = Callable[[str], None]

_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_SCALAR: Final = re.compile(r"[A-Za-z0-9_+.-]+")
_WORDS: Final = {
    "true": "true", "false": "false", "null": "null",
    "True": "true", "False": "false", "None": "null",
}  # fmt: skip
_SHORT: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_PYTHON_SHORT: Final = {**_SHORT, "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_HEX: Final = {"x": 2, "u": 4, "U": 8}
_PLAIN: Final = {quote: re.compile(rf"[^{quote}\\\x00-\x1f]+") for quote in "\"'"}


class Dialect(NamedTuple):
    """How values are written."""

    name: str
    quotes: str = '"'
    """Characters that may stand around a string."""
    mark: Markers | None = None
    """What stands around a string instead, which then has no escapes."""
    bare_keys: bool = False
    """Keys are what stands before the colon."""
    bare_words: bool = False
    """What is neither a number nor a word of JSON is a string."""


JSON: Final = Dialect("json", quotes="\"'")
"""As models write it, who take some liberties."""
PYTHON: Final = Dialect("python", quotes="\"'")
GEMMA: Final = Dialect("gemma", mark=Markers(['<|"|>']), bare_keys=True, bare_words=True)
_COLON: Final = Markers([":"])
_BARE_END: Final = Markers([",", "}", "]"])
_OPEN: Final = {"{": "}", "[": "]"}


def json_text(text: str) -> str:
    """A text as it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def clean_json(value: Any) -> str:
    """A value in JSON, without halves of characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _nothing(_: str) -> None:
    """Written nowhere."""


def scan_value(source: TextSource, dialect: Dialect, write: Write) -> Reading[None]:
    """Read a value.

    :param write: takes it as JSON, piece by piece.
    :raises MalformedError: it is none. :raises CutError: the text has ended within it.
    """
    blank = write if dialect is JSON else _nothing
    comma, colon = (",", ":") if dialect is JSON else (", ", ": ")
    closers: list[str] = []
    while True:
        if text := (yield from source.blanks()):
            blank(text)
        character = yield from source.peek()
        if dialect is PYTHON and character == "(":
            opened, closing = "[", ")"
        else:
            opened, closing = character, _OPEN.get(character, "")
        if closing:
            source.take(1)
            write(opened)
            closers.append(closing)
            if len(closers) > MAX_DEPTH:
                raise MalformedError
            if text := (yield from source.blanks()):
                blank(text)
            if (yield from source.peek()) != closing:
                if closing == "}":
                    yield from _key(source, dialect, write, blank, colon)
                continue
        else:
            yield from _scalar(source, dialect, write)
        while True:  # a value has ended
            if not closers:
                return
            if text := (yield from source.blanks()):
                blank(text)
            character = yield from source.peek()
            if character == closers[-1]:
                source.take(1)
                closers.pop()
                write("]" if character == ")" else character)
                continue
            if character != ",":
                raise MalformedError
            source.take(1)
            text = yield from source.blanks()
            if (yield from source.peek()) == closers[-1]:
                continue  # a comma behind the last one
            write(comma)
            if text:
                blank(text)
            if closers[-1] == "}":
                yield from _key(source, dialect, write, blank, colon)
            break


def _key(
    source: TextSource, dialect: Dialect, write: Write, blank: Write, colon: str
) -> Reading[None]:
    character = yield from source.peek()
    if character in dialect.quotes:
        yield from scan_string(source, dialect, write)
        if text := (yield from source.blanks()):
            blank(text)
        if (yield from source.peek()) != ":":
            raise MalformedError
    elif dialect.bare_keys:
        key: list[str] = []
        if dialect.mark is not None and (yield from source.begins(dialect.mark)):
            yield from scan_string(source, dialect, key.append)
            yield from source.blanks()
            write("".join(key))
            if (yield from source.peek()) != ":":
                raise MalformedError
        else:
            name, _ = yield from source.until_short(_COLON, MAX_KEY)
            write(f'"{json_text(name.strip())}"')
    else:
        raise MalformedError
    source.take(1)
    write(colon)


def scan_string(source: TextSource, dialect: Dialect, write: Write) -> Reading[None]:
    """Read a string, quotes and all. Raises as above."""
    if dialect.mark is not None and (yield from source.take_one(dialect.mark)):
        write('"')
        if (yield from source.until(dialect.mark, lambda text: write(json_text(text)))) is None:
            raise CutError
        yield from source.take_one(dialect.mark)
        write('"')
        return
    quote = yield from source.peek()
    if quote not in dialect.quotes:
        raise MalformedError
    source.take(1)
    write('"')
    plain = _PLAIN[quote]
    while True:
        if text := source.match(plain):
            write(text if quote == '"' else json_text(text))
            continue
        character = yield from source.peek()
        if character == quote:
            source.take(1)
            write('"')
            return
        if character == "\\":
            yield from _escape(source, dialect, write)
        else:
            write(json_text(source.take(1)))  # a control character, which a model may write


def _escape(source: TextSource, dialect: Dialect, write: Write) -> Reading[None]:
    text = yield from source.ahead(2)
    if len(text) < 2:
        raise CutError
    kind = text[1]
    if kind == "u":
        yield from _unicode(source, write)
        return
    source.take(2)
    short = _PYTHON_SHORT if dialect is PYTHON else _SHORT
    if kind in "\\/\"'":
        write(f"\\{kind}" if kind != "'" else "'")
    elif kind in short:
        write(json_text(short[kind]))
    elif dialect is PYTHON and kind in _HEX:
        digits = yield from source.ahead(_HEX[kind])
        if len(digits) < _HEX[kind]:
            raise CutError
        source.take(len(digits))
        write(json_text(_character(digits)))
    else:  # of a pattern, say: the backslash is one
        write(f"\\\\{json_text(kind)}")


def _unicode(source: TextSource, write: Write) -> Reading[None]:
    """One character, for which two escapes may stand; a half alone is none."""
    text = yield from source.ahead(6)
    if len(text) < 6:
        raise CutError
    code = _code(text[2:])
    if 0xD800 <= code < 0xDC00:
        pair = yield from source.ahead(12)
        if re.fullmatch(r"\\u[dD][c-fC-F][0-9a-fA-F]{2}", pair[6:]):
            write(source.take(12))
            return
    source.take(6)
    write("\\ufffd" if 0xD800 <= code < 0xE000 else text)


def _code(digits: str) -> int:
    try:
        return int(digits, 16)
    except ValueError:
        raise MalformedError from None


def _character(digits: str) -> str:
    code = _code(digits)
    return chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else "\ufffd"


def _scalar(source: TextSource, dialect: Dialect, write: Write) -> Reading[None]:
    """A string, a number or a word."""
    if dialect.mark is not None and (yield from source.begins(dialect.mark)):
        yield from scan_string(source, dialect, write)
        return
    if (yield from source.peek()) in dialect.quotes:
        yield from scan_string(source, dialect, write)
        return
    if dialect.bare_words:
        text, _ = yield from source.until_short(_BARE_END, MAX_KEY)
        text = text.strip()
    else:
        text = yield from source.run(_SCALAR, MAX_SCALAR)
    if (written := _as_json(text)) is not None:
        write(written)
    elif dialect.bare_words:
        write(f'"{json_text(text)}"')
    else:
        raise MalformedError


def _as_json(text: str) -> str | None:
    """A number or a word in JSON; ``None``: it is neither."""
    if len(text) > MAX_SCALAR:
        raise MalformedError
    if (word := _WORDS.get(text)) is not None:
        return word
    if _NUMBER.fullmatch(text):
        return text
    if not re.match(r"[+-]?(?:[1-9]|\.[0-9]|0(?![0-9]))", text):
        return None
    try:
        number: int | float = int(text)
    except ValueError:
        try:
            number = float(text)
        except ValueError:
            return None
    return json.dumps(number) if math.isfinite(number) else None

"""Reads calls whose arguments are one value: JSON objects, and names with arguments behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

from engineroom.generation.call_forms import JsonForm, NamedForm, ToolFormat
from engineroom.generation.literal_scanner import JSON, clean_json, scan_string, scan_value
from engineroom.generation.output_writer import OutputWriter
from engineroom.generation.text_source import WORD, MalformedError, Markers, Reading, TextSource

__all__ = ["json_calls", "named_call", "take_end"]

MAX_NAME: Final = 200
"""Characters of a name and what stands around it."""
_NAMES: Final = frozenset({"name", "tool_name", "function"})
_ARGUMENTS: Final = frozenset({"arguments", "parameters"})
_NAMELESS: Final = frozenset({"type", "id", "tool_call_id", "index"})
"""Other members that a call has in front of its name."""
_FENCE: Final = Markers(["```json", "```"])
_BRACE: Final = Markers(["}"])


def json_calls(
    source: TextSource, format_: ToolFormat, calls: OutputWriter, *, bare: bool = False
) -> Reading[None]:
    """Read an object or a list of them, and the format's end behind.

    :param bare: nothing marks them as calls but what they look like.
    :raises MalformedError: it is none. :raises CutError: the text has ended within it.
    """
    yield from source.blanks()
    listed = (yield from source.peek()) == "["
    if listed:
        source.take(1)
        yield from source.blanks()
    while (yield from source.peek()) == "{":
        yield from _call(source, format_, calls, bare=bare)
        source.keep()
        if listed:
            yield from source.blanks()
            if (yield from source.peek()) == "]":
                break
            if source.take(1) != ",":
                raise MalformedError
            yield from source.blanks()
        else:
            yield from _behind(source, format_, calls)
            return
    if not listed or (yield from source.peek()) != "]":
        raise MalformedError
    source.take(1)
    source.keep()
    yield from take_end(source, format_, calls)


def _behind(source: TextSource, format_: ToolFormat, calls: OutputWriter) -> Reading[None]:
    """Behind an object: more of them, the format's end, or neither."""
    while not (yield from source.at_end()):
        while (yield from source.take_one(_BRACE)):
            pass  # models close more than they have opened
        blanks = yield from source.blanks()
        if (yield from source.at_end()):
            return
        if (yield from source.peek()) in ";," and format_.bare:
            blanks += source.take(1)
            blanks += yield from source.blanks()
        if (yield from source.at_end()):
            return
        if (yield from source.peek()) != "{":
            if not (yield from source.passes(Markers([format_.end.strip()]))):
                calls.content(blanks)
            return
        yield from _call(source, format_, calls, bare=format_.bare)
        source.keep()


def take_end(source: TextSource, format_: ToolFormat, calls: OutputWriter) -> Reading[None]:
    """Read what ends a call, if it is there; what is not stays content."""
    blanks = yield from source.blanks()
    if not (yield from source.passes(Markers([format_.end.strip()]))):
        calls.content(blanks)


def _call(
    source: TextSource,
    format_: ToolFormat,
    calls: OutputWriter,
    *,
    bare: bool,
    inner: bool = False,
) -> Reading[None]:
    """One object. The arguments are handed on as they come, if the name stands before them.

    :param inner: it is what another one has for ``function``.
    """
    source.take(1)  # the brace
    if isinstance(format_.form, JsonForm) and not format_.form.name_key:
        yield from source.blanks()
        name = yield from _text(source)
        yield from _colon(source)
        calls.begin(name, offered=bare)
        yield from _arguments(source, calls.arguments)
        yield from source.blanks()
        if (yield from source.peek()) != "}":
            raise MalformedError
        source.take(1)
        calls.end()
        return
    name = ""
    begun = ended = nested = False
    held: list[str] | None = None  # arguments in front of the name
    while True:
        yield from source.blanks()
        if (yield from source.peek()) == "}":
            source.take(1)
            break
        key = yield from _text(source)
        yield from _colon(source)
        value = yield from source.peek()
        if key in _NAMES and not name and value in JSON.quotes:
            name = yield from _text(source)
            calls.named = name in calls.tools
        elif key in _ARGUMENTS and not ended:
            if name:
                calls.begin(name, offered=bare)
                begun = True
                yield from _arguments(source, calls.arguments)
            else:
                held = []
                yield from _arguments(source, held.append)
            ended = True
        elif key == "function" and value == "{" and not (inner or name or ended):
            yield from _call(source, format_, calls, bare=bare, inner=True)
            begun = ended = nested = True
        elif bare and not (name or begun) and key not in _NAMELESS:
            raise MalformedError
        else:
            yield from scan_value(source, JSON, _nowhere)
        yield from source.blanks()
        if begun and format_.end and (yield from source.begins(Markers([format_.end.strip()]))):
            break  # models close less than they have opened
        if (yield from source.peek()) == ",":
            source.take(1)
        elif (yield from source.peek()) != "}":
            raise MalformedError
    if nested:
        return
    if not begun:
        if not name or (bare and held is None):
            raise MalformedError
        calls.begin(name, offered=bare)
        calls.arguments("".join(held or ["{}"]))
    calls.end()


def _arguments(source: TextSource, write: Callable[[str], None]) -> Reading[None]:
    """An object, a text with one in it, or null."""
    first = yield from source.peek()
    if first == "{":
        yield from scan_value(source, JSON, write)
        return
    if first in JSON.quotes:
        text = yield from _text(source)
    else:
        parts: list[str] = []
        yield from scan_value(source, JSON, parts.append)
        text = "{}" if parts == ["null"] else "".join(parts)
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise MalformedError from None
    if not isinstance(value, dict):
        raise MalformedError
    write(clean_json(value))


def _colon(source: TextSource) -> Reading[None]:
    yield from source.blanks()
    if (yield from source.peek()) != ":":
        raise MalformedError
    source.take(1)
    yield from source.blanks()


def _text(source: TextSource) -> Reading[str]:
    """A string of JSON, decoded."""
    parts: list[str] = []
    yield from scan_string(source, JSON, parts.append)
    text = json.loads("".join(parts))
    assert isinstance(text, str)
    return text


def _nowhere(_: str) -> None:
    """Read over."""


def named_call(
    source: TextSource, format_: ToolFormat, form: NamedForm, calls: OutputWriter
) -> Reading[None]:
    """Read a name, its arguments, and the format's end behind. Raises as above."""
    if form.dialect is JSON and (yield from source.peek()) in "[{ ":
        # The same mark stands before a list in an older form of the format.
        yield from source.blanks()
        if (yield from source.peek()) in "[{":
            yield from json_calls(source, format_, calls)
            return
    if before := form.before.strip():
        yield from source.blanks()
        yield from source.requires(Markers([before]))
    after = form.after.strip() or "{"
    text, stop = yield from source.until_short(Markers([after, form.id_mark, "{"]), MAX_NAME, WORD)
    if stop == form.id_mark != "":
        source.take(len(stop))
        _, stop = yield from source.until_short(Markers([after]), MAX_NAME, WORD)
    if stop != "{":
        source.take(len(stop))
    if (match := form.name.fullmatch(text)) is None:
        raise MalformedError
    yield from source.blanks()
    yield from source.take_one(_FENCE)
    yield from source.blanks()
    if (yield from source.peek()) != "{":
        raise MalformedError
    calls.begin(match["name"])
    yield from scan_value(source, form.dialect, calls.arguments)
    calls.end()
    source.keep()
    if form.close:
        blanks = yield from source.blanks()
        if not (yield from source.passes(Markers([form.close.strip()]))):
            calls.content(blanks)
            return
    yield from take_end(source, format_, calls)

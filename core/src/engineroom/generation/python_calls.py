"""Reads calls as Python has them: ``[f(a=1), g(b="x")]``, or one a line."""

from __future__ import annotations

import re
from typing import Final

from engineroom.generation.call_forms import PythonicForm, ToolFormat
from engineroom.generation.json_calls import MAX_NAME, take_end
from engineroom.generation.literal_scanner import PYTHON, json_text, scan_value
from engineroom.generation.output_writer import OutputWriter
from engineroom.generation.text_source import MalformedError, Markers, Reading, TextSource

__all__ = ["python_calls"]

_NAME: Final = re.compile(r"[^\W\d][\w.-]*")
_NAME_END: Final = Markers(["(", ")", "[", "]", "{", "\n", " "])
_KEY_END: Final = Markers(["=", ",", ")", "(", "\n"])


def python_calls(
    source: TextSource,
    format_: ToolFormat,
    form: PythonicForm,
    calls: OutputWriter,
    *,
    bare: bool = False,
) -> Reading[None]:
    """Read calls, and the format's end behind.

    :param bare: nothing marks them as calls but what they look like.
    :raises MalformedError: they are none. :raises CutError: the text has ended within one.
    """
    yield from source.blanks()
    listed = (yield from source.peek()) == "["
    if listed:
        source.take(1)
    elif form.brackets and bare:
        raise MalformedError
    while True:
        yield from source.blanks()
        if listed and (yield from source.peek()) == "]":
            source.take(1)
            break
        yield from _call(source, calls, bare=bare)
        source.keep()
        if listed:
            yield from source.blanks()
            if (yield from source.peek()) == ",":
                source.take(1)
            elif (yield from source.peek()) != "]":
                raise MalformedError
        else:
            blanks = yield from source.blanks()
            if (yield from source.at_end()):
                return
            if not _NAME.match((yield from source.peek())):
                calls.content(blanks)
                break
    source.keep()
    yield from take_end(source, format_, calls)


def _call(source: TextSource, calls: OutputWriter, *, bare: bool) -> Reading[None]:
    name, stop = yield from source.until_short(_NAME_END, MAX_NAME)
    if stop != "(" or not _NAME.fullmatch(name):
        raise MalformedError
    source.take(1)
    calls.begin(name, offered=bare)
    names: set[str] = set()
    while True:
        yield from source.blanks()
        if (yield from source.peek()) == ")":
            source.take(1)
            break
        key, stop = yield from source.until_short(_KEY_END, MAX_NAME)
        key = key.strip()
        if stop != "=" or not _NAME.fullmatch(key) or key in names:
            raise MalformedError
        source.take(1)
        calls.arguments(f'{", " if names else "{"}"{json_text(key)}": ')
        names.add(key)
        yield from scan_value(source, PYTHON, calls.arguments)
        yield from source.blanks()
        if (yield from source.peek()) == ",":
            source.take(1)
        elif (yield from source.peek()) != ")":
            raise MalformedError
    calls.arguments("}" if names else "{}")
    calls.end()

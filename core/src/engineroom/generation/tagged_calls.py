"""Reads calls whose arguments stand between tags, as bare text: Qwen's, GLM's, DeepSeek's, Kimi's.

Nothing in a value is escaped, so a tag in it may be text. It ends a value only where something
follows that the format has there. Models forget tags as well: what can only be the next argument,
or the end of the call, ends a value too. Where a value has to be JSON, a tag in one of its strings
is text whatever follows.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Final

from engineroom.generation.argument_types import (
    argument_json,
    argument_types,
    property_schema,
)
from engineroom.generation.call_forms import TaggedForm, ToolFormat
from engineroom.generation.json_calls import MAX_NAME
from engineroom.generation.literal_scanner import json_text
from engineroom.generation.output_writer import OutputWriter
from engineroom.generation.text_source import (
    LINE,
    WORD,
    CutError,
    MalformedError,
    Markers,
    Reading,
    TextSource,
)

__all__ = ["tagged_call"]

_ATTRIBUTE: Final = re.compile(r'\s*([\w.:-]+)\s*=\s*"([^"]*)"')
_CDATA: Final = "<![CDATA["
_CDATA_END: Final = Markers(["]]>"])
_STRING: Final = frozenset({"string"})
_IN_STRINGS: Final = re.compile(r'\\[\s\S]?|["\x00-\x1f]')
_ENTITIES: Final = (("&quot;", '"'), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"))


class _Tags:
    """The markers of a format, made once."""

    def __init__(self, format_: ToolFormat, form: TaggedForm) -> None:
        behind = [format_.opening, *format_.section, format_.begin]
        self.call = Markers([form.call])
        self.name_end = Markers(
            [form.name_end] if form.call else [form.name_end, form.parameter, form.call_end, "\n"]
        )
        self.header = LINE if form.attributes else WORD
        self.members = Markers([form.parameter, form.call_end])
        self.parameter_end = Markers([form.parameter_end])
        self.key_gap = Markers([form.key_gap])
        self.cdata = Markers([_CDATA] if form.cdata else [])
        self.value_end = Markers([form.value_end])
        self.value = Markers([form.value_end, form.parameter, form.call_end])
        self.behind_call = Markers([text.strip() for text in behind])
        line = r"\s*\n" if form.lines else ""
        name = r'\s[^\n]*?"' if form.attributes else r"[^\s<>]{1,64}"
        self.next_parameter = re.compile(
            re.escape(form.parameter) + name + re.escape(form.parameter_end) + line
        )
        self.longest_parameter = len(form.parameter + form.parameter_end) + 100


@cache
def _tags(format_: ToolFormat, form: TaggedForm) -> _Tags:
    return _Tags(format_, form)


def tagged_call(
    source: TextSource, format_: ToolFormat, form: TaggedForm, calls: OutputWriter
) -> Reading[None]:
    """Read a call, behind the format's begin.

    :raises MalformedError: it is none. :raises CutError: the text has ended within it.
    """
    tags = _tags(format_, form)
    yield from source.blanks()
    if form.call:
        yield from source.requires(tags.call)
    header, stop = yield from source.until_short(tags.name_end, MAX_NAME, tags.header)
    if stop == form.name_end:
        source.take(len(stop))
    name, _ = _name(header, form)
    calls.begin(name)
    parameters = calls.tools.get(name)
    if form.call and header.rstrip().endswith("/"):  # an empty element
        calls.arguments("{}")
        calls.end()
        source.keep()
        return
    names: set[str] = set()
    while True:
        yield from source.blanks()
        if (yield from source.requires(tags.members)) == form.call_end:
            break
        header, stop = yield from source.until_short(tags.parameter_end, MAX_NAME, LINE)
        source.take(len(stop))
        key, attributes = _name(header, form)
        if key in names:
            raise MalformedError
        calls.arguments(f'{", " if names else "{"}"{json_text(key)}": ')
        names.add(key)
        if tags.key_gap.texts:
            yield from source.blanks()
            yield from source.requires(tags.key_gap)
        yield from _value(source, tags, form, calls, _types(form, parameters, key, attributes))
    calls.arguments("}" if names else "{}")
    calls.end()
    source.keep()


def _name(header: str, form: TaggedForm) -> tuple[str, dict[str, str]]:
    """The name that a tag gives, and its attributes."""
    if not form.attributes:
        return header.strip(), {}
    attributes = {key: _unescaped(value) for key, value in _ATTRIBUTE.findall(header)}
    for key in ("name", "tool", "key"):
        if key in attributes:
            return attributes[key], attributes
    raise MalformedError


def _unescaped(text: str) -> str:
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    return text


def _types(
    form: TaggedForm, parameters: Any, key: str, attributes: dict[str, str]
) -> frozenset[str]:
    """What a value may be; empty: it does not say."""
    if form.types == "string" and "string" in attributes:
        return _STRING if attributes["string"] == "true" else frozenset()
    if form.types == "type" and "type" in attributes:
        return frozenset({attributes["type"]})
    schema = property_schema(parameters, key)
    return _STRING if schema is None else argument_types(schema, parameters)


class _JsonStrings:
    """Whether a text that comes in pieces stands within a string of JSON."""

    def __init__(self) -> None:
        self.inside = False
        self._is_json: bool | None = None  # not known before the first character
        self._escaped = False

    def write(self, text: str) -> None:
        """The next piece."""
        if self._is_json is None and (body := text.lstrip()):
            self._is_json = body[0] in "{["
        if not (self._is_json and text):
            return
        escaped = False
        for match in _IN_STRINGS.finditer(text, 1 if self._escaped else 0):
            escaped = match[0] == "\\"  # at the end: what it escapes comes next
            if match[0] == '"':
                self.inside = not self.inside
            elif self.inside and match[0] < " ":  # it is none: a tag is to end it
                self.inside = self._is_json = False
                return
        self._escaped = escaped


class _Value:
    """A value as it comes: text goes out at once, what has another type when it is whole."""

    def __init__(self, form: TaggedForm, calls: OutputWriter, types: frozenset[str]) -> None:
        self._calls = calls
        self._types = types
        self._lines = form.lines
        self._parts: list[str] = []
        self._is_text = types == _STRING
        self._strings = None if "string" in types else _JsonStrings()
        self._first = True
        self.line = False
        """A line break was the last that came; it may belong to the tag that follows."""
        if self._is_text:
            calls.arguments('"')

    def write(self, text: str) -> None:
        if self._lines and self._first:
            text = text.removeprefix("\n")
            self._first = False
            if not text:
                return
        if self.line and self._lines:
            self._take("\n")
        self.line = text.endswith("\n")
        self._take(text[:-1] if self.line and self._lines else text)

    @property
    def in_string(self) -> bool:
        """What comes stands within a string of JSON; nothing does behind a line break."""
        return self._strings is not None and self._strings.inside and not self.line

    def end(self) -> None:
        self._calls.arguments(
            '"' if self._is_text else argument_json("".join(self._parts), self._types)
        )

    def _take(self, text: str) -> None:
        if self._is_text:
            self._calls.arguments(json_text(text))
        else:
            self._parts.append(text)
            if self._strings is not None:
                self._strings.write(text)


def _value(
    source: TextSource,
    tags: _Tags,
    form: TaggedForm,
    calls: OutputWriter,
    types: frozenset[str],
) -> Reading[None]:
    value = _Value(form, calls, types)
    if tags.cdata.texts and (yield from source.take_one(tags.cdata)):
        while (marker := (yield from source.until(_CDATA_END, value.write))) is not None:
            if not value.in_string and (yield from source.follows(len(marker), tags.value_end)):
                source.take(len(marker))
                break
            value.write(source.take(1))
        yield from source.blanks()
    while True:
        marker = yield from source.until(tags.value, value.write)
        if marker is None:
            raise CutError
        if value.in_string:
            pass
        elif marker == form.value_end:
            if (yield from source.follows(len(marker), tags.members)):
                source.take(len(marker))
                break
        elif marker == form.parameter:
            if value.line:
                text = yield from source.ahead(tags.longest_parameter)
                if tags.next_parameter.match(text):
                    break
        elif (value.line or not form.lines) and (
            yield from source.follows(len(marker), tags.behind_call, end=True)
        ):
            break
        value.write(source.take(1))
    value.end()

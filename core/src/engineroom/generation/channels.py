"""Reads messages with a header each, as OpenAI's gpt-oss writes them (Harmony).

A header names a channel, and perhaps a recipient: ``analysis`` is reasoning, a message to
``functions.f`` is a call of ``f``, all else is content. What is written to another recipient, a
tool of the model's own, is neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from engineroom.generation.literal_scanner import JSON, scan_value
from engineroom.generation.output_writer import OutputWriter
from engineroom.generation.text_source import CutError, MalformedError, Markers, Reading, TextSource

__all__ = ["channel_messages", "header_begun", "header_of"]

MAX_HEADER: Final = 400
_START: Final = "<|start|>assistant"
_STARTS: Final = Markers([_START])
_HEADER_END: Final = Markers(["<|message|>", "<|end|>", "<|start|>"])
_HEADER_TAGS: Final = Markers(["<|channel|>", "<|constrain|>", "<|message|>"])
_HEADER_BEGIN: Final = Markers([*_HEADER_TAGS.texts, "to="])
_ENDS: Final = Markers(["<|end|>", "<|call|>", "<|return|>"])
_BODY_END: Final = Markers([*_ENDS.texts, _START])
_NEXT: Final = Markers(["<|start|>", "<|channel|>"])
_CHANNEL: Final = re.compile(r"<\|channel\|>(\w+)")
_RECIPIENT: Final = re.compile(r"\bto=([^\s<]+)")
_CUT_HEADER: Final = re.compile(
    r"\s*(?:to=[^\s<]*)?\s*(?:<\|channel\|>\w*(?:\s+to=[^\s<]*)?\s*(?:<\|constrain\|>)?\w*\s*)?"
    r"(?:<(?:\|[a-z]*\|?)?)?"
)
"""A header that the end of the text cuts."""


def header_begun(prompt_tail: str) -> str:
    """What the prompt already has of the answer's first header."""
    return prompt_tail.rpartition(_START)[2] if _START in prompt_tail else ""


def header_of(*, thinking: bool) -> str:
    """The header of a message that is continued."""
    return f"<|channel|>{'analysis' if thinking else 'final'}<|message|>"


def channel_messages(source: TextSource, writer: OutputWriter) -> Reading[None]:
    """Read to the end of the text. :raises CutError: it ends within a call."""
    while not (yield from source.at_end()):
        header = yield from _header(source, writer)
        recipient = ["", *_RECIPIENT.findall(header)][-1]
        if recipient.startswith("functions.") and writer.tools:
            yield from _call(source, writer, recipient.removeprefix("functions."))
        elif recipient in writer.tools:
            yield from _call(source, writer, recipient)
        elif recipient and not recipient.startswith(("functions.", "assistant")):
            yield from _body(source, _unread)
        elif _CHANNEL.findall(header)[-1:] == ["analysis"]:
            writer.begin_reasoning()
            yield from _body(source, writer.reasoning, glued=True)
            writer.end_reasoning()
        else:
            yield from _body(source, writer.content)
        yield from source.take_one(_STARTS)


def _header(source: TextSource, writer: OutputWriter) -> Reading[str]:
    """The header of the next message; empty: it has none, or none that can be read."""
    if not (yield from source.follows(0, _HEADER_BEGIN)):
        if (yield from source.passes(_HEADER_TAGS)):
            raise CutError
        if source.limited and source.begun(_HEADER_BEGIN):
            raise CutError
        return ""
    source.keep()
    try:
        text, end = yield from source.until_short(_HEADER_END, MAX_HEADER)
    except MalformedError:
        return ""
    except CutError:
        if not _CUT_HEADER.fullmatch(text := source.kept()):
            writer.content(text)
        elif "to=functions" in text:
            writer.cut()
        raise
    source.kept()
    if end != "<|message|>":
        writer.content(text)
        return ""
    source.take(len(end))
    return text


def _call(source: TextSource, writer: OutputWriter, name: str) -> Reading[None]:
    source.keep()
    try:
        yield from source.blanks()
        yield from source.peek()
        if (yield from source.begins(_ENDS)):
            writer.begin(name)
            writer.arguments("{}")
        elif (yield from source.peek()) == "{":
            writer.begin(name)
            yield from scan_value(source, JSON, writer.arguments)
        else:
            raise MalformedError
        writer.end()
        source.keep()
        yield from source.blanks()
    except MalformedError:
        writer.content(source.kept())
    except CutError:
        writer.cut()
        raise
    source.kept()
    yield from _body(source, writer.content)


def _body(
    source: TextSource, write: Callable[[str], None], *, glued: bool = False
) -> Reading[None]:
    """Read to the end of a message. What ends one may stand in its text as well."""
    while True:
        marker = yield from source.until(_BODY_END, write, drop=2, glued=glued)
        if marker is None:
            return
        if marker == _START:
            if (yield from source.follows(len(marker), _HEADER_BEGIN)):
                return
        elif (yield from source.follows(len(marker), _NEXT, end=True)):
            source.take(len(marker))
            return
        write(source.take(1))


def _unread(_: str) -> None:
    """Neither content nor reasoning."""

"""What an output parser says: content and reasoning without the blanks around them, and calls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from engineroom.generation.output_events import (
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    OutputEvent,
    Reasoning,
)
from engineroom.generation.text_source import MAX_BLANKS, MalformedError, TextSource

__all__ = ["OutputWriter"]

_NAME: Final = re.compile(r"[\w.:/-]{1,128}")
_Kind: TypeAlias = type[Content] | type[Reasoning] | int


class _Blanks:
    """A text whose blanks at the end wait for what comes."""

    __slots__ = ("leading", "pending", "some")

    def __init__(self, *, leading: bool) -> None:
        self.leading = leading
        """Blanks belong to the text also where nothing stands before them."""
        self.pending = ""
        self.some = False
        """There was text since the last :meth:`cut`."""

    def push(self, text: str) -> str:
        """What of it may be shown, with what waited."""
        if not self.leading and not self.some:
            text = text.lstrip()
        text = self.pending + text
        body = text.rstrip()
        blanks = len(text) - len(body)
        blanks = min(blanks, MAX_BLANKS)
        self.pending = text[len(text) - blanks :]
        shown = text[: len(text) - blanks]
        self.some = self.some or bool(body)
        return shown

    def cut(self, *, keep: bool) -> str:
        """Something else comes: the blanks that waited, if they are to be kept."""
        pending, some = self.pending, self.some
        self.pending, self.some = "", False
        return pending if keep and some else ""


class OutputWriter:
    """Collects events.

    :param source: what is read; where it stands when reasoning comes is told with it.
    :param tools: the JSON schemas of the tools' arguments, by name.
    :param trims: blanks in front of a call are no content.
    """

    def __init__(self, source: TextSource, tools: Mapping[str, Any], *, trims: bool) -> None:
        self.tools = tools
        self.reasoned: list[tuple[int, int]] = []
        """From where to where the text is reasoning."""
        self._source = source
        self.trims = trims
        self.calls = 0
        """Calls that have begun."""
        self.named = False
        """It is known which tool the call that comes is of."""
        self._brace = ""
        """What may be the end of the arguments, held back until the call is known to be one: those
        of a call that is cut, or is none, are never complete in a stream."""
        self.mute = False
        """What comes as content is none, for there can be none."""
        self.cut_call = False
        """The text has ended within a call."""
        self._content = _Blanks(leading=True)
        self._reasoning = _Blanks(leading=False)
        self._after_call = False
        self._events: list[OutputEvent] = []
        self._kind: _Kind | None = None
        self._parts: list[str] = []

    def take(self) -> list[OutputEvent]:
        """The events since the last time."""
        self._flush()
        events, self._events = self._events, []
        return events

    # ── Text ─────────────────────────────────────────────────────────────────────────────────

    def content(self, text: str) -> None:
        """Text of the answer."""
        if self.mute:
            self.cut_call = True
        elif shown := self._content.push(text):
            self._write(Content, shown)
            self._after_call = False

    def reasoning(self, text: str) -> None:
        """Text of the reasoning, which was read right now."""
        end = self._source.position
        start = end - len(text)
        if self.reasoned and self.reasoned[-1][1] == start:
            start, _ = self.reasoned.pop()
        self.reasoned.append((start, end))
        if shown := self._reasoning.push(text):
            self._write(Reasoning, shown)

    def begin_reasoning(self) -> None:
        """Reasoning comes next."""
        if blanks := self._content.cut(keep=not self.trims):
            self._write(Content, blanks)

    def go_on_reasoning(self) -> None:
        """Some of the reasoning was there before: blanks that come first belong to it."""
        self._reasoning.some = True

    def end_reasoning(self) -> None:
        """The reasoning is over; blanks behind it separate it from the answer."""
        self._reasoning.cut(keep=False)
        self._content.leading = False

    @property
    def at_line(self) -> bool:
        """Whether the reasoning stands at the beginning of a line."""
        return not self._reasoning.some or "\n" in self._reasoning.pending

    def cut(self) -> None:
        """The text has ended within a call, behind the blanks in front of it."""
        self.cut_call = True
        if self.trims:
            self._content.cut(keep=False)

    def finish(self) -> None:
        """The text has ended."""
        if blanks := self._reasoning.cut(keep=True):
            self._write(Reasoning, blanks)
        pending = self._content.pending
        if pending and not (self._after_call or self.mute):
            self._write(Content, pending)

    # ── Calls ────────────────────────────────────────────────────────────────────────────────

    def begin(self, name: str, *, offered: bool = False) -> None:
        """A call begins.

        :param offered: it is one only if such a tool was offered.
        :raises MalformedError: it is none.
        """
        if not _NAME.fullmatch(name):
            raise MalformedError
        if offered and name not in self.tools:
            raise MalformedError
        blanks = self._content.cut(keep=not self.trims)
        if blanks:
            self._write(Content, blanks)
        self._flush()
        self._content.leading = True
        self._events.append(CallBegin(self.calls, name))
        self.calls += 1
        self.named, self._brace = True, ""

    def arguments(self, text: str) -> None:
        """More of the arguments, in JSON."""
        text = self._brace + text
        self._brace = "}" if text.endswith("}") else ""
        if shown := text.removesuffix(self._brace):
            self._write(self.calls - 1, shown)

    def end(self) -> None:
        """The call is complete."""
        if self._brace:
            self._write(self.calls - 1, self._brace)
            self._brace = ""
        self._flush()
        self._events.append(CallEnd(self.calls - 1))
        self.named = False
        self._after_call = True

    def no_call(self, text: str) -> None:
        """What seemed to be a call is none, but content."""
        self.named, self._brace = False, ""
        self.content(text)

    def again(self, events: list[OutputEvent]) -> None:
        """Calls that another parser has found in a part of the text."""
        for event in events:
            if isinstance(event, CallBegin):
                self.begin(event.name)
            elif isinstance(event, CallArguments):
                self.arguments(event.text)
            elif isinstance(event, CallEnd):
                self.end()

    def _write(self, kind: _Kind, text: str) -> None:
        if kind != self._kind:
            self._flush()
            self._kind = kind
        self._parts.append(text)

    def _flush(self) -> None:
        if self._parts:
            text = "".join(self._parts)
            self._parts.clear()
            if isinstance(self._kind, int):
                self._events.append(CallArguments(self._kind, text))
            elif self._kind is not None:
                self._events.append(self._kind(text))
        self._kind = None

"""Tells content, reasoning and tool calls apart in a model's text, as it comes.

A character costs the same wherever it stands, and where the text is cut into pieces makes no
difference. What begins like a call and is none comes back as content; what the end of the text cuts
is no call, and its markup no content.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from engineroom.generation.call_forms import (
    CallForm,
    ChannelForm,
    JsonForm,
    NamedForm,
    PythonicForm,
    ReasoningFormat,
    TaggedForm,
    ToolFormat,
)
from engineroom.generation.channels import channel_messages, header_begun, header_of
from engineroom.generation.json_calls import json_calls, named_call
from engineroom.generation.output_events import (
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    OutputEvent,
    Reasoning,
)
from engineroom.generation.output_writer import OutputWriter
from engineroom.generation.python_calls import python_calls
from engineroom.generation.tagged_calls import tagged_call
from engineroom.generation.text_source import CutError, MalformedError, Markers, Reading, TextSource

__all__ = ["Output", "OutputParser", "read_events", "read_output"]

MAX_NOISE = 256
"""Characters between the beginning of a section of calls and the first of them, or between two."""
MARKUP = 4
"""Characters of a marker from which on it is taken for one where the end of the text cuts it."""

_CUT_NAME: Final = re.compile(
    r'\s*(?:\[?\s*(?:\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?(?P<key>"\w*"?)?\s*'
    r'(?P<colon>:\s*(?:"(?P<name>[\w.:/-]*)"?)?\s*)?)?)'
)
"""How an object begins that ends within the name of a tool, or before."""
_CUT_PYTHON: Final = re.compile(r"\s*\[\s*(?P<name>[\w.-]*)\s*")
_NAME_KEYS: Final = ('"name"', '"tool_name"', '"function"', '"type"')


class OutputParser:
    """Reads the answer of one request: an ``OutputReader``.

    :param format_: what calls look like; ``None``: there are none.
    :param tools: those that the model was offered, in OpenAI's form; without any, nothing is a
        call.
    :param prompt_tail: how the prompt ends, which may have begun the reasoning.
    :param reasoning: what stands around reasoning; ``None``: there is none.
    :param only_calls: there is no content, for something sees to it that there are calls.
    :param bounded: reasoning may be ended from outside. A model that did not expect it ends it once
        more, which is no content.
    """

    def __init__(
        self,
        format_: ToolFormat | None,
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        prompt_tail: str = "",
        reasoning: ReasoningFormat | None = None,
        only_calls: bool = False,
        bounded: bool = False,
    ) -> None:
        schemas = _schemas(tools or ())
        self._format = format_
        self._tools = tools
        self._reasoning = reasoning
        self._only_calls = only_calls
        self._bounded = bounded
        self._in_reasoning = False
        self._goes_on = False
        self._bare = True  # nothing but white space was content so far
        self._calls = format_ if schemas else None
        self._channels = format_ is not None and isinstance(format_.form, ChannelForm)
        self._source = TextSource()
        self._writer = OutputWriter(
            self._source, schemas, trims=format_ is not None and format_.trims
        )
        self._machine: Reading[None] | None = None
        if prompt_tail:
            self.begin(prompt_tail)

    def begin(self, prompt_tail: str) -> None:
        """Before the first text: how the prompt ends."""
        if self._channels:
            header = header_begun(prompt_tail)
            self._source.feed(header)
            self._source.position = -len(header)
        elif self._reasoning is not None:
            self._in_reasoning = prompt_tail.rstrip().endswith(self._reasoning.begin)

    def go_on(self, begun: str, *, thinking: bool, bare: bool) -> list[OutputEvent]:
        """Instead of :meth:`begin`: the text goes on with a message that has begun.

        :param begun: the end of the message, from where it is not known yet what it is.
        :param thinking: the message has only reasoning so far.
        :param bare: what has begun may be a call that nothing marks.
        :returns: what the beginning is known to be by itself.
        """
        self._goes_on, self._bare, self._in_reasoning = True, bare, thinking
        if self._channels:
            begun = f"{header_of(thinking=thinking)}{begun}"
        if thinking:
            self._writer.go_on_reasoning()
        self._source.feed(begun)
        self._source.position = -len(begun)
        return self._resume()

    def feed(self, text: str) -> list[OutputEvent]:
        """Take the next piece of the text."""
        self._source.feed(text)
        return self._resume()

    def finish(self, *, limited: bool = False) -> list[OutputEvent]:
        """The text has ended: what was held back."""
        self._source.ended, self._source.limited = True, limited
        self._writer.mute = limited and self._only_calls
        return self._resume()

    @property
    def cut_call(self) -> bool:
        """Whether the text has ended within a call."""
        return self._writer.cut_call

    @property
    def reasoned(self) -> Sequence[tuple[int, int]] | None:
        """From where to where there is reasoning in the text; ``None``: there is never any."""
        return self._writer.reasoned if self._channels or self._reasoning is not None else None

    def _resume(self) -> list[OutputEvent]:
        if self._machine is None:
            self._machine = self._read()
        next(self._machine, None)
        return self._writer.take()

    # ── Reading ──────────────────────────────────────────────────────────────────────────────

    def _read(self) -> Reading[None]:
        try:
            if self._channels:
                yield from channel_messages(self._source, self._writer)
            else:
                yield from self._read_text()
        except CutError:
            pass
        self._writer.finish()

    def _read_text(self) -> Reading[None]:
        source, writer = self._source, self._writer
        if self._in_reasoning or (not self._goes_on and (yield from self._thinks())):
            yield from self._read_reasoning()
        markers = self._markers()
        bare = self._bare
        while True:
            if bare and self._calls is not None and self._calls.bare:
                bare = yield from self._read_bare(self._calls)
                if (yield from source.at_end()):
                    return
            marker = yield from source.until(markers, writer.content, drop=MARKUP)
            if marker is None:
                if source.dropped and self._opens(source.dropped):
                    writer.cut()
                return
            bare = False
            if self._reasoning is not None and marker == self._reasoning.begin:
                source.take(len(marker))
                writer.begin_reasoning()
                yield from self._read_reasoning()
            elif self._format is not None and marker in self._format.ignored:
                source.take(len(marker))
            else:
                assert self._calls is not None
                yield from self._read_calls(self._calls, marker)

    def _markers(self) -> Markers:
        texts: list[str] = []
        if self._reasoning is not None and self._reasoning.anywhere:
            texts.append(self._reasoning.begin)
        if self._format is not None:
            texts += self._format.ignored
        if self._calls is not None:
            texts += [self._calls.section[0].strip(), self._calls.opening.strip()]
        return Markers(texts)

    def _opens(self, text: str) -> bool:
        """Whether a call, or a section of them, may begin like this."""
        calls = self._calls
        return calls is not None and any(
            opening.strip().startswith(text) for opening in (calls.section[0], calls.opening)
        )

    def _thinks(self) -> Reading[bool]:
        """Whether the text begins with reasoning, whose beginning is read."""
        if self._reasoning is None:
            return False
        source, begin = self._source, Markers([self._reasoning.begin])
        if (yield from source.follows(0, begin)):
            yield from source.blanks()
            yield from source.take_one(begin)
            return True
        if source.limited and (begun := source.begun(begin)):
            if self._opens(begun):
                self._writer.cut()
            raise CutError
        return False

    def _read_reasoning(self) -> Reading[None]:
        source, writer, reasoning = self._source, self._writer, self._reasoning
        assert reasoning is not None
        ends = [reasoning.end, *reasoning.also_ends]
        calls = [] if self._calls is None else [self._calls.section[0], self._calls.opening]
        end_markers = Markers(ends)
        markers = Markers([*ends, *(text.strip() for text in calls)])
        while True:
            marker = yield from source.until(markers, writer.reasoning, drop=MARKUP, glued=True)
            if marker is None:
                return
            if marker in ends:
                break
            if not writer.at_line:
                writer.reasoning(source.take(len(marker)))
                continue
            # A call that is drafted, or one that a model makes without an end to its reasoning.
            held: list[str] = []
            marker = yield from source.until(end_markers, held.append)
            if marker is not None:
                writer.reasoning("".join(held))
                break
            parser = OutputParser(self._format, self._tools)
            inner = parser.feed("".join(held)) + parser.finish(limited=source.limited)
            output = read_output(inner)
            if (output.calls or parser.cut_call) and not output.content.strip():
                writer.end_reasoning()
                writer.again(inner)
                if parser.cut_call:
                    writer.cut()
            else:
                writer.reasoning("".join(held))
            return
        if marker == reasoning.end:
            source.take(len(marker))
            if self._bounded:
                yield from self._read_ends_again(Markers([marker]))
        writer.end_reasoning()

    def _read_ends_again(self, end: Markers) -> Reading[None]:
        """The end of reasoning that is over already, also where the end of the text cuts it."""
        source = self._source
        while (yield from source.follows(0, end)):
            yield from source.blanks()
            yield from source.take_one(end)
        begun = source.begun(end)
        if source.ended and begun and (source.limited or len(begun) >= MARKUP):
            if self._opens(begun):
                self._writer.cut()
            raise CutError

    # ── Calls ────────────────────────────────────────────────────────────────────────────────

    def _read_bare(self, format_: ToolFormat) -> Reading[bool]:
        """Read calls that nothing marks, if they come; return whether nothing has come at all."""
        source, writer = self._source, self._writer
        listed, before = isinstance(format_.form, PythonicForm), writer.calls
        if not (yield from source.follows(0, Markers(["[" if listed else "{"]))):
            return False
        source.keep()
        try:
            if isinstance(format_.form, PythonicForm):
                yield from python_calls(source, format_, format_.form, writer, bare=True)
            else:
                yield from json_calls(source, format_, writer, bare=True)
        except MalformedError:
            writer.no_call(source.kept())
        except CutError:
            kept = source.kept()
            likely = source.limited and self._names_begin(format_.form, kept)
            if writer.named or writer.calls > before or writer.mute or likely:
                writer.cut()
            else:
                writer.content(kept)
            raise
        source.kept()
        return False

    def _names_begin(self, form: CallForm, text: str) -> bool:
        """Whether a bare call ends within the name of one of the tools, or before it."""
        python = isinstance(form, PythonicForm)
        match = (_CUT_PYTHON if python else _CUT_NAME).fullmatch(text)
        if match is None:
            return False
        if not python:
            key = match["key"] or ""
            if not (key in _NAME_KEYS if match["colon"] else _begins(_NAME_KEYS, key)):
                return False
        return _begins(self._writer.tools, match["name"] or "")

    def _read_calls(self, format_: ToolFormat, marker: str) -> Reading[None]:
        source, writer = self._source, self._writer
        source.keep()
        section = format_.section[0].strip()
        try:
            if marker == section != "":
                source.take(len(marker))
                yield from self._read_section(format_)
            else:
                yield from self._read_call(format_)
                yield from self._read_stray_end(format_)
        except MalformedError:
            writer.no_call(source.kept())
        except CutError:
            writer.cut()
            raise
        source.kept()

    def _read_call(self, format_: ToolFormat) -> Reading[None]:
        source, form, calls = self._source, format_.form, self._writer
        source.take(len(format_.begin.strip()))
        if isinstance(form, JsonForm):
            yield from json_calls(source, format_, calls)
        elif isinstance(form, NamedForm):
            yield from named_call(source, format_, form, calls)
        elif isinstance(form, PythonicForm):
            yield from python_calls(source, format_, form, calls)
        elif isinstance(form, TaggedForm):
            yield from tagged_call(source, format_, form, calls)

    def _read_stray_end(self, format_: ToolFormat) -> Reading[None]:
        """The end of a section whose beginning is missing."""
        if end := format_.section[1].strip():
            blanks = yield from self._source.blanks()
            if not (yield from self._source.passes(Markers([end]))):
                self._writer.content(blanks)

    def _read_section(self, format_: ToolFormat) -> Reading[None]:
        """Read calls up to the end of their section; what stands between them is nothing."""
        source, writer = self._source, self._writer
        end = format_.section[1].strip()
        markers = Markers([format_.opening.strip(), end])
        before = writer.calls
        while True:
            try:
                noise, marker = yield from source.until_short(markers, MAX_NOISE)
            except CutError:
                noise = source.kept().strip().removeprefix(format_.section[0].strip()).strip()
                if writer.calls == before and not format_.opening.startswith(noise):
                    raise MalformedError from None
                raise
            if marker == end:
                if noise.strip() and writer.calls == before:
                    raise MalformedError
                source.take(len(end))
                return
            yield from self._read_call(format_)


def _begins(names: Iterable[str], text: str) -> bool:
    return any(name.startswith(text) for name in names)


class Output(NamedTuple):
    """What a whole text has."""

    content: str
    reasoning: str
    calls: list[tuple[str, str]]
    """The complete ones: name, and arguments in JSON."""


def read_events(parser: OutputParser, text: str) -> list[OutputEvent]:
    """All events of a whole text."""
    return parser.feed(text) + parser.finish()


def read_output(events: Sequence[OutputEvent]) -> Output:
    """What events come to."""
    content = "".join(event.text for event in events if isinstance(event, Content))
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    names = {event.call: event.name for event in events if isinstance(event, CallBegin)}
    arguments: dict[int, list[str]] = {call: [] for call in names}
    for event in events:
        if isinstance(event, CallArguments):
            arguments[event.call].append(event.text)
    ended = [event.call for event in events if isinstance(event, CallEnd)]
    return Output(content, reasoning, [(names[c], "".join(arguments[c])) for c in ended])


def _schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The schemas of the tools' arguments, by name."""
    functions = [tool.get("function", tool) for tool in tools]
    return {function["name"]: function.get("parameters") for function in functions}

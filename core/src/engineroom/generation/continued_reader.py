"""Reads answers that go on with a message, which may have begun a thought, a call or a marker.

What the message has is no part of the answer, but for a call that it has only begun: whoever is to
run it needs it in whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from engineroom.generation.call_forms import ReasoningFormat, ToolFormat
from engineroom.generation.continued import LONGEST_CALL, Continued, open_call
from engineroom.generation.output_events import CallEnd, Content, OutputEvent, Reasoning
from engineroom.generation.outputs import OutputParser

__all__ = ["ContinuedReader"]


class ContinuedReader:
    """An ``OutputReader`` of an answer that goes on with a message.

    :param parser: of the same formats, to which no text was fed.
    """

    def __init__(
        self,
        parser: OutputParser,
        continued: Continued,
        format_: ToolFormat,
        reasoning: ReasoningFormat | None,
    ) -> None:
        self._parser = parser
        self._continued = continued
        self._format = format_
        self._reasoning = reasoning
        self._known: list[OutputEvent] = []  # of a call that the message has begun
        self._waiting = ""  # of the message, that may come as text yet
        self._ended_calls = 0  # of the message

    def begin(self, prompt_tail: str) -> None:
        """Before the first text; how the prompt ends says something where nothing has come yet."""
        continued = self._continued
        if continued.fresh:
            self._parser.begin(prompt_tail)
            return
        bare = not continued.thinking and self._is_bare(continued.content)
        begun = continued.content if bare else self._begun()
        events = self._parser.go_on(begun, thinking=continued.thinking, bare=bare)
        ended = {event.call for event in events if isinstance(event, CallEnd)}
        self._ended_calls = len(ended)
        texts = [event.text for event in events if isinstance(event, Content | Reasoning)]
        self._known = [
            event
            for event in events
            if not isinstance(event, Content | Reasoning) and event.call not in ended
        ]
        if not self._known:
            self._waiting = begun[sum(map(len, texts)) :]

    def feed(self, text: str) -> list[OutputEvent]:
        """Take the next piece of the text."""
        return list(self._of_answer(self._parser.feed(text)))

    def finish(self, *, limited: bool = False) -> list[OutputEvent]:
        """The text has ended: what was held back."""
        return list(self._of_answer(self._parser.finish(limited=limited)))

    @property
    def cut_call(self) -> bool:
        """Whether the text has ended within a call."""
        return self._parser.cut_call

    @property
    def reasoned(self) -> Sequence[tuple[int, int]] | None:
        """From where to where there is reasoning in the text; ``None``: there is never any."""
        return self._parser.reasoned

    def _is_bare(self, content: str) -> bool:
        return (
            self._format.bare
            and len(content) <= LONGEST_CALL
            and content.lstrip()[:1] in ("{", "[")
        )

    def _begun(self) -> str:
        """The end of the message, from where it has begun a call, or what may be a marker."""
        continued, reasoning = self._continued, self._reasoning
        if continued.thinking:
            ends = () if reasoning is None else (reasoning.end, *reasoning.also_ends)
            return _begun_marker(continued.reasoning, ends)
        if call := open_call(continued.content, self._format):
            return call
        section, opening = self._format.section[0].strip(), self._format.opening.strip()
        anywhere = reasoning is not None and reasoning.anywhere
        markers = [section, opening, *([reasoning.begin] if reasoning and anywhere else ())]
        return _begun_marker(continued.content, markers)

    def _of_answer(self, events: Iterable[OutputEvent]) -> Iterator[OutputEvent]:
        known, self._known = self._known, []
        for event in [*known, *events]:
            if not isinstance(event, Content | Reasoning):
                self._waiting = ""
                yield event._replace(call=event.call - self._ended_calls)
            elif text := self._not_waiting(event.text):
                yield event._replace(text=text)

    def _not_waiting(self, text: str) -> str:
        """The text without what the message has of it."""
        if text.startswith(self._waiting):
            text, self._waiting = text[len(self._waiting) :], ""
        elif self._waiting.startswith(text):
            text, self._waiting = "", self._waiting[len(text) :]
        else:
            self._waiting = ""
        return text


def _begun_marker(text: str, markers: Iterable[str]) -> str:
    """The longest beginning of one of the markers that the text ends with."""
    begun = ""
    for marker in markers:
        for count in range(len(marker) - 1, len(begun), -1):
            if text.endswith(marker[:count]):
                begun = marker[:count]
                break
    return begun

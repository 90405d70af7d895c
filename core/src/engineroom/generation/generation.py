"""The text, the counts and the clock of one request, made of its decoding steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from pydantic import ValidationError

from engineroom.errors import InferenceError
from engineroom.generation.deltas import ReasoningDelta, ToolCallDelta
from engineroom.generation.output_events import (
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    OutputEvent,
    OutputReader,
    Reasoning,
)
from engineroom.generation.steps import TokenStep
from engineroom.generation.text import TextPipeline
from engineroom.generation.token_places import TokenPlaces
from engineroom.schemas import (
    FinishReason,
    InferenceRequest,
    InferenceResponse,
    PromptLogprob,
    TokenLogprob,
)
from engineroom.tools import ToolCall, new_call_id, tool_names

__all__ = ["Generation", "ParsedOutput"]

_MOST_UNKNOWN: Final = 4
"""Tools that were not offered, and are told by name."""


@dataclass(slots=True, eq=False, repr=False)
class ParsedOutput:
    """What is in a text beside content, and the chunks of it in the order in which they came.

    Bytes become text, the reader tells what of it is what, and stop sequences are looked for in
    the content alone.

    :param reader: tells content, reasoning and calls apart.
    """

    reader: OutputReader
    pipeline: TextPipeline
    chunks: list[str] = field(default_factory=list)
    """Content and deltas that nobody has asked for yet."""
    content: list[str] = field(default_factory=list)
    tail: str = ""
    """How the prompt ends, which may have begun the reasoning."""
    _begun: bool = False
    _utf8: TextPipeline = field(default_factory=TextPipeline)
    _places: TokenPlaces | None = field(init=False)
    _reasoning: list[str] = field(default_factory=list)
    _calls: list[tuple[str, str, list[str]]] = field(default_factory=list)
    _complete: list[int] = field(default_factory=list)
    _before: list[int] = field(default_factory=list)  # characters of content in front of each call
    _shown: int = 0
    entries: int = 0
    """Log probabilities that have come."""
    entries_before: list[int] = field(default_factory=list)
    """For each call that has begun, how many of them came up to the last content before it."""
    _entries_shown: int = 0

    def __post_init__(self) -> None:
        self._places = None if self.reader.reasoned is None else TokenPlaces()

    def feed(self, piece: str | bytes, tokens: int) -> None:
        """Take the text of a step, and how many tokens it has."""
        if piece and not self._begun:
            self._begun = True
            self.reader.begin(self.tail)
        text = self._utf8.feed(piece)
        if self._places is not None:
            self._places.add(tokens, len(text))
        if text:
            self._take(self.reader.feed(text))

    def finish(self, *, limited: bool = False) -> None:
        """The text has ended; ``limited``: from outside."""
        if text := self._utf8.finish():
            if self._places is not None:
                self._places.add(0, len(text))
            self._take(self.reader.feed(text))
        self._take(self.reader.finish(limited=limited))
        self._flush()

    @property
    def cut_call(self) -> bool:
        """Whether the text has ended within a call."""
        return self.pipeline.matched is None and self.reader.cut_call

    def take_chunks(self) -> list[str]:
        """Content and deltas since the last call, in their order."""
        chunks, self.chunks = self.chunks, []
        return chunks

    @property
    def reasoning(self) -> str | None:
        """The reasoning so far; ``None``: there was none."""
        return "".join(self._reasoning) if self._reasoning else None

    @property
    def reasoning_tokens(self) -> int | None:
        """The tokens of it; ``None``: the model never reasons."""
        if self._places is None:
            return None
        parts = self.reader.reasoned or ()
        return min(sum(self._places.between(*part) for part in parts), self._places.total)

    @property
    def calls(self) -> list[ToolCall] | None:
        """The calls that are complete; ``None``: there is none."""
        complete = (self._calls[call] for call in self._complete)
        calls = [ToolCall(id=i, name=name, arguments="".join(a)) for i, name, a in complete]
        return calls or None

    @property
    def begun(self) -> list[tuple[int, bool]]:
        """As :meth:`InferenceResponse.place_calls` takes it."""
        complete = set(self._complete)
        return [(place, call in complete) for call, place in enumerate(self._before)]

    def _take(self, events: Iterable[OutputEvent]) -> None:
        for event in events:
            if self.pipeline.matched is not None:
                return
            if isinstance(event, Content):
                self._show(self.pipeline.feed(event.text))
            elif isinstance(event, Reasoning):
                self._flush()
                self._reasoning.append(event.text)
                self.chunks.append(ReasoningDelta(event.text))
            elif isinstance(event, CallBegin):
                self._flush()
                if self.pipeline.matched is None:
                    call_id = new_call_id()
                    self._calls.append((call_id, event.name, []))
                    self._before.append(self._shown)
                    self.entries_before.append(self._entries_shown)
                    self.chunks.append(ToolCallDelta(event.call, call_id, event.name))
            elif isinstance(event, CallArguments):
                self._calls[event.call][2].append(event.text)
                self.chunks.append(ToolCallDelta(event.call, arguments=event.text))
            elif isinstance(event, CallEnd):
                self._complete.append(event.call)

    def _flush(self) -> None:
        """No stop sequence goes on behind what is no content."""
        if self.pipeline.matched is None:
            self._show(self.pipeline.finish())

    def _show(self, text: str) -> None:
        if text:
            self.content.append(text)
            self._shown += len(text)
            self._entries_shown = self.entries
            self.chunks.append(text)


@dataclass(slots=True, eq=False, repr=False)
class Generation:
    """The text, the counts and the clock of one request.

    :param reader: tells content, reasoning and calls apart; ``None``: all is content. Then
        :meth:`take` and :meth:`finish` give the text; else it is in ``parsed``.
    :param tail: how the prompt ends, where no step says it.
    """

    request: InferenceRequest
    handler: str
    reader: OutputReader | None = None
    tail: str = ""
    finish_reason: FinishReason | None = None
    generated_tokens: int = 0
    prompt_tokens: int | None = None
    cached_prompt_tokens: int | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[PromptLogprob] | None = None
    parsed: ParsedOutput | None = None
    ended: bool = False
    """:meth:`finish` was called."""
    warnings: list[str] = field(default_factory=list)
    _pipeline: TextPipeline = field(init=False)
    _limit: int | None = field(init=False)
    _least: int = field(init=False)  # up to so many tokens, no stop sequence is looked for
    _parts: list[str] = field(default_factory=list)
    _started: float = field(default_factory=time.perf_counter)
    _first_at: float | None = None

    def __post_init__(self) -> None:
        params = self.request.params
        self._least = params.min_tokens or 0
        self._pipeline = TextPipeline(self.request.stop_sequences, later=self._least > 0)
        self._limit = params.max_new_tokens
        if self.reader is not None:
            self.parsed = ParsedOutput(
                self.reader, self._pipeline, content=self._parts, tail=self.tail
            )

    def take(self, step: TokenStep) -> str:
        """Take a step; return the text that may be shown. Sets ``finish_reason`` at the end."""
        if step.prompt_tokens is not None:
            self.prompt_tokens = step.prompt_tokens
        if step.cached_prompt_tokens is not None:
            self.cached_prompt_tokens = step.cached_prompt_tokens
        if step.prompt_logprobs is not None:
            if self.prompt_logprobs is None:
                self.prompt_logprobs = []
            self.prompt_logprobs.extend(step.prompt_logprobs)
        if self._limit == 0:
            # What tells of the prompt comes before the first token, which nobody asked for.
            if step.token_ids or step.text or step.finish is not None:
                self.finish_reason = "length"
            return ""
        if step.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs.extend(step.logprobs)
            if self.parsed is not None:
                self.parsed.entries = len(self.logprobs)
        if tokens := step.token_ids:
            if self._first_at is None:
                self._first_at = time.perf_counter()
            self.generated_tokens += len(tokens)
        if step.prompt_tail is not None and self.parsed is not None:
            self.parsed.tail = step.prompt_tail
        pipeline = self._pipeline
        if self._least and self._least < self.generated_tokens:
            shown = self._take_beyond_least(step)
        elif self.parsed is None:  # written out: it is done for every step
            shown = pipeline.feed(step.text) if step.text else ""
        else:
            shown = self._feed(step.text, len(tokens))
        if pipeline.matched is not None:
            self.finish_reason = "stop_sequence"
        elif step.finish is not None:
            self.finish_reason = step.finish
        elif self._limit is not None and self.generated_tokens >= self._limit:
            self.finish_reason = "length"
        if shown:
            self._parts.append(shown)
        return shown

    def _feed(self, text: str | bytes, tokens: int) -> str:
        if self.parsed is None:
            return self._pipeline.feed(text) if text else ""
        self.parsed.feed(text, tokens)
        return ""

    def _take_beyond_least(self, step: TokenStep) -> str:
        """The text of a step behind which, or within which, stop sequences are looked for."""
        count = len(step.token_ids)
        early = self._least - (self.generated_tokens - count)  # of its tokens
        self._least = 0
        end = step.text_ends[early - 1] if 0 < early <= len(step.text_ends) else 0
        shown = self._feed(step.text[:end], early) if end else ""
        self._pipeline.look_for_stops()
        return shown + self._feed(step.text[end:], count - early if end else count)

    def finish(self) -> str:
        """End the text; return what was still held back."""
        self.ended = True
        if self.parsed is None:
            rest = self._pipeline.finish()
        else:
            rest = ""
            self.parsed.finish(limited=self.finish_reason == "length")
        if self._pipeline.matched is not None:
            self.finish_reason = "stop_sequence"
        elif self.finish_reason is None:
            self.finish_reason = "eos_token"
        if self.finish_reason == "eos_token" and self.parsed is not None and self.parsed.calls:
            self.finish_reason = "tool_calls"
        if rest:
            self._parts.append(rest)
        return rest

    def _unknown_tools(self, calls: Iterable[ToolCall] | None) -> Iterator[str]:
        offered = set(tool_names(self.request.tools or ()))
        names = dict.fromkeys(call.name for call in calls or () if call.name not in offered)
        for name in islice(names, _MOST_UNKNOWN):
            yield f"the model calls {name[:64]!r}, a tool that was not offered"
        if len(names) > _MOST_UNKNOWN:
            yield f"the model calls {len(names) - _MOST_UNKNOWN} more tools that were not offered"

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._parts)

    def response(self) -> InferenceResponse:
        """The response as far as it has come.

        :raises InferenceError: a step had a value that no response may have.
        """
        now = time.perf_counter()
        first = self._first_at
        calls = None if self.parsed is None else self.parsed.calls
        try:
            response = InferenceResponse(
                request_id=self.request.request_id,
                model_id=self.request.model_id,
                generated_text=self.text,
                reasoning=None if self.parsed is None else self.parsed.reasoning,
                tool_calls=calls,
                cut_call=self.parsed is not None and self.parsed.cut_call,
                warnings=[*self.warnings, *self._unknown_tools(calls)],
                finish_reason=self.finish_reason,
                stop_sequence=self._pipeline.matched,
                prompt_tokens=self.prompt_tokens,
                generated_tokens=self.generated_tokens,
                reasoning_tokens=None if self.parsed is None else self.parsed.reasoning_tokens,
                cached_prompt_tokens=self.cached_prompt_tokens,
                inference_time_ms=(now - self._started) * 1000,
                time_to_first_token_ms=None if first is None else (first - self._started) * 1000,
                logprobs=self.logprobs,
                prompt_logprobs=self.prompt_logprobs,
                handler=self.handler,
            )
        except ValidationError as error:
            # Without the values, which are text of the model's.
            wrong = error.errors(include_url=False, include_context=False, include_input=False)
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in wrong[:3])
            raise InferenceError(
                f"handler {self.handler!r} yielded steps that make no response: {problems}; "
                "mend the plugin"
            ) from None
        if self.parsed is not None:
            response.place_calls(self.parsed.begun, self.parsed.entries_before)
        return response

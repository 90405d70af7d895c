"""Ollama's answers, whole and as lines of JSON."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from msgspec import UNSET, UnsetType

from engineroom.generation.deltas import ReasoningDelta, StreamDelta, ToolCallDelta
from engineroom.schemas import InferenceResponse, PromptLogprob, TokenLogprob
from engineroom.server.apis.ollama_common import NDJSON, OllamaError, nanoseconds, rfc3339
from engineroom.server.apis.openai_logprobs import ENTRIES, bytes_of, listed
from engineroom.server.apis.tool_fields import as_object, is_object
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError
from engineroom.server.http.exchange import Writer
from engineroom.server.http.frames import Answer, Framer, dumps, line, taken

__all__ = ["ChatLines", "GenerateLines", "OllamaChat", "OllamaGenerated", "OllamaWriter"]


class OllamaTopLogprob(Answer, kw_only=True, gc=False):
    """A token that was likely.

    :param bytes: absent where a runtime tells only texts, and the token is no whole character.
    """

    token: str
    logprob: float
    bytes: Sequence[int] | UnsetType = UNSET


class OllamaLogprob(OllamaTopLogprob, kw_only=True, gc=False):
    """A token of the answer.

    :param top_logprobs: absent where none were asked for.
    """

    top_logprobs: list[OllamaTopLogprob] | UnsetType = UNSET


class OllamaFunction(Answer, kw_only=True):
    """What is called, and with which arguments.

    :param index: which of the answer's calls it is.
    """

    index: int
    name: str
    arguments: dict[str, Any]


class OllamaCall(Answer, kw_only=True):
    """A call of one of the tools."""

    id: str
    function: OllamaFunction


class OllamaMessage(Answer, kw_only=True):
    """The answer, or what a line adds to it.

    :param thinking: what the model thought before; absent where it did not.
    :param tool_calls: absent where there are none.
    """

    role: Literal["assistant"] = "assistant"
    content: str
    thinking: str | UnsetType = UNSET
    tool_calls: list[OllamaCall] | UnsetType = UNSET


class OllamaAnswer(Answer, kw_only=True):
    """What both answers have. Durations are in nanoseconds, and measured.

    :param load_duration: until the model was asked: what it let the request wait, loads included.
    :param prompt_eval_duration: from then to the first token; absent where that is not known.
    :param eval_duration: from there to the end.
    """

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load", "unload"] | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    logprobs: list[OllamaLogprob] | UnsetType = UNSET


class OllamaChat(OllamaAnswer, kw_only=True):
    """An answered conversation."""

    message: OllamaMessage


class OllamaGenerated(OllamaAnswer, kw_only=True):
    """An answered prompt.

    :param thinking: what the model thought before; absent where it did not.
    """

    response: str
    thinking: str | UnsetType = UNSET


def _entries(logprobs: Iterable[TokenLogprob]) -> list[OllamaLogprob]:
    return [
        OllamaLogprob(
            token=entry.token,
            logprob=entry.logprob,
            bytes=_bytes(entry.token, entry.bytes),
            top_logprobs=[
                OllamaTopLogprob(
                    token=token,
                    logprob=logprob,
                    bytes=_bytes(token, entry.top_bytes[place] if entry.top_bytes else None),
                )
                for place, (_, token, logprob) in enumerate(entry.top)
            ]
            or UNSET,
        )
        for entry in logprobs
    ]


def _bytes(token: str, known: Sequence[int] | None) -> Sequence[int] | UnsetType:
    return bytes_of(token, known) or UNSET


class OllamaWriter(Writer):
    """An answer, or its lines: text as it comes, each call when it is whole, the counts last.

    :param model: what the client calls it.
    :param logprobs: whether there are log probabilities.
    """

    HEADERS = (
        (b"content-type", NDJSON.encode()),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # proxies would hold lines back
    )

    def __init__(self, call: Call, model: str, logprobs: bool) -> None:
        self.wants_logprobs = logprobs
        self._rounds = call.context.rounds
        self._started = time.perf_counter()
        self._head: dict[str, Any] = {"model": model, "created_at": rfc3339()}
        self.ping = line(self._line(""))
        """Comments are none in such a stream: every line is an object that adds to the answer."""
        self._entries: list[bytes] = []
        self._pending: tuple[str, str, list[str]] | None = None
        self._told: set[str] = set()

    @abstractmethod
    def said(
        self, text: str, thinking: str = "", calls: Sequence[OllamaCall] = ()
    ) -> dict[str, Any]:
        """The fields of an answer that have what it says."""

    @abstractmethod
    def answer(self, said: dict[str, Any], **fields: Any) -> OllamaAnswer:
        """A whole answer, or the last line."""

    async def prepare(
        self,
        index: int,
        logprobs: list[TokenLogprob] | None,
        prompt_logprobs: list[PromptLogprob] | None,
    ) -> None:
        """Encode the log probabilities of a whole answer."""
        self._entries = []
        for some in taken(logprobs, ENTRIES) if self.wants_logprobs and logprobs else ():
            await self._rounds.next()
            self._entries += map(dumps, _entries(some))

    def whole(self, responses: Sequence[InferenceResponse]) -> bytes:
        (response,) = responses
        calls = [
            _call(place, made.id, made.name, made.arguments)
            for place, made in enumerate(response.tool_calls or ())
        ]
        said = self.said(response.generated_text or "", response.reasoning or "", calls)
        logprobs = listed(self._entries) if self.wants_logprobs else UNSET
        return dumps(self._last(response, said, logprobs))

    def framer(self, index: int) -> Callable[[str], bytes]:
        of_text = Framer(self._line, encode=line)
        if self.plain:
            return of_text

        def frame(chunk: str) -> bytes:
            if not isinstance(chunk, StreamDelta):
                return self._ended_call() + (of_text(chunk) if chunk else b"")
            return b"".join(map(line, self._lines(chunk)))

        return frame

    def text_with_logprobs(self, index: int, chunk: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """The entries are on the last line that the chunk makes, or on one of their own."""
        lines = [*self._lines(chunk)]
        if logprobs:
            last = lines.pop() if lines else self._line("")
            lines.append({**last, "logprobs": _entries(logprobs)})
        return b"".join(map(line, lines))

    def finish(self, index: int, response: InferenceResponse) -> bytes:
        """The calls that were not told yet, then why the answer ended, and the counts."""
        calls = b""
        for made in response.tool_calls or ():
            if made.id not in self._told:
                calls += line(self._line_of_call(made.id, made.name, made.arguments))
        return calls + line(self._last(response, self.said("")))

    def fail(self, error: ApiError, responses: Sequence[InferenceResponse]) -> bytes:
        """A last line that says so."""
        return line(OllamaError.of(error))

    def _line(self, text: str, **said: Any) -> dict[str, Any]:
        return {**self._head, **self.said(text, **said), "done": False}

    def _lines(self, chunk: str) -> Iterable[dict[str, Any]]:
        """What a chunk adds, which for a piece of a call is nothing yet."""
        if isinstance(chunk, ToolCallDelta) and chunk.id is None:
            if self._pending is not None:
                self._pending[2].append(chunk.arguments)
            return
        yield from self._whole_call()
        if isinstance(chunk, ToolCallDelta):
            self._pending = (chunk.id or "", chunk.name or "", [chunk.arguments])
        elif isinstance(chunk, ReasoningDelta):
            if chunk.text:
                yield self._line("", thinking=chunk.text)
        elif chunk:
            yield self._line(chunk)

    def _whole_call(self) -> Iterable[dict[str, Any]]:
        """The call that was being written; the end tells those that are last."""
        pending, self._pending = self._pending, None
        if pending is not None and is_object(arguments := "".join(pending[2])):
            yield self._line_of_call(pending[0], pending[1], arguments)

    def _ended_call(self) -> bytes:
        return b"" if self._pending is None else b"".join(map(line, self._whole_call()))

    def _line_of_call(self, call_id: str, name: str, arguments: str) -> dict[str, Any]:
        call = _call(len(self._told), call_id, name, arguments)
        self._told.add(call_id)
        return self._line("", calls=[call])

    def _last(
        self, response: InferenceResponse, said: dict[str, Any], logprobs: Any = UNSET
    ) -> OllamaAnswer:
        first, queued = response.time_to_first_token_ms, response.queue_time_ms
        whole = response.inference_time_ms
        return self.answer(
            said,
            done=True,
            done_reason="length" if response.finish_reason == "length" else "stop",
            total_duration=nanoseconds(time.perf_counter() - self._started),
            load_duration=UNSET if queued is None else nanoseconds(queued / 1000),
            prompt_eval_count=_known(response.prompt_tokens),
            prompt_eval_duration=_between(queued, first),
            eval_count=_known(response.generated_tokens),
            eval_duration=_between(first, whole),
            logprobs=logprobs,
        )


class ChatLines(OllamaWriter):
    """Of ``/api/chat``."""

    def said(
        self, text: str, thinking: str = "", calls: Sequence[OllamaCall] = ()
    ) -> dict[str, Any]:
        message = OllamaMessage(
            content=text, thinking=thinking or UNSET, tool_calls=[*calls] or UNSET
        )
        return {"message": message}

    def answer(self, said: dict[str, Any], **fields: Any) -> OllamaAnswer:
        created = self._head | {"created_at": rfc3339()}
        return OllamaChat(**created, **said, **fields)


class GenerateLines(OllamaWriter):
    """Of ``/api/generate``, where no tools are."""

    def said(
        self, text: str, thinking: str = "", calls: Sequence[OllamaCall] = ()
    ) -> dict[str, Any]:
        return {"response": text, **({"thinking": thinking} if thinking else {})}

    def answer(self, said: dict[str, Any], **fields: Any) -> OllamaAnswer:
        created = self._head | {"created_at": rfc3339()}
        return OllamaGenerated(**created, **said, **fields)


def _call(place: int, call_id: str, name: str, arguments: str) -> OllamaCall:
    function = OllamaFunction(index=place, name=name, arguments=as_object(arguments))
    return OllamaCall(id=call_id, function=function)


def _known(count: int | None) -> int | UnsetType:
    return UNSET if count is None else count


def _between(begin_ms: float | None, end_ms: float | None) -> int | UnsetType:
    if begin_ms is None or end_ms is None:
        return UNSET
    return nanoseconds((end_ms - begin_ms) / 1000)

"""What OpenAI's APIs share: fields of requests, usage, and the chunks of streams."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

from msgspec import UNSET, UnsetType
from pydantic import Field, Tag

from engineroom.field_types import either
from engineroom.generation.deltas import StreamDelta
from engineroom.schemas import InferenceRequest, InferenceResponse, PromptLogprob, TokenLogprob
from engineroom.server.apis.openai_logprobs import ENTRIES
from engineroom.server.apis.request_fields import (
    Number,
    StopList,
    StreamOptions,
    build,
    params_of,
    request_id,
)
from engineroom.server.apis.structured_fields import (
    ResponseFormat,
    StructuredSampling,
    structured_output,
)
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, OpenAIError
from engineroom.server.http.exchange import Writer
from engineroom.server.http.frames import DONE, Answer, Framer, Pieces, dumps, event, taken

__all__ = [
    "OF_ANTHROPIC",
    "SERVICE_TIER",
    "STORE",
    "VERBOSITY",
    "Chunk",
    "Completed",
    "FinishReason",
    "OpenAIRequest",
    "OpenAISampling",
    "OpenAIWriter",
    "Usage",
    "check_choices",
    "requests_for",
]

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls"]
OF_ANTHROPIC: Final[Mapping[str, Collection[Any]]] = {
    "output_config": ({},),
    "output_format": (),
    "stop_sequences": ([],),
}
"""Fields of Anthropic's API that ask for what OpenAI's call otherwise, for ``REFUSED``."""
Ignored: TypeAlias = tuple[Collection[Any], str]
STORE: Final[Ignored] = ((False,), "no answer is kept here")
SERVICE_TIER: Final[Ignored] = (
    ("auto", "default"),
    "there is one tier; priority says who is first",
)
VERBOSITY: Final[Ignored] = (("medium",), "say in the messages how long the answer is to be")
"""Fields that OpenAI's APIs share, for ``IGNORED``."""
_SEED_STEP: Final = 0x9E3779B97F4A7C15
"""Between the seeds of several answers; the first has the one that was asked for."""


class OpenAISampling(StructuredSampling):
    """What all of OpenAI's APIs have."""

    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    """0 is greedy; 1 unless said."""
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    user: str | None = None


class OpenAIRequest(OpenAISampling):
    """What both of OpenAI's older APIs have."""

    response_format: ResponseFormat | None = None
    stop: (
        Annotated[
            Annotated[str, Tag("(text)")] | Annotated[StopList, Tag("(texts)")],
            either("a text or a list of texts", {str: "(text)", list: "(texts)"}),
        ]
        | None
    ) = None
    n: Annotated[int, Field(ge=1)] | None = None
    """How many answers. With ``seed`` each has its own, made from it."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "model_id": "model",
        "stop_sequences": "stop",
        "max_new_tokens": "max_tokens",
        "template_args": "chat_template_kwargs",
    }


class CachedTokens(Answer, kw_only=True):
    """What of the prompt's work was not done again."""

    cached_tokens: int


class CompletionDetails(Answer, kw_only=True):
    """What of the answers was reasoning."""

    reasoning_tokens: int


class Usage(Answer, kw_only=True):
    """Tokens read and written.

    :param prompt_tokens_details: absent where the runtime does not say what it found again.
    :param completion_tokens_details: absent where the model does not reason.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | UnsetType = UNSET
    completion_tokens_details: CompletionDetails | UnsetType = UNSET


class Completed(Answer, kw_only=True):
    """What whole answers have."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage


class Chunk(Answer, kw_only=True):
    """A chunk of a stream.

    :param usage: absent unless the client asked for it; ``None`` in all chunks but the last one.
    """

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | UnsetType | None = UNSET


def check_choices(call: Call, count: int) -> None:
    """Refuse more answers than the server gives to one request. :raises ApiError: 400."""
    limit = call.context.settings.max_choices
    if count > limit:
        raise ApiError(400, f"{count} answers are more than {limit}", "too_many_choices", "n")


def requests_for(
    call: Call,
    request: OpenAIRequest,
    params: Mapping[str, Any],
    max_tokens: int | None,
    inputs: Sequence[Mapping[str, Any]],
) -> list[InferenceRequest]:
    """A request for each input and each of its ``n`` answers, which share all that is large.

    :param params: as :func:`params_of` takes them.
    :param max_tokens: how many there are where the client does not say.
    :raises ApiError: 400.
    """
    if params.get("max_new_tokens") == -1:  # until the context is full
        params, max_tokens = {**params, "max_new_tokens": None}, None
    n = request.n or 1
    check_choices(call, n * len(inputs))
    seed, stop = request.seed, request.stop or None
    form = request.response_format
    asked = {"response_format": form.asked("response_format") if form else {}}
    schema_in = form.schema_in if form else None
    output = structured_output(call, asked | request.extensions(), schema_in)
    params = {**params, "structured_output": output}
    first = params_of(call, request, params, {"temperature": None, "max_new_tokens": max_tokens})
    choices = [first]
    for choice in range(1, n):
        own = None if seed is None else (seed + choice * _SEED_STEP) % (1 << 63)
        choices.append(first.model_copy(update={"seed": own}))
    requests: list[InferenceRequest] = []
    for number, prompt in enumerate(inputs):
        request_of = build(
            call,
            request,
            first,
            number * n,
            stop_sequences=[stop] if isinstance(stop, str) else stop,
            **prompt,
        )
        requests += [
            request_of.model_copy(
                update={"request_id": request_id(call, number * n + choice), "params": own_params}
            )
            for choice, own_params in enumerate(choices)
        ]
    return requests


class OpenAIWriter(Writer):
    """Answers of the older APIs: choices, then the usage, then ``[DONE]`` where it is a stream.

    :param logprobs: whether there are log probabilities.
    :param prompts: how many prompts the answers have, each as many answers.
    """

    PREFIX: ClassVar[str]
    """Of the ids."""
    COMPLETED: ClassVar[type[Completed]]
    CHUNK: ClassVar[str]
    """What chunks call themselves."""

    def __init__(
        self, call: Call, request: OpenAIRequest, logprobs: bool, prompts: int = 1
    ) -> None:
        self.wants_logprobs = logprobs
        self.prompts = prompts
        self._rounds = call.context.rounds
        self._streams = bool(request.stream)
        self._prepared: dict[int, Answer] = {}
        options = request.stream_options
        self._includes_usage = bool(options and options.include_usage)
        self._head: dict[str, Any] = {
            "id": f"{self.PREFIX}-{call.id}", "created": int(time.time()), "model": request.model,
        }  # fmt: skip

    async def prepare(
        self,
        index: int,
        logprobs: list[TokenLogprob] | None,
        prompt_logprobs: list[PromptLogprob] | None,
    ) -> None:
        """Encode the log probabilities of a whole answer."""
        if self.wants_logprobs and not self._streams:
            await self.encode(index, [logprobs or []])

    async def encode(self, index: int, lists: Sequence[list[Any]]) -> None:
        """Encode lists of log probabilities, one behind the other, as those of an answer."""
        pieces = Pieces[Answer]()
        for entries in lists:
            for some in taken(entries, ENTRIES):
                await self._rounds.next()
                pieces.add(self.entries(index, some))
        self._prepared[index] = pieces.whole()

    @abstractmethod
    def choice(self, response: InferenceResponse, **fields: Any) -> Answer:
        """A whole answer; ``fields`` are those that both APIs have."""

    @abstractmethod
    def addition(self, chunk: str | None) -> dict[str, Any]:
        """What a chunk of the stream adds; ``None``: nothing."""

    @abstractmethod
    def entries(self, index: int, logprobs: Sequence[TokenLogprob]) -> Answer:
        """Log probabilities of an answer's next tokens."""

    def whole(self, responses: Sequence[InferenceResponse]) -> bytes:
        """Every answer, and the usage of all."""
        choices = [
            self.choice(
                r,
                index=index,
                logprobs=self._prepared.get(index),
                finish_reason=_finish_of(r),
            )
            for index, r in enumerate(responses)
        ]
        usage = self._usage(responses)
        return dumps(self.COMPLETED(**self._head, choices=choices, usage=usage))

    def framer(self, index: int) -> Callable[[str], bytes]:
        of_text = Framer(lambda text: self.chunk(index, self.addition(text)))
        if self.plain:
            return of_text

        def frame(chunk: str) -> bytes:
            if isinstance(chunk, StreamDelta):
                return event(self.chunk(index, self.addition(chunk)))
            return of_text(chunk)

        return frame

    def text_with_logprobs(self, index: int, chunk: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        entries = self.entries(index, logprobs)
        return event(self.chunk(index, self.addition(chunk), logprobs=entries))

    def finish(self, index: int, response: InferenceResponse) -> bytes:
        """The chunk that says why the answer ended."""
        return event(self.chunk(index, self.addition(None), finish_reason=_finish_of(response)))

    def end(self, responses: Sequence[InferenceResponse]) -> bytes:
        if not self._includes_usage:
            return DONE
        return event(self._chunk([], self._usage(responses))) + DONE

    def fail(self, error: ApiError, responses: Sequence[InferenceResponse]) -> bytes:
        """Usage first: clients stop reading at an error."""
        end = self.end(responses)
        return end.removesuffix(DONE) + event(OpenAIError.of(error)) + DONE

    def chunk(self, index: int, addition: Mapping[str, Any], **fields: Any) -> Chunk:
        """A chunk of one answer."""
        choice = {"index": index, **addition, "logprobs": None, "finish_reason": None, **fields}
        return self._chunk([choice], None if self._includes_usage else UNSET)

    def _chunk(self, choices: list[Any], usage: Usage | UnsetType | None) -> Chunk:
        return Chunk(**self._head, object=self.CHUNK, choices=choices, usage=usage)

    def _usage(self, responses: Sequence[InferenceResponse]) -> Usage:
        """The prompt of several answers counts once."""
        firsts = responses[:: max(1, len(responses) // self.prompts)]
        read = sum(r.prompt_tokens or 0 for r in firsts)
        written = sum(r.generated_tokens or 0 for r in responses)
        cached = [r.cached_prompt_tokens for r in firsts if r.cached_prompt_tokens is not None]
        reasoned = [r.reasoning_tokens for r in responses if r.reasoning_tokens is not None]
        details = CompletionDetails(reasoning_tokens=sum(reasoned)) if reasoned else UNSET
        found = CachedTokens(cached_tokens=sum(cached)) if cached else UNSET
        return Usage(
            prompt_tokens=read,
            completion_tokens=written,
            total_tokens=read + written,
            prompt_tokens_details=found,
            completion_tokens_details=details,
        )


def _finish_of(response: InferenceResponse) -> FinishReason:
    reason = response.finish_reason
    return reason if reason in ("length", "tool_calls") else "stop"

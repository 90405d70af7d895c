"""What OpenAI's APIs share: fields of requests, usage, and the chunks of streams."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

from msgspec import UNSET, UnsetType
from pydantic import Field

from engineroom.inference.streams import InferenceStream
from engineroom.schemas import InferenceRequest, InferenceResponse
from engineroom.server.apis.request_fields import (
    ModelName,
    Number,
    Sampling,
    Stop,
    StreamOptions,
    build,
    common_fields,
    params_of,
    stops,
)
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, OpenAIError
from engineroom.server.http.exchange import Writer, derived_seed
from engineroom.server.http.frames import DONE, Answer, event

__all__ = [
    "Chunk",
    "FinishReason",
    "OpenAIRequest",
    "OpenAIWriter",
    "Seed",
    "Usage",
    "finish_of",
    "head_of",
    "includes_usage",
    "requests_for",
    "sampling_of",
    "usage_of",
]

Seed: TypeAlias = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
FinishReason: TypeAlias = Literal["stop", "length"]
_FINISH: Final[Mapping[str, FinishReason]] = {
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
}


class OpenAIRequest(Sampling):
    """What both of OpenAI's older APIs have."""

    model: ModelName
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    """0 is greedy; 1 unless said."""
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    """Token id → bias."""
    n: Annotated[int, Field(ge=1)] | None = None
    """How many answers. With ``seed`` each has its own, made from it."""
    user: str | None = None

    RENAMED: ClassVar[Mapping[str, str]] = {
        "model_id": "model",
        "stop_sequences": "stop",
        "max_new_tokens": "max_tokens",
    }


class CachedTokens(Answer, kw_only=True):
    """What of the prompt's work was not done again."""

    cached_tokens: int


class Usage(Answer, kw_only=True):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Chunk(Answer, kw_only=True):
    """A chunk of a stream.

    :param usage: absent unless the client asked for it; ``None`` in all chunks but the last one.
    """

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: None = None
    choices: list[Any]
    usage: Usage | UnsetType | None = UNSET


def head_of(call: Call, request: OpenAIRequest, prefix: str) -> dict[str, Any]:
    """What an answer, and each chunk of it, begins with."""
    return {"id": f"{prefix}-{call.id}", "created": int(time.time()), "model": request.model}


def includes_usage(request: OpenAIRequest) -> bool:
    """Whether a stream ends with a chunk that has the usage."""
    return bool(request.stream_options and request.stream_options.include_usage)


def sampling_of(request: OpenAIRequest) -> dict[str, Any]:
    """The parameters that the client gave, under the service's names.

    :raises ApiError: 400.
    """
    params = params_of(request, "temperature", "top_p", "presence_penalty", "frequency_penalty")
    if request.logit_bias:
        try:
            params["logit_bias"] = {int(k): v for k, v in request.logit_bias.items()}
        except ValueError as error:
            raise ApiError(
                400, "logit_bias: its keys must be token ids", "invalid_value", "logit_bias"
            ) from error
    return params


def requests_for(
    call: Call,
    request: OpenAIRequest,
    params: Mapping[str, Any],
    absent: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Any]],
) -> list[InferenceRequest]:
    """A request for each input and each of its ``n`` answers. :raises ApiError: 400."""
    n = request.n or 1
    limit = call.context.settings.max_choices
    if n * len(inputs) > limit:
        raise ApiError(
            400, f"{n * len(inputs)} answers are more than {limit}", "too_many_choices", "n"
        )
    fields = {
        **common_fields(call, request),
        "stop_sequences": stops(request.stop),
        "stream": bool(request.stream),
    }
    seed = params.get("seed")
    return [
        build(
            call,
            request,
            params={**params, "seed": derived_seed(seed, choice)},
            absent=absent,
            model=request.model,
            index=number * n + choice,
            **prompt,
            **fields,
        )
        for number, prompt in enumerate(inputs)
        for choice in range(n)
    ]


def finish_of(response: InferenceResponse) -> FinishReason:
    """OpenAI's word for why an answer ended."""
    return _FINISH.get(response.finish_reason or "", "stop")


def usage_of(responses: Sequence[InferenceResponse], prompts: int = 1) -> Usage:
    """OpenAI's usage. The prompt of several answers counts once.

    :param prompts: how many prompts the answers have, each as many answers.
    """
    step = max(1, len(responses) // prompts)
    read = sum(r.prompt_tokens or 0 for r in responses[::step])
    cached = sum(r.cached_prompt_tokens or 0 for r in responses[::step])
    written = sum(r.generated_tokens or 0 for r in responses)
    return Usage(
        prompt_tokens=read,
        completion_tokens=written,
        total_tokens=read + written,
        prompt_tokens_details=CachedTokens(cached_tokens=cached),
    )


class OpenAIWriter(Writer):
    """Chunks of the older APIs: choices, then the usage if it was asked for, then ``[DONE]``.

    :param head: what all chunks begin with.
    :param usage: whether the last chunk has the usage.
    :param logprobs: whether chunks have log probabilities.
    :param prompts: how many prompts the answers have, each as many answers.
    """

    def __init__(
        self, head: Mapping[str, Any], usage: bool, logprobs: bool, prompts: int = 1
    ) -> None:
        self.wants_logprobs = logprobs
        self._head = head
        self._usage = usage
        self._prompts = prompts

    def _chunk(self, choice: Answer) -> Chunk:
        return Chunk(**self._head, choices=[choice], usage=None if self._usage else UNSET)

    def begin(self, streams: Sequence[InferenceStream]) -> bytes:
        return b""

    def end(self, responses: Sequence[InferenceResponse]) -> bytes:
        return self._last(responses) + DONE

    def fail(self, error: ApiError, responses: Sequence[InferenceResponse]) -> bytes:
        """Usage first: clients stop reading at an error."""
        return self._last(responses) + event(OpenAIError.of(error)) + DONE

    def _last(self, responses: Sequence[InferenceResponse]) -> bytes:
        if not self._usage:
            return b""
        return event(Chunk(**self._head, choices=[], usage=usage_of(responses, self._prompts)))

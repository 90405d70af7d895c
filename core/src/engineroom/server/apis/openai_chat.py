"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

from pydantic import Field

from engineroom.inference.streams import InferenceStream
from engineroom.schemas import ChatMessage, InferenceRequest, InferenceResponse, TokenLogprob
from engineroom.server.apis.request_fields import (
    EXTENSIONS,
    ModelName,
    Number,
    Sampling,
    Stop,
    StreamOptions,
    SubSchema,
    TextPart,
    build,
    chat_message,
    check_count,
    common_fields,
    parse,
    stops,
    text_of,
)
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError
from engineroom.server.http.exchange import answer_all, derived_seed, stream_all
from engineroom.server.http.frames import DONE, Framer, dumps, event

__all__ = ["ChatRequest", "chat_completions", "finish_of", "usage_of"]

FINISH: Final[Mapping[str, str]] = {
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
}
Seed: TypeAlias = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class ChatInput(SubSchema):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    """Only none: what a model had called, no runtime here is told."""
    function_call: Any = None
    audio: Any = None


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


class ChatRequest(OpenAIRequest):
    """A conversation to be continued."""

    messages: Annotated[list[ChatInput], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name; without either, until the context is full."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None

    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "store": (False,),
        "service_tier": ("auto", "default"),
        "moderation": (),
    }
    WITHOUT_EFFECT: ClassVar[Collection[str]] = (
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    )


async def chat_completions(call: Call) -> None:
    """Continue a conversation."""
    request = parse(call, ChatRequest, await call.json())
    requests = _requests(call, request)
    created, completion_id = int(time.time()), f"chatcmpl-{call.id}"
    for each in requests[:1]:
        call.context.log_prompt(each)
    if request.stream:
        usage = bool(request.stream_options and request.stream_options.include_usage)
        writer = ChatWriter(
            completion_id, created, request.model, len(requests), usage, bool(request.logprobs)
        )
        await stream_all(call, requests, writer)
        return
    responses = await answer_all(call, requests)
    await call.answer_json(
        {
            "id": completion_id,
            "object": "chat.completion",
            "created": created,
            "model": request.model,
            "choices": [
                {
                    "index": index,
                    "message": {
                        "role": "assistant",
                        "content": response.generated_text or "",
                        "refusal": None,
                    },
                    "logprobs": (
                        {"content": _entries(response.logprobs or ()), "refusal": None}
                        if request.logprobs
                        else None
                    ),
                    "finish_reason": finish_of(response),
                }
                for index, response in enumerate(responses)
            ],
            "usage": usage_of(responses),
            "system_fingerprint": None,
        }
    )


def _requests(call: Call, request: ChatRequest) -> list[InferenceRequest]:
    check_count(call, request.messages)
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "invalid_value", "top_logprobs")
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise ApiError(
            400,
            f"max_tokens is {old} and max_completion_tokens {new}; give one of them",
            "invalid_value",
            "max_tokens",
        )
    messages = [_message(each, f"messages.{i}") for i, each in enumerate(request.messages)]
    params = sampling_of(request)
    params["max_new_tokens"] = new if new is not None else old
    if request.logprobs:
        params["logprobs"] = request.top_logprobs or 0
    return several(
        call,
        request,
        params,
        absent={"temperature": None, "max_new_tokens": None},
        inputs=[{"messages": messages}],
    )


def _message(message: ChatInput, where: str) -> ChatMessage:
    for name in ("tool_calls", "function_call", "audio"):
        if getattr(message, name):
            raise ApiError(
                400,
                f"{where}.{name} is not supported by this server; leave it out",
                "unsupported_parameter",
                "messages",
            )
    text = text_of(message.content, where)
    if text is None:
        raise ApiError(400, f"{where}: the message has no content", "invalid_value", "messages")
    return chat_message(message.role, text, where, message.name)


def sampling_of(request: OpenAIRequest) -> dict[str, Any]:
    """The parameters that the client gave, under the service's names.

    :raises ApiError: 400.
    """
    params: dict[str, Any] = {
        name: getattr(request, name)
        for name in (
            "temperature",
            "top_p",
            "presence_penalty",
            "frequency_penalty",
            *EXTENSIONS,
        )
    }
    if request.seed is not None:
        params["seed"] = request.seed % (1 << 63)
    if request.logit_bias:
        try:
            params["logit_bias"] = {int(k): v for k, v in request.logit_bias.items()}
        except ValueError as error:
            raise ApiError(
                400, "logit_bias: its keys must be token ids", "invalid_value", "logit_bias"
            ) from error
    return params


def several(
    call: Call,
    request: OpenAIRequest,
    params: dict[str, Any],
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
            index=place * n + choice,
            **given,
            **fields,
        )
        for place, given in enumerate(inputs)
        for choice in range(n)
    ]


def finish_of(response: InferenceResponse) -> str:
    """OpenAI's word for why an answer ended."""
    return FINISH.get(response.finish_reason or "", "stop")


def usage_of(responses: Sequence[InferenceResponse], prompts: int = 1) -> dict[str, Any]:
    """OpenAI's usage. The prompt of several answers counts once.

    :param prompts: how many prompts the answers have, each as many answers.
    """
    each = max(1, len(responses) // prompts)
    prompt = sum(r.prompt_tokens or 0 for r in responses[::each])
    cached = sum(r.cached_prompt_tokens or 0 for r in responses[::each])
    written = sum(r.generated_tokens or 0 for r in responses)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _entries(logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {
            "token": entry.token,
            "logprob": entry.logprob,
            "bytes": list(entry.token.encode()),
            "top_logprobs": [
                {"token": token, "logprob": logprob, "bytes": list(token.encode())}
                for _, token, logprob in entry.top
            ],
        }
        for entry in logprobs
    ]


class ChatWriter:
    """Chunks of a chat completion."""

    def __init__(
        self, completion_id: str, created: int, model: str, count: int, usage: bool, logprobs: bool
    ) -> None:
        self.wants_logprobs = logprobs
        self._usage = usage
        self._base: dict[str, Any] = {
            "id": completion_id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "system_fingerprint": None,
        }
        self._count = count

    def _chunk(self, index: int, delta: Any, **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        value = {**self._base, "choices": [choice]}
        if self._usage:
            value["usage"] = None
        return value

    def begin(self, streams: Sequence[InferenceStream]) -> bytes:
        """The role, for each answer."""
        return b"".join(
            event(self._chunk(i, {"role": "assistant", "content": "", "refusal": None}))
            for i in range(self._count)
        )

    def framer(self, index: int) -> Callable[[str], bytes]:
        """Makes chunks."""
        return Framer(lambda text: self._chunk(index, {"content": text}))

    def text_with_logprobs(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """A chunk with its tokens' log probabilities."""
        entries = {"content": _entries(logprobs), "refusal": None}
        return event(self._chunk(index, {"content": text}, logprobs=entries))

    def finish(self, index: int, response: InferenceResponse) -> bytes:
        """The chunk that says why the answer ended."""
        return event(self._chunk(index, {}, finish_reason=finish_of(response)))

    def _usage_chunk(self, responses: Sequence[InferenceResponse]) -> bytes:
        if not self._usage:
            return b""
        return event({**self._base, "choices": [], "usage": usage_of(responses)})

    def end(self, responses: Sequence[InferenceResponse]) -> bytes:
        """Usage, if it was asked for, and the end."""
        return self._usage_chunk(responses) + DONE

    def fail(self, refused: ApiError, responses: Sequence[InferenceResponse]) -> bytes:
        """Usage first: clients stop reading at an error."""
        return self._usage_chunk(responses) + b"data: " + dumps(refused.openai()) + b"\n\n" + DONE

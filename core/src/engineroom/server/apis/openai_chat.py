"""``POST /v1/chat/completions``: OpenAI's chat."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, UnsetType
from pydantic import Field

from engineroom.inference.streams import InferenceStream
from engineroom.schemas import ChatMessage, InferenceRequest, InferenceResponse, TokenLogprob
from engineroom.server.apis.openai_common import (
    FinishReason,
    OpenAIRequest,
    OpenAIWriter,
    Usage,
    finish_of,
    head_of,
    includes_usage,
    requests_for,
    sampling_of,
    usage_of,
)
from engineroom.server.apis.request_fields import (
    SubSchema,
    TextPart,
    chat_message,
    check_count,
    parse,
    text_of,
)
from engineroom.server.apis.routing import SSE, work_route
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError
from engineroom.server.http.exchange import answer_all, stream_all
from engineroom.server.http.frames import Answer, Framer, event

__all__ = ["ROUTES", "ChatRequest"]


class ChatInput(SubSchema):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    """Only none: what a model had called, no runtime here is told."""
    function_call: Any = None
    audio: Any = None


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


# ── answers ──────────────────────────────────────────────────────────────────────────────────


class TopLogprob(Answer, kw_only=True):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]


class TokenEntry(TopLogprob, kw_only=True):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer, kw_only=True):
    """Log probabilities of the answer's tokens."""

    content: list[TokenEntry]
    refusal: None = None


class AssistantMessage(Answer, kw_only=True):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Answer, kw_only=True):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answer, kw_only=True):
    """An answered conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: None = None


class Delta(Answer, kw_only=True):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET


class ChunkChoice(Answer, kw_only=True):
    """What a chunk adds to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


# ── the work ─────────────────────────────────────────────────────────────────────────────────


async def chat_completions(call: Call) -> None:
    """Continue a conversation."""
    request = parse(call, ChatRequest, await call.json())
    requests = _requests(call, request)
    head = head_of(call, request, "chatcmpl")
    call.context.log_prompt(requests[0])
    if request.stream:
        head["object"] = "chat.completion.chunk"
        writer = ChatWriter(head, includes_usage(request), bool(request.logprobs))
        await stream_all(call, requests, writer)
        return
    responses = await answer_all(call, requests)
    choices = [
        ChatChoice(
            index=index,
            message=AssistantMessage(content=response.generated_text or ""),
            logprobs=_logprobs(response.logprobs or ()) if request.logprobs else None,
            finish_reason=finish_of(response),
        )
        for index, response in enumerate(responses)
    ]
    await call.answer_json(ChatCompletion(**head, choices=choices, usage=usage_of(responses)))


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
    messages = [
        _message(message, f"messages.{number}") for number, message in enumerate(request.messages)
    ]
    params = sampling_of(request)
    params["max_new_tokens"] = new if new is not None else old
    if request.logprobs:
        params["logprobs"] = request.top_logprobs or 0
    absent = {"temperature": None, "max_new_tokens": None}
    return requests_for(call, request, params, absent, [{"messages": messages}])


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


def _logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            TokenEntry(
                token=entry.token,
                logprob=entry.logprob,
                bytes=list(entry.token.encode()),
                top_logprobs=[
                    TopLogprob(token=token, logprob=logprob, bytes=list(token.encode()))
                    for _, token, logprob in entry.top
                ],
            )
            for entry in tokens
        ]
    )


class ChatWriter(OpenAIWriter):
    """Chunks of a chat completion."""

    def begin(self, streams: Sequence[InferenceStream]) -> bytes:
        """The role, for each answer."""
        role = Delta(role="assistant", content="", refusal=None)
        return b"".join(
            event(self._chunk(ChunkChoice(index=index, delta=role)))
            for index in range(len(streams))
        )

    def framer(self, index: int) -> Callable[[str], bytes]:
        return Framer(lambda text: self._chunk(ChunkChoice(index=index, delta=Delta(content=text))))

    def text_with_logprobs(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        delta = Delta(content=text)
        return event(
            self._chunk(ChunkChoice(index=index, delta=delta, logprobs=_logprobs(logprobs)))
        )

    def finish(self, index: int, response: InferenceResponse) -> bytes:
        """The chunk that says why the answer ended."""
        finish = finish_of(response)
        return event(self._chunk(ChunkChoice(index=index, delta=Delta(), finish_reason=finish)))


ROUTES = (
    work_route(
        "/v1/chat/completions",
        chat_completions,
        "Continue a conversation (OpenAI)",
        "OpenAI",
        request=ChatRequest,
        response=ChatCompletion,
        streams=SSE,
        example={
            "model": "default",
            "messages": [{"role": "user", "content": "Why is the sky blue?"}],
            "max_tokens": 20,
        },
    ),
)

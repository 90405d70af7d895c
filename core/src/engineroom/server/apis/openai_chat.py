"""``POST /v1/chat/completions``: OpenAI's chat."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from engineroom.inference.streams import InferenceStream
from engineroom.schemas import ChatMessage, InferenceRequest, TokenLogprob
from engineroom.server.apis.openai_common import (
    Completed,
    FinishReason,
    OpenAIRequest,
    OpenAIWriter,
    requests_for,
)
from engineroom.server.apis.openai_logprobs import TokenEntry, token_entries
from engineroom.server.apis.request_fields import (
    Content,
    SubSchema,
    chat_message,
    parse,
    text_of,
)
from engineroom.server.apis.routing import SSE, work_route
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, unsupported
from engineroom.server.http.exchange import respond
from engineroom.server.http.frames import Answer, event

__all__ = ["ROUTES", "ChatRequest"]


class ChatInput(SubSchema):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    """Only none: what a model had called, no runtime here is told."""
    function_call: Any = None
    audio: Any = None


class ChatRequest(OpenAIRequest):
    """A conversation to be continued."""

    messages: Annotated[list[ChatInput], Field(fail_fast=True, min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name; without either, until the context is full."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None

    COUNTED: ClassVar[Collection[str]] = ("messages",)
    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
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


class ChatCompletion(Completed, kw_only=True):
    """An answered conversation."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


# ── the work ─────────────────────────────────────────────────────────────────────────────────


async def chat_completions(call: Call) -> None:
    """Continue a conversation."""
    request = parse(call, ChatRequest, await call.json())
    writer = ChatWriter(call, request, bool(request.logprobs))
    await respond(call, _requests(call, request), writer)


def _requests(call: Call, request: ChatRequest) -> list[InferenceRequest]:
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
    params = {
        "max_new_tokens": new if new is not None else old,
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
    }
    return requests_for(call, request, params, None, [{"messages": messages}])


def _message(message: ChatInput, where: str) -> ChatMessage:
    for name in ("tool_calls", "function_call", "audio"):
        if getattr(message, name):
            raise unsupported(f"{where}.{name}", "messages")
    text = text_of(message.content, where)
    if text is None:
        raise ApiError(400, f"{where}: the message has no content", "invalid_value", "messages")
    return chat_message(message.role, text, where, message.name)


class ChatWriter(OpenAIWriter):
    """A chat completion, or its chunks."""

    PREFIX = "chatcmpl"
    COMPLETED = ChatCompletion
    CHUNK = "chat.completion.chunk"

    def choice(self, text: str, **fields: Any) -> ChatChoice:
        return ChatChoice(message=AssistantMessage(content=text), **fields)

    def addition(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def entries(self, index: int, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
        return ChatLogprobs(content=token_entries(logprobs))

    def begin(self, streams: Sequence[InferenceStream]) -> bytes:
        """The role, for each answer."""
        addition = {"delta": {"role": "assistant", "content": "", "refusal": None}}
        return b"".join(event(self.chunk(index, addition)) for index in range(len(streams)))


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

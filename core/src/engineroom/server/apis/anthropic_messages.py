"""``POST /v1/messages``: Anthropic's API, text in and text out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

import msgspec
from pydantic import Field

from engineroom.inference.streams import InferenceStream
from engineroom.schemas import ChatMessage, InferenceRequest, InferenceResponse
from engineroom.server.apis.anthropic_blocks import (
    AnthropicMessage,
    AnthropicToolChoice,
    AnthropicTools,
    BlockWriter,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
    blocks_of,
    messages_of,
)
from engineroom.server.apis.request_fields import (
    Content,
    Number,
    StopList,
    build,
    chat_message,
    params_of,
    parse,
    text_of,
)
from engineroom.server.apis.routing import SSE, work_route
from engineroom.server.apis.structured_fields import (
    AnthropicFormat,
    AnthropicOutputConfig,
    StructuredSampling,
    structured_output,
)
from engineroom.server.apis.tool_fields import (
    UNTOLD,
    TemplateFields,
    Thinking,
    ToolChoiceOf,
    chosen_tools,
    reasoning_of,
)
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, ErrorBody
from engineroom.server.http.exchange import Writer, admission, respond
from engineroom.server.http.frames import Answer, dumps, named_event
from engineroom.thinking import told_to_template

__all__ = ["ROUTES", "AnthropicError", "CountTokensRequest", "MessagesRequest"]

StopReason: TypeAlias = Literal["end_turn", "stop_sequence", "max_tokens", "tool_use"]
_STOP_REASONS: Final[Mapping[str, StopReason]] = {
    "stop_sequence": "stop_sequence",
    "length": "max_tokens",
    "tool_calls": "tool_use",
}
_NO_THREADS: Final = "thread_unsupported_request"
_ERROR_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    501: "api_error",
    503: "overloaded_error",
}


class ConversationRequest(TemplateFields, StructuredSampling):
    """A conversation."""

    messages: Annotated[list[AnthropicMessage], Field(fail_fast=True, min_length=1)]
    system: Content | None = None
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = None
    """0 is greedy; 1 unless said."""
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    stop_sequences: StopList | None = None
    metadata: dict[str, Any] | None = None
    output_config: AnthropicOutputConfig | None = None
    thread: Annotated[
        dict[str, Any] | None, Field(json_schema_extra={"anyOf": [{"type": "null"}]})
    ] = None
    """A conversation that the server keeps: there is none, and clients send it in whole then."""
    output_format: AnthropicFormat | None = None
    """What ``output_config.format`` was called before."""
    tools: AnthropicTools | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None

    RENAMED: ClassVar[Mapping[str, str]] = {
        "model_id": "model",
        "max_new_tokens": "max_tokens",
        "template_args": "chat_template_kwargs",
    }
    COUNTED: ClassVar[Collection[str]] = ("messages", "system")
    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {
        "container": (),
        "mcp_servers": ([],),
        "service_tier": ("auto", "standard_only"),
        "speed": ("standard",),
        "context_management": (),
        "diagnostics": ({},),
        "inference_geo": (),
        "user_profile_id": (),
        "workspace_id": (),
        # Of other APIs: what they ask for would not be.
        "response_format": ({"type": "text"},),
        "text": ({}, {"format": {"type": "text"}}),
        "reasoning_effort": (),
        "include_reasoning": (True,),
        "reasoning": ({},),
        "parallel_tool_calls": (True,),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "n": (1,),
        "stop": ([], ""),
    }
    INSTEAD: ClassVar[Mapping[str, str]] = {
        "response_format": "use output_config.format",
        "text": "use output_config.format",
        "reasoning_effort": "use output_config.effort",
        "reasoning": "use thinking and output_config.effort",
        "include_reasoning": "use thinking.display",
        "parallel_tool_calls": "use tool_choice.disable_parallel_tool_use",
        "functions": "use tools",
        "function_call": "use tool_choice",
        "stop": "use stop_sequences",
    }
    WITHOUT_EFFECT: ClassVar[Collection[str]] = ("cache_control",)


class MessagesRequest(ConversationRequest):
    """A conversation to be continued."""

    max_tokens: Annotated[int, Field(ge=1)]


class CountTokensRequest(ConversationRequest):
    """A conversation whose tokens are to be counted: what would be sent to be continued."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Says nothing here."""


# ── answers ──────────────────────────────────────────────────────────────────────────────────


class AnthropicErrorDetail(Answer, kw_only=True):
    """What went wrong."""

    type: str
    message: str
    details: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    """What its clients act upon."""


class AnthropicError(ErrorBody, kw_only=True):
    """Anthropic's error object."""

    ID_HEADERS: ClassVar[tuple[bytes, ...]] = (b"x-request-id", b"request-id")

    type: Literal["error"] = "error"
    error: AnthropicErrorDetail
    request_id: str

    @classmethod
    def of(cls, error: ApiError, request_id: str) -> AnthropicError:
        kind = _ERROR_TYPES.get(error.status, "invalid_request_error")
        message = error.message
        if error.too_long is not None:  # its clients know these words, and no code
            tokens, most = error.too_long
            message = f"prompt is too long: {tokens} tokens > {most} maximum"
        detail = AnthropicErrorDetail(type=kind, message=message)
        if error.code == _NO_THREADS:
            detail.details = {"error_code": error.code}
        return cls(error=detail, request_id=request_id)


class ThinkingTokens(Answer, kw_only=True):
    """What of the answer was thinking."""

    thinking_tokens: int


class AnthropicUsage(Answer, kw_only=True):
    """Tokens read, those from the cache apart, and written.

    :param cache_creation_input_tokens: absent where the runtime does not say what it found again.
    :param cache_read_input_tokens: the same.
    :param output_tokens_details: absent where the model does not think.
    """

    input_tokens: int
    cache_creation_input_tokens: int | msgspec.UnsetType = msgspec.UNSET
    cache_read_input_tokens: int | msgspec.UnsetType = msgspec.UNSET
    output_tokens: int
    output_tokens_details: ThinkingTokens | msgspec.UnsetType = msgspec.UNSET


class TokensCount(Answer, kw_only=True):
    """How many tokens a conversation has, its tools and what the chat template adds included."""

    input_tokens: int


class Message(Answer, kw_only=True):
    """Anthropic's message."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: StopReason
    stop_sequence: str | None
    usage: AnthropicUsage


# ── the work ─────────────────────────────────────────────────────────────────────────────────


async def messages(call: Call) -> None:
    """Continue a conversation."""
    request = parse(call, MessagesRequest, await call.json())
    writer = MessagesWriter(f"msg_{call.id}", request)
    await respond(call, [_request(call, request, request.max_tokens)], writer)


async def count_tokens(call: Call) -> None:
    """Count the tokens that a conversation has as the model reads it."""
    request = parse(call, CountTokensRequest, await call.json())
    counted = _request(call, request, 1)
    async with call.attended(), admission(call, [counted]) as slot:
        left = {"timeout_s": slot.left_of(counted.timeout_s)}
        tokens = await call.context.service.count_prompt_tokens(counted.model_copy(update=left))
    await call.answer_json(TokensCount(input_tokens=tokens))


def _request(call: Call, request: ConversationRequest, max_tokens: int) -> InferenceRequest:
    if request.thread is not None:
        raise ApiError(
            400,
            "thread: conversations are not kept here; send the whole conversation without it",
            _NO_THREADS,
            "thread",
        )
    system: list[ChatMessage] = []
    if (text := text_of(request.system, "system")) is not None:
        system.append(chat_message("system", text, "system"))
    config = request.output_config or AnthropicOutputConfig()
    thinking = request.thinking or UNTOLD
    off = (
        thinking.asked is False or False in told_to_template(request.chat_template_kwargs).values()
    )
    schema = None if config.format is None else config.format.schema_
    older = None if request.output_format is None else request.output_format.schema_
    asked = {"output_config": {"json_schema": schema}, "output_format": {"json_schema": older}}
    output = structured_output(call, asked | request.extensions())
    params = {"max_new_tokens": max_tokens, "structured_output": output}
    return build(
        call,
        request,
        params_of(call, request, params, absent={"temperature": None}),
        messages=[*system, *messages_of(request.messages)],
        stop_sequences=request.stop_sequences or None,
        template_args=request.chat_template_kwargs or None,
        **_tools(call, request),
        **reasoning_of(
            {
                # Effort is more than thinking; where none is wanted, it says nothing about it.
                "output_config.effort": None if off else config.effort,
                "thinking": thinking.asked,
            },
            {
                "thinking": thinking.budget_tokens,
                "reasoning_budget": request.reasoning_budget,
            },
            request.chat_template_kwargs,
        ),
    )


def _tools(call: Call, request: ConversationRequest) -> dict[str, Any]:
    asked = request.tool_choice
    choice: str | ToolChoiceOf | None = None
    if asked is not None:
        if asked.type == "tool":
            choice = ToolChoiceOf(type="function", name=asked.name)
        else:
            choice = "required" if asked.type == "any" else asked.type
    parallel = False if asked is not None and asked.disable_parallel_tool_use else None
    tools = [tool.as_function() for tool in request.tools or ()]
    return chosen_tools(call, tools, choice, parallel, "input_schema")


def _stop_reason(response: InferenceResponse) -> StopReason:
    return _STOP_REASONS.get(response.finish_reason or "", "end_turn")


def _usage(response: InferenceResponse) -> AnthropicUsage:
    """Anthropic counts what came from the cache apart from what was read."""
    cached, thought = response.cached_prompt_tokens, response.reasoning_tokens
    details = msgspec.UNSET if thought is None else ThinkingTokens(thinking_tokens=thought)
    return AnthropicUsage(
        input_tokens=(response.prompt_tokens or 0) - (cached or 0),
        cache_creation_input_tokens=msgspec.UNSET if cached is None else 0,
        cache_read_input_tokens=msgspec.UNSET if cached is None else cached,
        output_tokens=response.generated_tokens or 0,
        output_tokens_details=details,
    )


class MessagesWriter(Writer):
    """A message, or its events."""

    def __init__(self, message_id: str, request: MessagesRequest) -> None:
        self._id = message_id
        self._model = request.model
        self._shows_thoughts = (request.thinking or UNTOLD).display != "omitted"
        self._blocks = BlockWriter(shows_thoughts=self._shows_thoughts)

    def whole(self, responses: Sequence[InferenceResponse]) -> bytes:
        (response,) = responses
        return dumps(
            Message(
                id=self._id,
                model=self._model,
                content=blocks_of(response, shows_thoughts=self._shows_thoughts),
                stop_reason=_stop_reason(response),
                stop_sequence=response.stop_sequence,
                usage=_usage(response),
            )
        )

    def begin(self, streams: Sequence[InferenceStream]) -> bytes:
        """The message comes to be, and where all is content, its block."""
        message: dict[str, Any] = {
            "id": self._id, "type": "message", "role": "assistant", "model": self._model,
            "content": [], "stop_reason": None, "stop_sequence": None,
            "usage": {"input_tokens": streams[0].prompt_tokens or 0, "output_tokens": 0},
        }  # fmt: skip
        block = self._blocks.text_block() if self.plain else b""
        return _event("message_start", message=message) + block + _event("ping")

    def framer(self, index: int) -> Callable[[str], bytes]:
        return self._blocks.of_text if self.plain else self._blocks.frame

    def finish(self, index: int, response: InferenceResponse) -> bytes:
        """The block ends; why the message does, and the usage."""
        delta = {"stop_reason": _stop_reason(response), "stop_sequence": response.stop_sequence}
        return (
            self._blocks.end(cut_call=response.cut_call)
            + _event("message_delta", delta=delta, usage=_usage(response))
            + _event("message_stop")
        )

    def fail(self, error: ApiError, responses: Sequence[InferenceResponse]) -> bytes:
        """The usage so far, then the error: clients stop reading there."""
        delta = {"stop_reason": None, "stop_sequence": None}
        return _event("message_delta", delta=delta, usage=_usage(responses[0])) + named_event(
            "error", AnthropicError.of(error, responses[0].request_id)
        )


def _event(kind: str, **fields: Any) -> bytes:
    return named_event(kind, {"type": kind, **fields})


ROUTES = (
    work_route(
        "/v1/messages",
        messages,
        "Continue a conversation (Anthropic)",
        "Anthropic",
        request=MessagesRequest,
        response=Message,
        error=AnthropicError,
        streams=SSE,
        example={
            "model": "default",
            "max_tokens": 20,
            "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        },
    ),
    work_route(
        "/v1/messages/count_tokens",
        count_tokens,
        "Count a conversation's tokens (Anthropic)",
        "Anthropic",
        request=CountTokensRequest,
        response=TokensCount,
        error=AnthropicError,
        example={
            "model": "default",
            "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        },
    ),
)

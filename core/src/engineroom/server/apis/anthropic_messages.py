"""``POST /v1/messages``: Anthropic's API, text in and text out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field

from engineroom.inference.streams import InferenceStream
from engineroom.schemas import ChatMessage, InferenceRequest, InferenceResponse, TokenLogprob
from engineroom.server.apis.request_fields import (
    EXTENSIONS,
    ModelName,
    Number,
    Sampling,
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
from engineroom.server.http.exchange import answer_all, stream_all
from engineroom.server.http.frames import Framer, named_event

__all__ = ["MessagesRequest", "messages"]

_STOP_REASONS: Final[Mapping[str, str]] = {
    "eos_token": "end_turn",
    "stop_sequence": "stop_sequence",
    "length": "max_tokens",
}


class AnthropicMessage(SubSchema):
    """A message of the conversation."""

    role: Literal["user", "assistant"]
    content: str | list[TextPart]


class MessagesRequest(Sampling):
    """A conversation to be continued."""

    model: ModelName
    max_tokens: Annotated[int, Field(ge=1)]
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: str | list[TextPart] | None = None
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = None
    """0 is greedy; 1 unless said."""
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    stop_sequences: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=64)] | None
    ) = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None

    RENAMED: ClassVar[Mapping[str, str]] = {"model_id": "model", "max_new_tokens": "max_tokens"}
    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {
        "tools": ([],),
        "tool_choice": ({"type": "none"}, {"type": "auto"}),
        "thinking": ({"type": "disabled"},),
        "output_config": ({},),
        "container": (),
        "mcp_servers": ([],),
        "service_tier": ("auto", "standard_only"),
        "speed": ("standard",),
        "context_management": (),
        "diagnostics": ({},),
        "inference_geo": (),
        "user_profile_id": (),
        "workspace_id": (),
    }
    WITHOUT_EFFECT: ClassVar[Collection[str]] = ("cache_control",)


async def messages(call: Call) -> None:
    """Continue a conversation."""
    request = parse(call, MessagesRequest, await call.json())
    inference = _request(call, request)
    call.context.log_prompt(inference)
    message_id = f"msg_{call.id}"
    if request.stream:
        await stream_all(call, [inference], MessagesWriter(message_id, request.model))
        return
    (response,) = await answer_all(call, [inference])
    await call.answer_json(
        {
            **_message(message_id, request.model),
            "content": [{"type": "text", "text": response.generated_text or "", "citations": None}],
            "stop_reason": _stop_reason(response),
            "stop_sequence": response.stop_sequence,
            "usage": _usage(response),
        }
    )


def _request(call: Call, request: MessagesRequest) -> InferenceRequest:
    check_count(call, request.messages)
    found: list[ChatMessage] = []
    if (system := text_of(request.system, "system")) is not None:
        found.append(chat_message("system", system, "system"))
    for place, each in enumerate(request.messages):
        where = f"messages.{place}"
        found.append(chat_message(each.role, text_of(each.content, where), where))
    params: dict[str, Any] = {
        name: getattr(request, name) for name in ("temperature", "top_p", *EXTENSIONS)
    }
    params["max_new_tokens"] = request.max_tokens
    return build(
        call,
        request,
        params=params,
        absent={"temperature": None},
        model=request.model,
        messages=found,
        stop_sequences=stops(request.stop_sequences),
        stream=bool(request.stream),
        **common_fields(call, request),
    )


def _message(message_id: str, model: str) -> dict[str, Any]:
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _stop_reason(response: InferenceResponse) -> str:
    return _STOP_REASONS.get(response.finish_reason or "", "end_turn")


def _usage(response: InferenceResponse) -> dict[str, Any]:
    """Anthropic counts what came from the cache apart from what was read."""
    cached = response.cached_prompt_tokens or 0
    return {
        "input_tokens": (response.prompt_tokens or 0) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": response.generated_tokens or 0,
    }


class MessagesWriter:
    """The events of a message."""

    wants_logprobs = False

    def __init__(self, message_id: str, model: str) -> None:
        self._message = _message(message_id, model)

    def begin(self, streams: Sequence[InferenceStream]) -> bytes:
        """The message and its block come to be."""
        usage = {"input_tokens": streams[0].prompt_tokens or 0, "output_tokens": 0}
        start = {"type": "message_start", "message": {**self._message, "usage": usage}}
        block = {"type": "text", "text": ""}
        return (
            named_event("message_start", start)
            + named_event(
                "content_block_start",
                {"type": "content_block_start", "index": 0, "content_block": block},
            )
            + named_event("ping", {"type": "ping"})
        )

    def framer(self, index: int) -> Callable[[str], bytes]:
        """Makes deltas."""
        return Framer(
            lambda text: {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": text},
            },
            "content_block_delta",
        )

    def text_with_logprobs(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """Not asked for."""
        return self.framer(index)(text)

    def finish(self, index: int, response: InferenceResponse) -> bytes:
        """The block ends; why the message does, and the usage."""
        delta = {"stop_reason": _stop_reason(response), "stop_sequence": response.stop_sequence}
        return (
            named_event("content_block_stop", {"type": "content_block_stop", "index": 0})
            + named_event(
                "message_delta",
                {"type": "message_delta", "delta": delta, "usage": _usage(response)},
            )
            + named_event("message_stop", {"type": "message_stop"})
        )

    def end(self, responses: Sequence[InferenceResponse]) -> bytes:
        """Nothing more."""
        return b""

    def fail(self, refused: ApiError, responses: Sequence[InferenceResponse]) -> bytes:
        """The usage so far, then the error: clients stop reading there."""
        delta = {"stop_reason": None, "stop_sequence": None}
        usage = {"type": "message_delta", "delta": delta, "usage": _usage(responses[0])}
        return named_event("message_delta", usage) + named_event(
            "error", refused.anthropic(responses[0].request_id)
        )

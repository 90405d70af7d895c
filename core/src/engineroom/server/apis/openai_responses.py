"""``POST /v1/responses``: OpenAI's newer API, text in and text out; nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta
from pydantic import Field, Tag

from engineroom.field_types import either
from engineroom.inference.streams import InferenceStream
from engineroom.schemas import ChatMessage, InferenceRequest, InferenceResponse, TokenLogprob
from engineroom.server.apis.openai_common import OpenAISampling
from engineroom.server.apis.openai_logprobs import TokenEntry, token_entries
from engineroom.server.apis.request_fields import (
    Content,
    SubSchema,
    build,
    chat_message,
    conversation,
    params_of,
    parse,
)
from engineroom.server.apis.routing import SSE, work_route
from engineroom.server.apis.structured_fields import (
    TextConfig,
    check_neutral,
    structured_output,
)
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError
from engineroom.server.http.exchange import Writer, respond
from engineroom.server.http.frames import Answer, dumps, json_text, named_event

__all__ = ["ROUTES", "ResponsesRequest"]

_INPUT_KINDS: Final = ("input_text", "output_text", "text")
_LOGPROBS: Final = "message.output_text.logprobs"


class InputMessage(SubSchema):
    """A message of the input."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class ResponsesRequest(OpenAISampling):
    """A text or a conversation to be answered."""

    input: Annotated[
        Annotated[str, Tag("(text)")]
        | Annotated[list[InputMessage], Field(fail_fast=True, min_length=1), Tag("(messages)")],
        either("a text or a list of messages", {str: "(text)", list: "(messages)"}),
    ]
    instructions: str | None = None
    """A system message before the input."""
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    """Without it, until the context is full."""
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    text: TextConfig | None = None
    parallel_tool_calls: bool | None = None
    """Said back; there are no tools."""
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """With log probabilities included: those of so many likely tokens, too."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "model_id": "model",
        "max_new_tokens": "max_output_tokens",
    }
    COUNTED: ClassVar[Collection[str]] = ("input",)
    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "reasoning": ({}, {"effort": "none"}),
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "background": (False,),
        "background_options": ({},),
        "store": (False,),
        "access_programs": ({},),
        "image": ({},),
        "truncation": ("disabled",),
        "service_tier": ("auto", "default"),
        "context_management": ([],),
        "moderation": (),
    }
    WITHOUT_EFFECT: ClassVar[Collection[str]] = (
        "max_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    )


# ── answers ──────────────────────────────────────────────────────────────────────────────────

ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]
Not: TypeAlias = Annotated[bool, Meta(extra_json_schema={"const": False})]
"""Never ``true``."""


class OutputText(Answer, kw_only=True):
    """A part of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: tuple[Any, ...] = ()
    logprobs: list[TokenEntry] = msgspec.field(default_factory=list)


class OutputMessage(Answer, kw_only=True):
    """A message."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class InputTokensDetails(Answer, kw_only=True):
    """What of the prompt's work was not done again."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Answer, kw_only=True):
    """What of the answer was reasoning."""

    reasoning_tokens: int = 0


class ResponseUsage(Answer, kw_only=True):
    """Tokens read and written."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class Response(Answer, kw_only=True):
    """OpenAI's response object."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Not = False
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: dict[str, None]
    service_tier: Literal["default"] = "default"
    store: Not = False
    temperature: float
    text: dict[str, Any]
    tool_choice: Literal["auto"] = "auto"
    tools: tuple[Any, ...] = ()
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None
    user: str | None


# ── the work ─────────────────────────────────────────────────────────────────────────────────


async def create_response(call: Call) -> None:
    """Answer a text or a conversation."""
    request = parse(call, ResponsesRequest, await call.json())
    await respond(call, [_request(call, request)], ResponsesWriter(call, request))


def _request(call: Call, request: ResponsesRequest) -> InferenceRequest:
    messages: list[ChatMessage] = []
    if request.instructions is not None:
        messages.append(chat_message("system", request.instructions, "instructions"))
    if isinstance(request.input, str):
        messages.append(chat_message("user", request.input, "input"))
    else:
        messages += conversation(request.input, "input", _INPUT_KINDS)
    text = request.text or TextConfig()
    check_neutral(text.verbosity, "medium", "text.verbosity")
    asked = {"text.format": text.format.asked("text.format") if text.format else {}}
    output = structured_output(asked | request.extensions())
    top = request.top_logprobs or 0
    if top and not request.include:
        raise ApiError(
            400, f'top_logprobs needs include: ["{_LOGPROBS}"]', "invalid_value", "top_logprobs"
        )
    params = {
        "max_new_tokens": request.max_output_tokens,
        "structured_output": output,
        "logprobs": top if request.include else None,
    }
    absent = {"temperature": None, "max_new_tokens": None}
    return build(call, request, params_of(call, request, params, absent), messages=messages)


def _usage(answer: InferenceResponse) -> ResponseUsage:
    read, written = answer.prompt_tokens or 0, answer.generated_tokens or 0
    return ResponseUsage(
        input_tokens=read,
        input_tokens_details=InputTokensDetails(cached_tokens=answer.cached_prompt_tokens or 0),
        output_tokens=written,
        output_tokens_details=OutputTokensDetails(),
        total_tokens=read + written,
    )


class ResponsesWriter(Writer):
    """A response, or its events."""

    def __init__(self, call: Call, request: ResponsesRequest) -> None:
        self._id = f"resp_{call.id}"
        self._item_id = f"msg_{call.id}"
        self._created = int(time.time())
        self._request = request
        self.wants_logprobs = bool(request.include)
        form = request.text.format if request.text else None
        self._format = (
            {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_unset=True)
        )
        self._number = 0
        self._part = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        kind = "response.output_text.delta"
        delta = dumps({"type": kind, **self._part, "logprobs": []})
        self._before = b'event: %b\ndata: %b,"delta":' % (kind.encode(), delta[:-1])

    def whole(self, responses: Sequence[InferenceResponse]) -> bytes:
        return dumps(self._response(responses[0]))

    def begin(self, streams: Sequence[InferenceStream]) -> bytes:
        """The response, its message and its part come to be."""
        return (
            self._event("response.created", response=self._response(None))
            + self._event("response.in_progress", response=self._response(None))
            + self._event("response.output_item.added", output_index=0, item=self._item())
            + self._event("response.content_part.added", **self._part, part=OutputText(text=""))
        )

    def framer(self, index: int) -> Callable[[str], bytes]:
        return self._delta

    def _delta(self, text: str) -> bytes:
        number = self._number
        self._number = number + 1
        return self._before + json_text(text) + b',"sequence_number":%d}\n\n' % number

    def text_with_logprobs(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        entries = token_entries(logprobs)
        return self._event("response.output_text.delta", **self._part, delta=text, logprobs=entries)

    def finish(self, index: int, response: InferenceResponse) -> bytes:
        """The part, the message and the response are done."""
        whole = self._response(response)
        (part,) = whole.output[0].content
        text = {"text": part.text, "logprobs": part.logprobs}
        return (
            self._event("response.output_text.done", **self._part, **text)
            + self._event("response.content_part.done", **self._part, part=part)
            + self._event("response.output_item.done", output_index=0, item=whole.output[0])
            + self._event(f"response.{whole.status}", response=whole)
        )

    def fail(self, error: ApiError, responses: Sequence[InferenceResponse]) -> bytes:
        """The error, and the response that failed, with its usage."""
        return self._event(
            "error", code=error.code, message=error.message, param=error.param
        ) + self._event("response.failed", response=self._response(responses[0], error))

    def _event(self, kind: str, **fields: Any) -> bytes:
        value = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return named_event(kind, value)

    @staticmethod
    def _encoded(entries: list[TokenEntry]) -> Any:
        """Encoded once, however often they are sent."""
        return msgspec.Raw(dumps(entries)) if entries else entries

    def _item(self, status: ItemStatus = "in_progress", *content: OutputText) -> OutputMessage:
        return OutputMessage(id=self._item_id, status=status, content=list(content))

    def _response(
        self, answer: InferenceResponse | None, error: ApiError | None = None
    ) -> Response:
        """The whole object; without an answer, that of one in progress."""
        request = self._request
        status: ItemStatus = "in_progress"
        output: list[OutputMessage] = []
        if answer is not None and error is None:
            status = "incomplete" if answer.finish_reason == "length" else "completed"
            entries = self._encoded(token_entries(answer.logprobs or ()))
            text = OutputText(text=answer.generated_text or "", logprobs=entries)
            output = [self._item(status, text)]
        return Response(
            id=self._id,
            created_at=self._created,
            status=status if error is None else "failed",
            error=None if error is None else {"code": "server_error", "message": error.message},
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            model=request.model,
            output=output,
            parallel_tool_calls=request.parallel_tool_calls is not False,
            reasoning={"effort": None, "summary": None},
            temperature=1.0 if request.temperature is None else request.temperature,
            top_logprobs=request.top_logprobs or 0,
            text={"format": self._format},
            top_p=1.0 if request.top_p is None else request.top_p,
            usage=None if answer is None else _usage(answer),
            user=request.user,
        )


ROUTES = (
    work_route(
        "/v1/responses",
        create_response,
        "Answer a text or a conversation (OpenAI)",
        "OpenAI",
        request=ResponsesRequest,
        response=Response,
        streams=SSE,
        example={"model": "default", "input": "Why is the sky blue?", "max_output_tokens": 20},
    ),
)

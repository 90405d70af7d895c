"""``POST /v1/responses``: OpenAI's newer API, text in and text out; nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field

from engineroom.inference.streams import InferenceStream
from engineroom.schemas import ChatMessage, InferenceRequest, InferenceResponse, TokenLogprob
from engineroom.server.apis.openai_chat import Seed
from engineroom.server.apis.request_fields import (
    EXTENSIONS,
    ModelName,
    Number,
    Sampling,
    StreamOptions,
    SubSchema,
    TextPart,
    build,
    chat_message,
    check_count,
    common_fields,
    parse,
    text_of,
)
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError
from engineroom.server.http.exchange import answer_all, stream_all
from engineroom.server.http.frames import dumps, json_text, named_event

__all__ = ["ResponsesRequest", "create_response"]

_INPUT_KINDS: Final = ("input_text", "output_text", "text")


class InputMessage(SubSchema):
    """A message of the input."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class ResponsesRequest(Sampling):
    """A text or a conversation to be answered."""

    model: ModelName
    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    """A system message before the input."""
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    """Without it, until the context is full."""
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    parallel_tool_calls: bool | None = None
    """Said back; there are no tools."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "model_id": "model",
        "max_new_tokens": "max_output_tokens",
    }
    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "text": (
            {},
            {"format": {"type": "text"}},
            {"format": {"type": "text"}, "verbosity": "medium"},
        ),
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
        "include": ([],),
        "top_logprobs": (0,),
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


async def create_response(call: Call) -> None:
    """Answer a text or a conversation."""
    body = await call.json()
    request = parse(call, ResponsesRequest, body)
    inference = _request(call, request)
    call.context.log_prompt(inference)
    shape = _Shape(call, request)
    if request.stream:
        await stream_all(call, [inference], ResponsesWriter(shape))
        return
    (response,) = await answer_all(call, [inference])
    await call.answer_json(shape.response(response))


def _request(call: Call, request: ResponsesRequest) -> InferenceRequest:
    messages: list[ChatMessage] = []
    if request.instructions is not None:
        messages.append(chat_message("system", request.instructions, "instructions"))
    if isinstance(request.input, str):
        messages.append(chat_message("user", request.input, "input"))
    else:
        check_count(call, request.input, "input")
        for place, each in enumerate(request.input):
            where = f"input.{place}"
            text = text_of(each.content, where, _INPUT_KINDS)
            messages.append(chat_message(each.role, text, where))
    params: dict[str, Any] = {
        name: getattr(request, name) for name in ("temperature", "top_p", *EXTENSIONS)
    }
    if request.seed is not None:
        params["seed"] = request.seed % (1 << 63)
    params["max_new_tokens"] = request.max_output_tokens
    return build(
        call,
        request,
        params=params,
        absent={"temperature": None, "max_new_tokens": None},
        model=request.model,
        messages=messages,
        stream=bool(request.stream),
        **common_fields(call, request),
    )


class _Shape:
    """The response object, as far as it has come."""

    def __init__(self, call: Call, request: ResponsesRequest) -> None:
        self.id = f"resp_{call.id}"
        self.item_id = f"msg_{call.id}"
        self._created = int(time.time())
        self._request = request

    def part(self, text: str) -> dict[str, Any]:
        """The text as a part of the message."""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def item(self, status: str, text: str | None) -> dict[str, Any]:
        """The message; ``None``: it has no part yet."""
        return {
            "id": self.item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if text is None else [self.part(text)],
        }

    def response(
        self, answer: InferenceResponse | None, refused: ApiError | None = None
    ) -> dict[str, Any]:
        """The whole object; without an answer, that of one in progress."""
        request = self._request
        status, incomplete = "in_progress", None
        if answer is not None:
            status = "completed"
            if refused is not None:
                status = "failed"
            elif answer.finish_reason == "length":
                status, incomplete = "incomplete", {"reason": "max_output_tokens"}
        output = []
        if answer is not None and refused is None:
            output = [self.item(status, answer.generated_text or "")]
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": (
                None if refused is None else {"code": "server_error", "message": refused.message}
            ),
            "incomplete_details": incomplete,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None if answer is None else _usage(answer),
            "user": request.user,
        }


def _usage(answer: InferenceResponse) -> dict[str, Any]:
    read, written = answer.prompt_tokens or 0, answer.generated_tokens or 0
    return {
        "input_tokens": read,
        "input_tokens_details": {
            "cached_tokens": answer.cached_prompt_tokens or 0,
            "cache_write_tokens": 0,
        },
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }


class ResponsesWriter:
    """The events of a response."""

    wants_logprobs = False

    def __init__(self, shape: _Shape) -> None:
        self._shape = shape
        self._number = 0
        place = {"item_id": shape.item_id, "output_index": 0, "content_index": 0}
        self._place = place
        delta = {"type": "response.output_text.delta", **place, "logprobs": []}
        self._before = (
            b"event: response.output_text.delta\ndata: " + dumps(delta)[:-1] + b',"delta":'
        )

    def _event(self, kind: str, **fields: Any) -> bytes:
        value = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return named_event(kind, value)

    def begin(self, streams: Sequence[InferenceStream]) -> bytes:
        """The response, its message and its part come to be."""
        shape = self._shape
        return (
            self._event("response.created", response=shape.response(None))
            + self._event("response.in_progress", response=shape.response(None))
            + self._event(
                "response.output_item.added", output_index=0, item=shape.item("in_progress", None)
            )
            + self._event("response.content_part.added", **self._place, part=shape.part(""))
        )

    def framer(self, index: int) -> Callable[[str], bytes]:
        """Makes deltas."""
        return self._delta

    def _delta(self, text: str) -> bytes:
        number = self._number
        self._number = number + 1
        return self._before + json_text(text) + b',"sequence_number":%d}\n\n' % number

    def text_with_logprobs(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """Not asked for."""
        return self._delta(text)

    def finish(self, index: int, response: InferenceResponse) -> bytes:
        """The part, the message and the response are done."""
        shape, text = self._shape, response.generated_text or ""
        whole = shape.response(response)
        kind = "response.incomplete" if whole["status"] == "incomplete" else "response.completed"
        return (
            self._event("response.output_text.done", **self._place, text=text, logprobs=[])
            + self._event("response.content_part.done", **self._place, part=shape.part(text))
            + self._event(
                "response.output_item.done",
                output_index=0,
                item=shape.item(whole["status"], text),
            )
            + self._event(kind, response=whole)
        )

    def end(self, responses: Sequence[InferenceResponse]) -> bytes:
        """Nothing more."""
        return b""

    def fail(self, refused: ApiError, responses: Sequence[InferenceResponse]) -> bytes:
        """The error, and the response that failed, with its usage."""
        error = {"code": refused.code, "message": refused.message, "param": refused.param}
        return self._event("error", **error) + self._event(
            "response.failed", response=self._shape.response(responses[0], refused)
        )

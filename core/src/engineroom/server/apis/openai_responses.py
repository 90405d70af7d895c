"""``POST /v1/responses``: OpenAI's newer API, text in and text out; nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

from msgspec import Meta
from pydantic import Field, Tag

from engineroom.field_types import either
from engineroom.inference.streams import InferenceStream
from engineroom.schemas import (
    ChatMessage,
    InferenceRequest,
    InferenceResponse,
    PromptLogprob,
    TokenLogprob,
)
from engineroom.server.apis.openai_common import (
    OF_ANTHROPIC,
    SERVICE_TIER,
    STORE,
    VERBOSITY,
    OpenAISampling,
)
from engineroom.server.apis.openai_logprobs import encoded
from engineroom.server.apis.peer_fields import is_neutral
from engineroom.server.apis.request_fields import (
    MaxTokens,
    build,
    chat_message,
    params_of,
    parse,
)
from engineroom.server.apis.responses_input import (
    InputItem,
    ResponsesTools,
    is_complete,
    messages_of,
)
from engineroom.server.apis.responses_output import (
    FunctionCallItem,
    ItemStatus,
    ItemWriter,
    OutputItem,
    OutputMessage,
    ReasoningItem,
)
from engineroom.server.apis.routing import SSE, work_route
from engineroom.server.apis.structured_fields import (
    TextConfig,
    structured_output,
)
from engineroom.server.apis.tool_fields import (
    ReasoningConfig,
    TemplateFields,
    ToolChoice,
    chosen_tools,
    reasoning_of,
)
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, unsupported
from engineroom.server.http.exchange import Writer, respond
from engineroom.server.http.frames import Answer, dumps

__all__ = ["ROUTES", "ResponsesRequest"]

_LOGPROBS: Final = "message.output_text.logprobs"


_ENCRYPTED: Final = "reasoning.encrypted_content"
Included: TypeAlias = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponsesRequest(TemplateFields, OpenAISampling):
    """A text or a conversation to be answered."""

    input: Annotated[
        Annotated[str, Tag("(text)")]
        | Annotated[list[InputItem], Field(fail_fast=True, min_length=1), Tag("(items)")],
        either("a text or a list of messages", {str: "(text)", list: "(items)"}),
    ]
    instructions: str | None = None
    """A system message before the input."""
    max_output_tokens: MaxTokens | None = None
    """Without it, and with -1, until the context is full."""
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    text: TextConfig | None = None
    parallel_tool_calls: bool | None = None
    """``false``: at most one call."""
    tools: ResponsesTools | None = None
    """Functions that the model may call."""
    tool_choice: ToolChoice | None = None
    """Whether it does; without it, as it likes."""
    reasoning: ReasoningConfig | None = None
    include: Annotated[list[Included], Field(fail_fast=True)] | None = None
    """Log probabilities. What is wanted of tools that a server runs there is none of."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """With log probabilities included: those of so many likely tokens, too."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "model_id": "model",
        "max_new_tokens": "max_output_tokens",
        "template_args": "chat_template_kwargs",
    }
    COUNTED: ClassVar[Collection[str]] = ("input",)
    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "background": (False,),
        "background_options": ({},),
        "access_programs": ({},),
        "image": ({},),
        "context_management": ([],),
        "moderation": (),
        # Of other APIs: what they ask for would not be.
        "response_format": ({"type": "text"},),
        **OF_ANTHROPIC,
        "reasoning_effort": (),
        "include_reasoning": (True,),
        "thinking": ({"type": "auto"},),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "logprobs": (False,),
        "n": (1,),
        "stop": ([], ""),
    }
    INSTEAD: ClassVar[Mapping[str, str]] = {
        "response_format": "use text.format",
        "output_config": "use text.format and reasoning.effort",
        "output_format": "use text.format",
        "reasoning_effort": "use reasoning.effort",
        "thinking": "use reasoning.effort",
        "functions": "use tools",
        "function_call": "use tool_choice",
        "logprobs": 'use include: ["message.output_text.logprobs"]',
    }
    IGNORED: ClassVar[Mapping[str, tuple[Collection[Any], str]]] = {
        "store": STORE,
        "truncation": (("disabled",), "a conversation that is too long is refused"),
        "service_tier": SERVICE_TIER,
    }
    WITHOUT_EFFECT: ClassVar[Collection[str]] = (
        "max_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    )


# ── answers ──────────────────────────────────────────────────────────────────────────────────

Not: TypeAlias = Annotated[bool, Meta(extra_json_schema={"const": False})]
"""Never ``true``."""


class InputTokensDetails(Answer, kw_only=True):
    """What of the prompt's work was not done again; 0 as well where the runtime does not say it,
    for the API has no answer without it.
    """

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
    output: list[ReasoningItem | OutputMessage | FunctionCallItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: dict[str, str | None]
    service_tier: Literal["default"] = "default"
    store: Not = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
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
    call.places["messages"] = "input"
    if request.instructions is not None:
        messages.append(chat_message("system", request.instructions, "instructions"))
    complete = False
    if isinstance(request.input, str):
        messages.append(chat_message("user", request.input, "input"))
    else:
        messages += messages_of(request.input)
        complete = is_complete(request.input)
    text = request.text or TextConfig()
    if not is_neutral(text.verbosity, VERBOSITY[0]):
        call.warn([f"text.verbosity was ignored: {VERBOSITY[1]}"])
    asked = {"text.format": text.format.asked("text.format") if text.format else {}}
    output = structured_output(call, asked | request.extensions())
    top, include = request.top_logprobs or 0, request.include or ()
    with_logprobs = _LOGPROBS in include
    if _ENCRYPTED in include:
        call.warn([f"include: {_ENCRYPTED} was ignored: reasoning is told as it is"])
    if top and not with_logprobs:
        raise ApiError(
            400, f'top_logprobs needs include: ["{_LOGPROBS}"]', "invalid_value", "top_logprobs"
        )
    params = {
        "max_new_tokens": None if request.max_output_tokens == -1 else request.max_output_tokens,
        "structured_output": output,
        "logprobs": top if with_logprobs else None,
    }
    absent = {"temperature": None, "max_new_tokens": None}
    config = request.reasoning or ReasoningConfig()
    if config.exclude:
        raise unsupported("reasoning.exclude", "reasoning")
    return build(
        call,
        request,
        params_of(call, request, params, absent),
        messages=messages,
        continue_final_message=False if complete else None,
        template_args=request.chat_template_kwargs or None,
        **chosen_tools(
            call,
            request.tools,
            request.tool_choice,
            request.parallel_tool_calls,
            "parameters",
        ),
        **reasoning_of(
            {"reasoning": config.asked},
            {"reasoning": config.max_tokens, "reasoning_budget": request.reasoning_budget},
            request.chat_template_kwargs,
        ),
    )


def _usage(answer: InferenceResponse) -> ResponseUsage:
    read, written = answer.prompt_tokens or 0, answer.generated_tokens or 0
    return ResponseUsage(
        input_tokens=read,
        input_tokens_details=InputTokensDetails(cached_tokens=answer.cached_prompt_tokens or 0),
        output_tokens=written,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=answer.reasoning_tokens or 0),
        total_tokens=read + written,
    )


class ResponsesWriter(Writer):
    """A response, or its events."""

    def __init__(self, call: Call, request: ResponsesRequest) -> None:
        self._id = f"resp_{call.id}"
        self._created = int(time.time())
        self._request = request
        self.wants_logprobs = _LOGPROBS in (request.include or ())
        form = request.text.format if request.text else None
        self._format = (
            {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_unset=True)
        )
        self._items = ItemWriter(call.id)
        self._rounds = call.context.rounds
        self._streams = bool(request.stream)
        self._entries: list[bytes] = []

    async def prepare(
        self,
        index: int,
        logprobs: list[TokenLogprob] | None,
        prompt_logprobs: list[PromptLogprob] | None,
    ) -> None:
        """Encode the log probabilities of a whole answer."""
        if logprobs and not self._streams:
            self._entries = await encoded(self._rounds, logprobs)

    def whole(self, responses: Sequence[InferenceResponse]) -> bytes:
        (response,) = responses
        output = self._items.items_of(response, _status(response), self._entries)
        return dumps(self._response(response, output))

    def begin(self, streams: Sequence[InferenceStream]) -> bytes:
        """The response comes to be, and where all is content, its message."""
        event = self._items.event
        return (
            event("response.created", response=self._response(None))
            + event("response.in_progress", response=self._response(None))
            + (self._items.message() if self.plain else b"")
        )

    def framer(self, index: int) -> Callable[[str], bytes]:
        return self._items.frame

    def text_with_logprobs(self, index: int, chunk: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        return self._items.with_logprobs(chunk, logprobs)

    def finish(self, index: int, response: InferenceResponse) -> bytes:
        """The last item and the response are done."""
        status = _status(response)
        ended, output = self._items.end(response, status)
        whole = self._response(response, output)
        return ended + self._items.event(f"response.{whole.status}", response=whole)

    def fail(self, error: ApiError, responses: Sequence[InferenceResponse]) -> bytes:
        """The error, and the response that failed, with its usage."""
        event, failed = self._items.event, self._response(responses[0], error=error)
        return event("error", code=error.code, message=error.message, param=error.param) + event(
            "response.failed", response=failed
        )

    def _response(
        self,
        answer: InferenceResponse | None,
        output: Sequence[OutputItem] = (),
        *,
        error: ApiError | None = None,
    ) -> Response:
        """The whole object; without an answer, that of one in progress."""
        request = self._request
        status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
        if error is not None:
            status = "failed"
        elif answer is not None:
            status = _status(answer)
        config = request.reasoning or ReasoningConfig()
        asked = request.tool_choice or "auto"
        choice = asked if isinstance(asked, str) else asked.model_dump(exclude_unset=True)
        unsaid = {"parameters": None, "strict": None}
        tools = [unsaid | tool.model_dump(exclude_unset=True) for tool in request.tools or ()]
        return Response(
            id=self._id,
            created_at=self._created,
            status=status,
            error=None if error is None else {"code": "server_error", "message": error.message},
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            model=request.model,
            output=list(output),
            parallel_tool_calls=request.parallel_tool_calls is not False,
            reasoning={"effort": config.effort, "summary": None},
            temperature=1.0 if request.temperature is None else request.temperature,
            top_logprobs=request.top_logprobs or 0,
            text={"format": self._format},
            tool_choice=choice,
            tools=tools,
            top_p=1.0 if request.top_p is None else request.top_p,
            usage=None if answer is None else _usage(answer),
            user=request.user,
        )


def _status(answer: InferenceResponse) -> ItemStatus:
    return "incomplete" if answer.finish_reason == "length" else "completed"


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

"""``POST /v1/chat/completions``: OpenAI's chat."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from msgspec import UNSET, UnsetType
from pydantic import ConfigDict, Field

from engineroom.generation.deltas import ReasoningDelta, ToolCallDelta
from engineroom.inference.streams import InferenceStream
from engineroom.schemas import ChatMessage, InferenceRequest, InferenceResponse, TokenLogprob
from engineroom.server.apis.continuing import asked_to_continue
from engineroom.server.apis.openai_common import (
    OF_ANTHROPIC,
    SERVICE_TIER,
    STORE,
    VERBOSITY,
    Completed,
    FinishReason,
    OpenAIRequest,
    OpenAIWriter,
    requests_for,
)
from engineroom.server.apis.openai_logprobs import TokenEntry, token_entries
from engineroom.server.apis.request_fields import (
    Content,
    MaxTokens,
    SubSchema,
    chat_message,
    parse,
    text_of,
)
from engineroom.server.apis.routing import SSE, work_route
from engineroom.server.apis.tool_fields import (
    UNTOLD,
    CalledTool,
    Effort,
    ReasoningConfig,
    TemplateFields,
    Thinking,
    ToolChoice,
    ToolList,
    chosen_tools,
    reasoning_of,
)
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, unsupported
from engineroom.server.http.exchange import respond
from engineroom.server.http.frames import Answer, event

__all__ = ["ROUTES", "ChatInput", "ChatRequest", "message_of"]


def _where(condition: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """A schema of what is so only where a condition holds."""
    return {"anyOf": [{"not": condition}, then]}


def _role(name: str) -> dict[str, Any]:
    return {"required": ["role"], "properties": {"role": {"const": name}}}


_TEXT: Final = {"type": "string", "minLength": 1}
_SOME: Final = {"type": "array", "minItems": 1}
_CALLS: Final = {"required": ["tool_calls"], "properties": {"tool_calls": _SOME}}
_WHOLE_MESSAGE: Final[list[Any]] = [
    {
        "anyOf": [
            {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
            _CALLS,
        ]
    },
    _where(_role("tool"), {"required": ["tool_call_id"], "properties": {"tool_call_id": _TEXT}}),
    _where(_CALLS, _role("assistant")),
]
"""What a message needs, as the description says it; :func:`message_of` refuses what lacks it."""


class ChatInput(SubSchema):
    """A message of the conversation."""

    model_config = ConfigDict(json_schema_extra={"allOf": _WHOLE_MESSAGE})
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[CalledTool], Field(fail_fast=True)] | None = None
    """Calls that the assistant has made; each has its result in a message of role ``tool``."""
    tool_call_id: str | None = None
    """Whose result a message of role ``tool`` is."""
    reasoning_content: str | None = None
    """What the assistant thought before it; ``reasoning`` is the same."""
    reasoning: str | None = None
    prefix: bool | None = None
    """``true``: the answer goes on with this message, the last one, as in DeepSeek's and Mistral's
    APIs."""
    function_call: Any = None
    """Only none: the older form of ``tool_calls``."""
    audio: Any = None
    refusal: str | None = None
    """What the assistant said where it refused; its content, if it has none."""


class ChatRequest(TemplateFields, OpenAIRequest):
    """A conversation to be continued."""

    messages: Annotated[list[ChatInput], Field(fail_fast=True, min_length=1)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    """The newer name; without either, and with -1, until the context is full."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    tools: ToolList | None = None
    """Functions that the model may call."""
    tool_choice: ToolChoice | None = None
    """Whether it does; without it, as it likes."""
    parallel_tool_calls: bool | None = None
    """``false``: at most one call."""
    reasoning_effort: Effort | None = None
    thinking: Thinking | None = None
    reasoning: ReasoningConfig | None = None
    include_reasoning: bool | None = None
    """``false``: what the model thought is left out, as in vLLM."""
    continue_final_message: bool | None = None
    """Whether the answer goes on with the last message; without it, where that is the assistant's.
    """
    add_generation_prompt: bool | None = None
    """The opposite of it."""

    COUNTED: ClassVar[Collection[str]] = ("messages",)
    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "moderation": (),
        # Of other APIs: what they ask for would not be.
        "text": ({}, {"format": {"type": "text"}}),
        **OF_ANTHROPIC,
    }
    INSTEAD: ClassVar[Mapping[str, str]] = {
        "text": "use response_format",
        "output_config": "use response_format and reasoning_effort",
        "output_format": "use response_format",
        "stop_sequences": "use stop",
        "functions": "use tools",
        "function_call": "use tool_choice",
    }
    IGNORED: ClassVar[Mapping[str, tuple[Collection[Any], str]]] = {
        "prediction": ((), "nothing is predicted from it; the text is the same"),
        "verbosity": VERBOSITY,
        "store": STORE,
        "service_tier": SERVICE_TIER,
    }
    WITHOUT_EFFECT: ClassVar[Collection[str]] = (
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    )


# ── answers ──────────────────────────────────────────────────────────────────────────────────


class ChatLogprobs(Answer, kw_only=True):
    """Log probabilities of the answer's tokens."""

    content: list[TokenEntry]
    refusal: None = None


class Function(Answer, kw_only=True):
    """What is called, and with which arguments, a JSON object as text."""

    name: str
    arguments: str


class FunctionCall(Answer, kw_only=True):
    """A call of one of the tools."""

    id: str
    type: Literal["function"] = "function"
    function: Function


class AssistantMessage(Answer, kw_only=True):
    """The answer.

    :param content: ``None`` where there are only calls.
    :param tool_calls: absent where there are none.
    :param reasoning_content: what the model thought before; absent where it did not.
    :param reasoning: the same.
    """

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[FunctionCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


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
    writer = ChatWriter(call, request)
    await respond(call, _requests(call, request), writer)


def _requests(call: Call, request: ChatRequest) -> list[InferenceRequest]:
    if request.top_logprobs and not request.logprobs:
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
        message_of(message, f"messages.{number}") for number, message in enumerate(request.messages)
    ]
    goes_on = asked_to_continue(
        messages,
        continue_final_message=request.continue_final_message,
        add_generation_prompt=request.add_generation_prompt,
        prefixes=[number for number, message in enumerate(request.messages) if message.prefix],
    )
    params = {
        "max_new_tokens": new if new is not None else old,
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
    }
    config, thinking = request.reasoning or ReasoningConfig(), request.thinking or UNTOLD
    fields = {
        "messages": messages,
        "continue_final_message": goes_on,
        "template_args": request.chat_template_kwargs or None,
        **chosen_tools(
            call,
            [tool.function for tool in request.tools or ()],
            request.tool_choice,
            request.parallel_tool_calls,
            "function.parameters",
        ),
        **reasoning_of(
            {
                "reasoning_effort": request.reasoning_effort,
                "thinking": thinking.asked,
                "reasoning": config.asked,
            },
            {
                "reasoning_budget": request.reasoning_budget,
                "thinking": thinking.budget_tokens,
                "reasoning": config.max_tokens,
            },
            request.chat_template_kwargs,
        ),
    }
    return requests_for(call, request, params, None, [fields])


def message_of(message: ChatInput, where: str) -> ChatMessage:
    """A message as the service has it.

    :param where: its place in the body.
    :raises ApiError: 400.
    """
    for name in ("function_call", "audio"):
        if getattr(message, name):
            raise unsupported(f"{where}.{name}", "messages")
    calls = message.tool_calls or []
    text, thoughts = _content(message, where)
    if text is None and not calls:
        raise ApiError(400, f"{where}: the message has no content", "invalid_value", "messages")
    if calls and message.role != "assistant":
        raise ApiError(400, f"{where}: only the assistant calls tools", "invalid_value", "messages")
    if message.role == "tool" and not message.tool_call_id:
        raise ApiError(
            400, f"{where}: a tool's result needs tool_call_id", "invalid_value", "messages"
        )
    return chat_message(
        message.role,
        text,
        where,
        message.name,
        tool_calls=[called.as_message() for called in calls] or None,
        tool_call_id=message.tool_call_id,
        reasoning=message.reasoning_content or message.reasoning or thoughts or None,
    )


_THOUGHTS: Final = ("thinking", "reasoning", "redacted_thinking")


def _content(message: ChatInput, where: str) -> tuple[str | None, str]:
    """The text of a message, and what the assistant thought before it, where a part tells it."""
    content = message.content
    if message.role != "assistant":
        return text_of(content, where), ""
    thoughts = ""
    if isinstance(content, list):
        thoughts = "".join(part.thought for part in content if part.type in _THOUGHTS)
        content = [part for part in content if part.type not in _THOUGHTS] or None
    text = text_of(content, where, ("text", "refusal"))
    if not text and (message.refusal or message.content):
        text = message.refusal or ""
    return text, thoughts


class ChatWriter(OpenAIWriter):
    """A chat completion, or its chunks."""

    PREFIX = "chatcmpl"
    COMPLETED = ChatCompletion
    CHUNK = "chat.completion.chunk"

    def __init__(self, call: Call, request: ChatRequest) -> None:
        super().__init__(call, request, bool(request.logprobs))
        config, thinking = request.reasoning or ReasoningConfig(), request.thinking or UNTOLD
        hidden = config.exclude or thinking.display == "omitted"
        self._shows_reasoning = not hidden and request.include_reasoning is not False

    def choice(self, response: InferenceResponse, **fields: Any) -> ChatChoice:
        calls = [
            FunctionCall(id=made.id, function=Function(name=made.name, arguments=made.arguments))
            for made in response.tool_calls or ()
        ]
        shown = response.reasoning if self._shows_reasoning else None
        reasoning = UNSET if shown is None else shown
        message = AssistantMessage(
            content=response.generated_text or (None if calls else ""),
            tool_calls=calls or UNSET,
            reasoning_content=reasoning,
            reasoning=reasoning,
        )
        return ChatChoice(message=message, **fields)

    def addition(self, chunk: str | None) -> dict[str, Any]:
        if type(chunk) is str:  # content, as nearly all chunks are
            return {"delta": {"content": chunk}}
        hidden = isinstance(chunk, ReasoningDelta) and not self._shows_reasoning
        return {"delta": {} if hidden else _delta(chunk)}

    def entries(self, index: int, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
        return ChatLogprobs(content=token_entries(logprobs))

    def begin(self, streams: Sequence[InferenceStream]) -> bytes:
        """The role, for each answer."""
        addition = {"delta": {"role": "assistant", "content": "", "refusal": None}}
        return b"".join(event(self.chunk(index, addition)) for index in range(len(streams)))


def _delta(chunk: str | None) -> dict[str, Any]:
    """What a chunk of a stream adds to the message."""
    if chunk is None:
        return {}
    if isinstance(chunk, ReasoningDelta):
        return {"reasoning_content": chunk.text, "reasoning": chunk.text}
    if not isinstance(chunk, ToolCallDelta):
        return {"content": chunk}
    if chunk.id is None:
        made: dict[str, Any] = {"index": chunk.call, "function": {"arguments": chunk.arguments}}
    else:
        function = {"name": chunk.name, "arguments": chunk.arguments}
        made = {"index": chunk.call, "id": chunk.id, "type": "function", "function": function}
    return {"tool_calls": [made]}


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

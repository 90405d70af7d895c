"""Items of the input of OpenAI's responses, as the service's messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from engineroom.schemas import ChatMessage
from engineroom.server.apis.request_fields import (
    Content,
    SubSchema,
    TextPart,
    chat_message,
    text_of,
)
from engineroom.server.apis.tool_fields import FunctionDefinition
from engineroom.server.http.errors import ApiError
from engineroom.tools import MAX_TOOLS, ToolCall

__all__ = ["InputItem", "ResponsesTools", "is_complete", "messages_of"]

_TEXTS: Final = ("input_text", "output_text", "text")


class ResponsesTool(FunctionDefinition):
    """A tool, as the newer API writes it."""

    type: Literal["function"]


ResponsesTools = Annotated[list[ResponsesTool], Field(fail_fast=True, max_length=MAX_TOOLS)]


class InputMessage(SubSchema):
    """A message of the input."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    status: str | None = None
    """``completed``: an answer behind it is a new one; else it goes on with the assistant's last.
    """


class InputCall(SubSchema):
    """A call that the model has made."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: str
    arguments: str


class InputResult(SubSchema):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1)]
    output: Content


class InputReasoning(SubSchema):
    """What the model has thought."""

    type: Literal["reasoning"]
    summary: Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    content: Annotated[list[TextPart], Field(fail_fast=True)] | None = None


def _kind_of(value: Any) -> str | None:
    kind = value.get("type", "message") if isinstance(value, dict) else None
    return f"({kind})" if isinstance(kind, str) else None


InputItem: TypeAlias = Annotated[
    Annotated[InputMessage, Tag("(message)")]
    | Annotated[InputCall, Tag("(function_call)")]
    | Annotated[InputResult, Tag("(function_call_output)")]
    | Annotated[InputReasoning, Tag("(reasoning)")],
    Discriminator(
        _kind_of,
        custom_error_type="item",
        custom_error_message="must be an item of type message, function_call, "
        "function_call_output or reasoning; no other is supported by this server",
    ),
]


def is_complete(items: Sequence[InputItem]) -> bool:
    """Whether the last message says that nothing of it is missing."""
    last = items[-1] if items else None
    return isinstance(last, InputMessage) and last.status == "completed"


def messages_of(items: Sequence[InputItem]) -> list[ChatMessage]:
    """The service's messages: what the assistant thought, said and called in one go is one.

    :raises ApiError: 400: an item is not as it should be.
    """
    made: list[ChatMessage] = []
    turn: dict[str, Any] = {}  # of the assistant, as far as it has come
    begun = ""

    def end() -> None:
        if set(turn) - {"reasoning"}:
            made.append(chat_message("assistant", turn.pop("content", None), begun, **turn))
        turn.clear()

    for number, item in enumerate(items):
        where = f"input.{number}"
        if isinstance(item, InputReasoning):
            end()
            begun, turn["reasoning"] = where, _thoughts(item)
        elif isinstance(item, InputCall):
            begun = begun if turn else where
            call = ToolCall(id=item.call_id, name=item.name, arguments=item.arguments)
            turn.setdefault("tool_calls", []).append(call.as_message())
        elif isinstance(item, InputResult):
            end()
            result = text_of(item.output, where, _TEXTS) or ""
            made.append(chat_message("tool", result, where, tool_call_id=item.call_id))
        else:
            kinds = (*_TEXTS, "refusal") if item.role == "assistant" else _TEXTS
            text = text_of(item.content, where, kinds)
            if item.role != "assistant":
                end()
                made.append(chat_message(item.role, text, where))
                continue
            if "content" in turn or "tool_calls" in turn:
                end()
            begun, turn["content"] = where, text
    end()
    if not made:
        raise ApiError(400, "input has no message", "invalid_value", "input")
    return made


def _thoughts(item: InputReasoning) -> str | None:
    parts = item.content or item.summary or ()
    return "\n".join(part.text or "" for part in parts) or None

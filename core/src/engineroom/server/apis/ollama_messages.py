"""Ollama's conversations: messages and tools as they come, as the service has them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from engineroom.schemas import ChatMessage
from engineroom.server.apis.ollama_common import refuse_images
from engineroom.server.apis.request_fields import SubSchema, chat_message
from engineroom.server.apis.tool_fields import FunctionDefinition
from engineroom.server.http.frames import dumps
from engineroom.tools import MAX_TOOLS, ToolCall

__all__ = ["OllamaInput", "OllamaTools", "messages_of"]


def _lower(role: Any) -> Any:
    return role.lower() if isinstance(role, str) and len(role) < 32 else role


class OllamaCalledFunction(SubSchema):
    """What was called, and how."""

    name: str
    arguments: dict[str, Any] | None = None
    """An object, unlike in OpenAI's API."""


class OllamaCalled(SubSchema):
    """A call that the model has made."""

    id: str | None = None
    function: OllamaCalledFunction


class OllamaInput(SubSchema):
    """A message of the conversation."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_lower)
    ]
    content: str | None = None
    thinking: str | None = None
    """What the assistant thought before it."""
    images: Annotated[list[Any], Field(fail_fast=True)] | None = None
    """None: they are refused."""
    tool_calls: Annotated[list[OllamaCalled], Field(fail_fast=True)] | None = None
    tool_name: str | None = None
    """Of a result: the tool."""
    tool_call_id: str | None = None
    """Of a result: the call, where it had an id."""


class OllamaTool(SubSchema):
    """A tool that the model may call."""

    type: Literal["function"] | None = None
    function: FunctionDefinition


OllamaTools = Annotated[list[OllamaTool], Field(fail_fast=True, max_length=MAX_TOOLS)]


class _Open:
    """Calls that have no result yet. Ollama's have no id, so that names and order tell which."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._by_name: dict[str, deque[str]] = {}

    def begin(self) -> None:
        """Calls of another message: results of those before do not come any more."""
        self._names.clear()
        self._by_name.clear()

    def add(self, call_id: str, name: str) -> None:
        self._names[call_id] = name
        self._by_name.setdefault(name, deque()).append(call_id)

    def take(self, call_id: str | None, name: str | None) -> str | None:
        """The call that a result is of; ``None``: there is none."""
        if call_id is None and name is not None:
            ids = self._by_name.get(name, deque())
            while ids and (found := ids.popleft()):
                if found in self._names:
                    call_id = found
                    break
        elif call_id is None:
            call_id = next(iter(self._names), None)
        if call_id is not None:
            self._names.pop(call_id, None)
        return call_id


def messages_of(messages: Sequence[OllamaInput]) -> list[ChatMessage]:
    """The service's messages; calls without an id get one, by which their results name them.

    :raises ApiError: 400: a message is not as it should be.
    """
    waiting = _Open()
    made: list[ChatMessage] = []
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        refuse_images(message.images, f"{where}.images")
        fields: dict[str, Any] = {}
        content: str | None = message.content or ""
        if message.role == "tool":
            fields["tool_call_id"] = waiting.take(message.tool_call_id, message.tool_name)
        elif message.role == "assistant":
            fields["reasoning"] = message.thinking or None
            if message.tool_calls:
                waiting.begin()
                fields["tool_calls"] = _calls(message.tool_calls, number, waiting)
                content = message.content or None
        made.append(chat_message(message.role, content, where, message.tool_name, **fields))
    return made


def _calls(calls: Sequence[OllamaCalled], number: int, waiting: _Open) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for place, call in enumerate(calls):
        name, call_id = call.function.name, call.id or f"call_{number}_{place}"
        waiting.add(call_id, name)
        arguments = dumps(call.function.arguments or {}).decode()
        made.append(ToolCall(id=call_id, name=name, arguments=arguments).as_message())
    return made

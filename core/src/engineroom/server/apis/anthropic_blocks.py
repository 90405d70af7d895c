"""Blocks of Anthropic's messages: those that come, as the service's messages, and those that go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, Tag

from engineroom.field_types import either
from engineroom.generation.deltas import ReasoningDelta, ToolCallDelta
from engineroom.schemas import ChatMessage, InferenceResponse
from engineroom.server.apis.request_fields import (
    Content,
    PartType,
    SubSchema,
    chat_message,
    text_of,
)
from engineroom.server.apis.tool_fields import FunctionDefinition, as_object
from engineroom.server.http.errors import ApiError
from engineroom.server.http.frames import Answer, Framer, dumps, named_event
from engineroom.tools import MAX_TOOLS, ToolCall

__all__ = [
    "AnthropicMessage",
    "AnthropicTool",
    "AnthropicToolChoice",
    "AnthropicTools",
    "BlockWriter",
    "TextBlock",
    "ThinkingBlock",
    "ToolUseBlock",
    "blocks_of",
    "messages_of",
]

# ── what comes ───────────────────────────────────────────────────────────────────────────────


class InputBlock(SubSchema):
    """A part of a message: text, thinking, a call, or a call's result."""

    type: PartType
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: Content | None = None
    is_error: bool | None = None


class AnthropicMessage(SubSchema):
    """A message of the conversation."""

    role: Literal["user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("(text)")]
        | Annotated[list[InputBlock], Field(fail_fast=True), Tag("(blocks)")],
        either("a text or a list of parts", {str: "(text)", list: "(blocks)"}),
    ]


class AnthropicTool(SubSchema):
    """A tool that the model may call."""

    type: Literal["custom"] | None = None
    """Not one of Anthropic's own."""
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    def as_function(self) -> FunctionDefinition:
        """The same as OpenAI's APIs write it."""
        return FunctionDefinition(
            name=self.name,
            description=self.description,
            parameters=self.input_schema,
            strict=self.strict,
        )


AnthropicTools = Annotated[list[AnthropicTool], Field(fail_fast=True, max_length=MAX_TOOLS)]


class AnthropicToolChoice(SubSchema):
    """Whether tools are called: not at all, as the model likes, any, or a certain one."""

    type: Literal["none", "auto", "any", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


def messages_of(messages: Sequence[AnthropicMessage]) -> list[ChatMessage]:
    """The service's messages. Each result of a call becomes one of its own.

    :raises ApiError: 400: a block is not as it should be.
    """
    made: list[ChatMessage] = []
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        if isinstance(message.content, str):
            made.append(chat_message(message.role, message.content, where))
        else:
            made += _of_blocks(message.role, message.content, where)
    return made


def _of_blocks(role: str, blocks: Sequence[InputBlock], where: str) -> list[ChatMessage]:
    made: list[ChatMessage] = []
    texts: list[Any] = []
    thoughts: list[Any] = []
    calls: list[Any] = []

    def end() -> None:
        """What there is so far is a message."""
        if texts or calls:
            fields: dict[str, Any] = {"tool_calls": [*calls] or None}
            fields["reasoning"] = "".join(thoughts) or None
            text = "".join(texts) if texts else None
            made.append(chat_message(role, text, where, **fields))
            for parts in (texts, thoughts, calls):
                parts.clear()

    for place, block in enumerate(blocks):
        at = f"{where}.content.{place}"
        if block.type == "tool_result" and role == "user":
            end()
            result = text_of(block.content, at) or ""
            if block.is_error:
                result = _as_error(result)
            of = _needed(block.tool_use_id, at, "tool_use_id")
            made.append(chat_message("tool", result, at, tool_call_id=of))
        elif block.type == "tool_use" and role == "assistant":
            name, call_id = _needed(block.name, at, "name"), _needed(block.id, at, "id")
            arguments = dumps(block.input or {}).decode()
            calls.append(ToolCall(id=call_id, name=name, arguments=arguments).as_message())
        elif block.type == "thinking" and role == "assistant":
            thoughts.append(block.thinking or "")
        elif block.type != "redacted_thinking" or role != "assistant":
            texts.append(text_of([block], at) or "")
    end()
    return made or [chat_message(role, "", where, reasoning="".join(thoughts) or None)]


def _as_error(result: str) -> str:
    """A result that says that it is an error; no template has another place for that."""
    if result.lower().startswith("error"):
        return result
    return f"Error: {result}" if result else "Error"


def _needed(value: str | None, where: str, name: str) -> str:
    if not value:
        raise ApiError(400, f"{where}: {name} is missing", "invalid_value", "messages")
    return value


# ── what goes ────────────────────────────────────────────────────────────────────────────────


class TextBlock(Answer, kw_only=True, tag_field="type", tag="text"):
    """A part of the answer."""

    text: str


class ThinkingBlock(Answer, kw_only=True, tag_field="type", tag="thinking"):
    """What the model thought before it answered. It is not signed."""

    thinking: str
    signature: str = ""


class ToolUseBlock(Answer, kw_only=True, tag_field="type", tag="tool_use"):
    """A call of one of the tools."""

    id: str
    name: str
    input: dict[str, Any]


Block: TypeAlias = TextBlock | ThinkingBlock | ToolUseBlock


def blocks_of(response: InferenceResponse, *, shows_thoughts: bool = True) -> list[Block]:
    """A whole answer's content: no block is empty, unless the answer is, and no call was cut.

    :param shows_thoughts: else the block of thoughts says only that there were some.
    """
    blocks: list[Block] = []
    if response.reasoning:
        blocks.append(ThinkingBlock(thinking=response.reasoning if shows_thoughts else ""))
    for part in response.parts:
        if isinstance(part, str):
            blocks.append(TextBlock(text=part))
        else:
            blocks.append(ToolUseBlock(id=part.id, name=part.name, input=as_object(part.arguments)))
    return blocks if blocks or response.cut_call else [TextBlock(text="")]


class BlockWriter:
    """The events of a stream's blocks: one after another, each of one kind."""

    def __init__(self, *, shows_thoughts: bool = True) -> None:
        self._shows_thoughts = shows_thoughts
        self._index = -1
        self._kind = ""
        self._of_text: Framer | None = None

    def text_block(self) -> bytes:
        """Begin a block of text, and end the one before."""
        begun = self._begin({"type": "text", "text": ""})
        index, kind = self._index, "content_block_delta"
        self._of_text = Framer(
            lambda text: {
                "type": kind,
                "index": index,
                "delta": {"type": "text_delta", "text": text},
            },
            kind,
        )
        return begun

    @property
    def of_text(self) -> Framer:
        """What makes an event of a text in the block of text that was begun last."""
        assert self._of_text is not None
        return self._of_text

    def frame(self, chunk: str) -> bytes:
        """The events of a chunk."""
        if isinstance(chunk, ReasoningDelta):
            begun = b""
            if not chunk.text:
                return b""
            if self._kind != "thinking":
                begun = self._begin({"type": "thinking", "thinking": "", "signature": ""})
            if not self._shows_thoughts:
                return begun
            return begun + self._delta({"type": "thinking_delta", "thinking": chunk.text})
        if isinstance(chunk, ToolCallDelta):
            begun = b""
            if chunk.id is not None:
                made: dict[str, Any] = {
                    "type": "tool_use",
                    "id": chunk.id,
                    "name": chunk.name,
                    "input": {},
                }
                begun = self._begin(made)
            if not chunk.arguments:
                return begun
            delta = {"type": "input_json_delta", "partial_json": chunk.arguments}
            return begun + self._delta(delta)
        if self._kind == "text":
            return self.of_text(chunk)
        return self.text_block() + self.of_text(chunk) if chunk else b""

    def end(self, *, cut_call: bool = False) -> bytes:
        """The last block ends. There is one, if only an empty one of text, unless the end of the
        answer cut a call before there was anything of it.
        """
        if self._index < 0:
            if cut_call:
                return b""
            return self.text_block() + self.end()
        return _event("content_block_stop", index=self._index)

    def _begin(self, block: Mapping[str, Any]) -> bytes:
        ended = b"" if self._index < 0 else self.end()
        self._index += 1
        self._kind = block["type"]
        return ended + _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return named_event(kind, {"type": kind, **fields})

"""A stream's chunks on the terminal: content as it is, reasoning dimmed, and what calls came to."""

from __future__ import annotations

import json
import sys

from engineroom.cli.output import write, write_dimmed, write_text
from engineroom.generation.deltas import ReasoningDelta, StreamDelta, ToolCallDelta
from engineroom.schemas import ChatMessage
from engineroom.tools import ToolCall

__all__ = ["ChunkWriter"]


class ChunkWriter:
    """Writes chunks as they come, and keeps what they come to.

    Reasoning is shown on a terminal alone: what reads the output elsewhere wants the answer.
    """

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []
        self._last = ""  # what was written last

    def write(self, chunk: str) -> None:
        """Take one more chunk of the stream."""
        if isinstance(chunk, ReasoningDelta):
            self._reasoning.append(chunk.text)
            if sys.stdout.isatty():
                write_dimmed(chunk.text)
                self._last = chunk.text
        elif isinstance(chunk, ToolCallDelta):
            self._add(chunk)
        elif chunk and not isinstance(chunk, StreamDelta):
            if self._reasoning and not self._content:
                self.end_line()
            self._content.append(chunk)
            write_text(chunk)
            self._last = chunk

    def end_line(self) -> None:
        """Begin a new line, if the one that is written has something on it."""
        if self._last and not self._last.endswith("\n"):
            write("\n")
        self._last = ""

    def write_calls(self) -> None:
        """Write each call on a line of its own."""
        self.end_line()
        for call in self.calls:
            write_text(f"{call.name}({call.arguments})\n")

    def message(self) -> ChatMessage | None:
        """What came, as a message of the assistant's; ``None``: nothing did."""
        content, calls = "".join(self._content), [call.as_message() for call in self.calls]
        if not content and not calls:
            return None
        return ChatMessage(
            role="assistant",
            content=content or None,
            reasoning="".join(self._reasoning) or None,
            tool_calls=calls or None,
        )

    @property
    def calls(self) -> list[ToolCall]:
        """The calls that are complete."""
        return [call for call in self._calls if _is_object(call.arguments)]

    def _add(self, delta: ToolCallDelta) -> None:
        if delta.name is not None:
            self._calls.append(ToolCall(id=delta.id or "", name=delta.name, arguments=""))
        if delta.arguments and self._calls:
            call = self._calls[-1]
            arguments = call.arguments + delta.arguments
            self._calls[-1] = call.model_copy(update={"arguments": arguments})


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False

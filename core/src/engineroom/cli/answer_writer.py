"""An answer in the terminal: content as it comes, reasoning dimmed beside it, calls in the end."""

from __future__ import annotations

import json
from typing import Any, Final

from engineroom.cli.output import Dimmed, write, write_document, write_text
from engineroom.generation.deltas import ReasoningDelta, ToolCallDelta
from engineroom.tools import ToolCall

__all__ = ["CUT_CALL", "AnswerWriter", "call_line"]

CUT_CALL: Final = "the answer ends within a call, which is left out; {} allows more"
"""With the name of what bounds the answer."""


class AnswerWriter:
    """Writes the chunks of one answer.

    Content goes to standard output. Reasoning goes to standard error, dimmed, if that is a
    terminal: who reads the output of the command wants the answer alone.
    """

    def __init__(self) -> None:
        self._content: list[str] = []
        self._calls: dict[int, ToolCall] = {}
        self._thoughts = Dimmed()

    @property
    def content(self) -> str:
        """What was written so far."""
        return "".join(self._content)

    @property
    def calls(self) -> list[ToolCall]:
        """Those that are whole: the arguments of others are no JSON."""
        return [call for call in self._calls.values() if _is_whole(call)]

    @property
    def cut_call(self) -> bool:
        """The answer ends within a call."""
        return len(self.calls) < len(self._calls)

    def write(self, chunk: str) -> None:
        """Show a chunk."""
        if isinstance(chunk, ReasoningDelta):
            self._thoughts.write(chunk.text)
        elif isinstance(chunk, ToolCallDelta):
            self._add(chunk)
        elif chunk:
            self._thoughts.end_line()
            self._content.append(chunk)
            write_text(chunk)

    def end_line(self, asked: bool = True) -> None:
        """Make a line of its own for what comes next, be it a message or the shell's prompt.

        :param asked: whether to end the line of the content, too.
        """
        self._thoughts.end_line()
        if asked and self._content and not self._content[-1].endswith("\n"):
            write("\n")

    def _add(self, delta: ToolCallDelta) -> None:
        call = self._calls.get(delta.call) or ToolCall(
            id=delta.id or f"call_{delta.call}", name=delta.name or "", arguments=""
        )
        self._calls[delta.call] = call.model_copy(
            update={"arguments": call.arguments + delta.arguments}
        )


def _is_whole(call: ToolCall) -> bool:
    try:
        json.loads(call.arguments)
    except (ValueError, RecursionError):
        return False
    return True


def call_line(call: ToolCall) -> None:
    """Write a call as a line of JSON on standard output."""
    arguments: Any = call.arguments
    try:
        arguments = json.loads(call.arguments)
    except ValueError:  # cut short
        pass
    line = {"id": call.id, "name": call.name, "arguments": arguments}
    write_document(json.dumps(line, ensure_ascii=False))

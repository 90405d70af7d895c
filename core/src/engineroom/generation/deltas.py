"""What a stream brings beside content: reasoning, and tool calls as they are written.

Both are empty strings, so that the joined chunks of a stream stay the content; they are true all
the same, so that ``if chunk:`` does not drop them.
"""

from __future__ import annotations

__all__ = ["ReasoningDelta", "StreamDelta", "ToolCallDelta"]


class StreamDelta(str):
    """A chunk of a stream that is no content: an empty string that is true."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return True


class ReasoningDelta(StreamDelta):
    """A piece of what the model thinks before it answers."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> ReasoningDelta:
        self = super().__new__(cls, "")
        self.text = text
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return ReasoningDelta, (self.text,)

    def __repr__(self) -> str:
        return f"ReasoningDelta({self.text!r})"


class ToolCallDelta(StreamDelta):
    """A piece of a tool call.

    The first one of a call has its ``id`` and its ``name``, later ones have ``None`` there. The
    joined ``arguments`` are JSON, if the call is not cut short.
    """

    __slots__ = ("arguments", "call", "id", "name")
    call: int
    """Which of the answer's calls it is, from 0."""
    id: str | None
    name: str | None
    arguments: str
    """The next characters of the arguments, as JSON."""

    def __new__(
        cls, call: int, id_: str | None = None, name: str | None = None, arguments: str = ""
    ) -> ToolCallDelta:
        self = super().__new__(cls, "")
        self.call, self.id, self.name, self.arguments = call, id_, name, arguments
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return ToolCallDelta, (self.call, self.id, self.name, self.arguments)

    def __repr__(self) -> str:
        return f"ToolCallDelta({self.call}, {self.id!r}, {self.name!r}, {self.arguments!r})"

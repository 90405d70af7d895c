"""Options of a model about its conversations, which are the same on every runtime."""

from __future__ import annotations

from pydantic import BaseModel

__all__ = ["ChatOptions"]


class ChatOptions(BaseModel):
    """What the options of a runtime inherit that reads conversations with a chat template."""

    chat_template: str | None = None
    """A Jinja template to use instead of the model's own."""
    tool_format: str | None = None
    """Name of the format in which the model calls tools, ``hermes`` for instance; ``generic``:
    tools are told in messages; ``None``: as the chat template shows."""
    reasoning_format: str | None = None
    """Name of what stands around the model's reasoning, ``think`` for instance; ``none``: nothing
    does; ``None``: as the chat template shows."""

"""Options of a model about its conversations, which are the same on every runtime."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel

from engineroom.field_types import JsonObject

__all__ = ["ChatOptions"]

_OF_THE_REQUEST: Final = ("messages", "tools", "add_generation_prompt")


def _say_nothing_of_a_request(names: dict[str, Any]) -> dict[str, Any]:
    if wrong := [name for name in _OF_THE_REQUEST if name in names]:
        raise ValueError(f"may not have {', '.join(wrong)}: each request says that itself")
    return names


class ChatOptions(BaseModel):
    """What the options of a runtime inherit that reads conversations with a chat template."""

    chat_template: str | None = None
    """A Jinja template to use instead of the model's own."""
    chat_template_kwargs: (
        Annotated[JsonObject, AfterValidator(_say_nothing_of_a_request)] | None
    ) = None
    """More names that the chat template may use, e.g. ``{"enable_thinking": False}``, where a
    request does not say otherwise."""
    tool_format: str | None = None
    """Name of the format in which the model calls tools, ``hermes`` for instance; ``generic``:
    tools are told in messages; ``None``: as the chat template shows."""
    reasoning_format: str | None = None
    """Name of what stands around the model's reasoning, ``think`` for instance; ``none``: nothing
    does; ``None``: as the chat template shows."""

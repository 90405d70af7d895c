"""Our messages as chat templates walk them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from engineroom.prompts.work import check_stopped
from engineroom.schemas import ChatMessage

__all__ = ["arguments_of", "for_template", "map_strings", "strings"]


def for_template(
    messages: Sequence[ChatMessage],
    *,
    parts: bool = False,
    text_arguments: bool = False,
    empty_content: bool = False,
) -> list[dict[str, Any]]:
    """The conversation as dictionaries of the template's own; what a message lacks has no key.

    The arguments of a tool call are a mapping: JSON in a string is parsed, and what is no JSON
    object stays as it is. Reasoning has the names that templates know it by.

    :param parts: ``content`` is a list of parts, ``[{"type": "text", "text": …}]``.
    :param text_arguments: leave the arguments of tool calls as JSON in a string.
    :param empty_content: a message with tool calls has content all the same, if only an empty one.
    """
    conversation = []
    for sent in messages:
        check_stopped()
        message = sent.model_dump(exclude_none=True)
        if (reasoning := message.pop("reasoning", None)) is not None:
            message["reasoning_content"] = message["thinking"] = reasoning
        conversation.append(message)
        if empty_content and "tool_calls" in message:
            message.setdefault("content", "")  # templates ask what is in it
        if parts and "content" in message:
            message["content"] = [{"type": "text", "text": message["content"]}]
        for call in message.get("tool_calls", ()):
            function = call.get("function")
            if isinstance(function, dict) and "arguments" in function:
                shape = _as_text if text_arguments else arguments_of
                function["arguments"] = shape(function["arguments"])
    return conversation


def arguments_of(arguments: Any) -> Any:
    """A call's arguments as a mapping, where they are JSON in a string; else as they are."""
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def strings(value: Any) -> Iterator[str]:
    """Every string in a value as JSON has it, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of such a value with each of its strings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {map_strings(k, change): map_strings(item, change) for k, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    return value

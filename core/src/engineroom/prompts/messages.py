"""Our messages as chat templates walk them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from engineroom.prompts.work import check_stopped
from engineroom.schemas import ChatMessage

__all__ = ["arguments_of", "for_template", "map_strings", "strings"]

_SHORT_ID: Final = re.compile("[A-Za-z0-9]{9}")


def for_template(
    messages: Sequence[ChatMessage],
    *,
    parts: bool = False,
    text_arguments: bool = False,
    empty_content: bool = False,
    short_ids: bool = False,
    single_calls: bool = False,
) -> list[dict[str, Any]]:
    """The conversation as dictionaries of the template's own; what a message lacks has no key.

    The arguments of a tool call are a mapping: JSON in a string is parsed, and what is no JSON
    object stays as it is. Reasoning has the names that templates know it by.

    :param parts: ``content`` is a list of parts, ``[{"type": "text", "text": …}]``.
    :param text_arguments: leave the arguments of tool calls as JSON in a string.
    :param empty_content: a message with tool calls has content all the same, if only an empty one.
    :param short_ids: ids of calls are nine letters and digits, which others are made into.
    :param single_calls: a message has one call at most, and its result stands behind it.
    """
    conversation = []
    sent = map(_as_mapping, messages)
    for message in _with_single_calls(sent) if single_calls else sent:
        if (reasoning := message.pop("reasoning", None)) is not None:
            message["reasoning_content"] = message["thinking"] = reasoning
        conversation.append(message)
        if empty_content and "tool_calls" in message:
            message.setdefault("content", "")  # templates ask what is in it
        if parts and "content" in message:
            message["content"] = [{"type": "text", "text": message["content"]}]
        if short_ids and "tool_call_id" in message:
            message["tool_call_id"] = _short_id(message["tool_call_id"])
        for call in message.get("tool_calls", ()):
            if short_ids and "id" in call:
                call["id"] = _short_id(call["id"])
            function = call.get("function")
            if isinstance(function, dict) and "arguments" in function:
                shape = _as_text if text_arguments else arguments_of
                function["arguments"] = shape(function["arguments"])
    return conversation


def _as_mapping(message: ChatMessage) -> dict[str, Any]:
    check_stopped()
    return message.model_dump(exclude_none=True)


def _with_single_calls(messages: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    waiting: list[dict[str, Any]] = []  # the calls of one message, each in a message of its own
    results: dict[str, list[dict[str, Any]]] = {}  # of those calls, by id
    for message in messages:
        if waiting and message["role"] == "tool":
            results.setdefault(str(message.get("tool_call_id")), []).append(message)
            continue
        yield from _with_results(waiting, results)
        waiting, results = [], {}
        if len(calls := message.get("tool_calls", ())) > 1:
            alone = ({"role": message["role"], "tool_calls": [call]} for call in calls[1:])
            waiting = [{**message, "tool_calls": calls[:1]}, *alone]
        else:
            yield message
    yield from _with_results(waiting, results)


def _with_results(
    calls: Iterable[dict[str, Any]], results: Mapping[str, list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    for message in calls:
        yield message
        if own := results.get(str(message["tool_calls"][0].get("id"))):
            yield own.pop(0)
    for others in results.values():
        yield from others


def _short_id(name: Any) -> str:
    text = str(name)
    if _SHORT_ID.fullmatch(text):
        return text
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:9]


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
